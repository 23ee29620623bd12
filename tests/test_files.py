"""lab/files.py and lab/own.py: what happens to other people's files."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, refusal

import data
from lab.own import OwnFile, first_turn, hold_out

GOOD = {"prompt": "Which pet?", "chosen": " A cat.", "rejected": " A dog."}
ROW = tuple(GOOD.values())
USER, ANSWER = {"role": "user", "content": "Which pet?"}, {"role": "assistant", "content": "A cat."}
OTHER, EARLIER = ANSWER | {"content": "A dog."}, [USER | {"content": "Hi."}, ANSWER]
CHAT = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}
SYSTEM = {"role": "system", "content": " Be kind. "}
FIELDS = "chosen", "rejected"
LOUD = "USER: A\nASSISTANT:"
HUMAN = "\n\nHuman: Hi.\n\nAssistant:"
CHAT_ROW = ("User: Which pet?\n\nAssistant:", " A cat.", " A dog.")


def write(tmp_path, content, name="pairs.jsonl"):
    """Bytes, text, or records as lines -> the path of a file of them."""
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def own_file(path, wanted="pairs", held_out="", skip_bad=False, max_bad=0.1):
    return OwnFile(path, wanted, SimpleNamespace(skip_bad=skip_bad, max_bad=max_bad), held_out)


def rows_of(tmp_path, content, wanted="pairs", **options):
    return [row for _, row in own_file(write(tmp_path, content), wanted, **options).rows]


@pytest.mark.parametrize(
    "record, row",
    [
        (GOOD, ROW),
        (CHAT, CHAT_ROW),
        (GOOD | {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, CHAT_ROW),  # UltraFeedback
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, CHAT_ROW),
        (
            {"prompt": "Hi."} | {side: [*EARLIER, USER, *CHAT[side]] for side in FIELDS},
            ("User: Hi.\n\nAssistant: A cat.\n\n" + CHAT_ROW[0], *CHAT_ROW[1:]),
        ),
        (CHAT | {"prompt": "Which pet?"}, CHAT_ROW),
        (CHAT | {"chosen": "A cat."}, CHAT_ROW),
        (
            CHAT | {"prompt": [*EARLIER, USER]},
            ("User: Hi.\n\nAssistant: A cat.\n\n" + CHAT_ROW[0], *CHAT_ROW[1:]),
        ),
        (
            CHAT | {"prompt": [SYSTEM, USER]},
            ("System: Be kind.\n\n" + CHAT_ROW[0], *CHAT_ROW[1:]),
        ),
        (GOOD | {"system": "Be kind."}, ("System: Be kind.\n\n" + CHAT_ROW[0], *CHAT_ROW[1:])),
        (GOOD | {"system": ""}, CHAT_ROW),
        ({"chosen": "Which pet? A cat.", "rejected": "Which pet? A dog."},
         ("Which pet? A", " cat.", " dog.")),
        ({"chosen": "Q?\n\nYes", "rejected": "Q?\n\nYes, no"}, ("Q?", "\n\nYes", "\n\nYes, no")),
        (
            {"chosen": f"{HUMAN} I am.", "rejected": f"{HUMAN} I was."},
            (HUMAN, " I am.", " I was."),
        ),
        (
            {"chosen": f"{LOUD} B{HUMAN} C", "rejected": f"{LOUD} B{HUMAN} D"},
            (f"{LOUD} B{HUMAN}", " C", " D"),
        ),
        ({"prompt": "q", "completion": " a", "label": True}, ("q", " a", True)),
        ({"prompt": "q", "completion": " a", "label": 0}, ("q", " a", False)),
        ({"prompt": [USER], "completion": [ANSWER], "label": 1}, (*CHAT_ROW[:2], True)),
        ({"prompt": "q", "response": " a", "rating": 4.5}, ("q", " a", 4.5)),
        ({"prompt": "q", "completion": " a", "rating": -2}, ("q", " a", -2)),
    ],
)  # fmt: skip
def test_each_shape_becomes_the_row_that_it_should(tmp_path, record, row):
    assert rows_of(tmp_path, [record, record]) == [row, row]


@pytest.mark.parametrize(
    "record, row",
    [
        ({"prompt": "q", "response": " a"}, ("q", " a")),
        ({"prompt": "q", "completion": " a"}, ("q", " a")),
        ({"messages": [USER, ANSWER]}, CHAT_ROW[:2]),
        ({"messages": [USER, ANSWER], "prompt": "Which pet?"}, CHAT_ROW[:2]),
        ({"prompt": [USER], "completion": [ANSWER]}, CHAT_ROW[:2]),
        ({"messages": [*EARLIER, USER, OTHER], "system": "Be kind."},
         ("System: Be kind.\n\nUser: Hi.\n\nAssistant: A cat.\n\n" + CHAT_ROW[0], " A dog.")),
    ],
)  # fmt: skip
def test_each_shape_of_demonstrations_becomes_the_row_that_it_should(tmp_path, record, row):
    assert rows_of(tmp_path, [record], "sft") == [row]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (b"\xff{}", "not UTF-8 at its byte 0"),
        (b"[" * 100_000, "recursion"),
        (json.dumps(GOOD) * 2, 'several objects, the first with "prompt", "chosen", "rejected"'),
        (GOOD | {"chosen": None}, '"chosen" has null, which is no text'),
        (GOOD | {"chosen": ANSWER}, '"chosen" has {"role": "assistant", "content": "A cat.…, w'),
        (GOOD | {"prompt": "who " * 20, "chosen": [USER["content"] * 5, ANSWER]},
         '"chosen" has ["Which pet?Which pet?Which pet?Which pe…, which is neither a text nor'),
        (CHAT | {"chosen": ANSWER}, "neither a text nor a list of turns: put it in [ ]"),
        (GOOD | {"chosen": ["A"]}, '"chosen" has ["A"], which is neither a text nor a list'),
        (json.dumps(GOOD) + ",", "a comma after the object"),
        (GOOD | {"prompt": ""}, '"prompt" is empty'),
        (GOOD | {"rejected": " \n"}, '"rejected" is empty'),
        (GOOD | {"rejected": " A cat."}, '"chosen" equals "rejected"'),
        (GOOD | {"rejected": " A  cat. "}, '"chosen" equals "rejected" but for white space'),
        (GOOD | {"chosen": "\ud800"}, "surrogates not allowed"),
        (GOOD | {"chosen": " A cat.<|endoftext|>"}, '"chosen" spells out <|endoftext|>'),
        (GOOD | {"chosen": json.dumps([ANSWER])}, '"chosen" is a string that holds JSON'),
        (GOOD | {"chosen": str([ANSWER])}, '"chosen" is a string that holds JSON'),
        ({"prompt": "a", "chosen": "b"}, 'the fields are "prompt", "chosen"; wanted are "chosen"'),
        ({"question": "a", "chosen": "b", "rejected": "c"}, '"question" is Orca\'s: call it "p'),
        ({"instruction": "a", "output": "b"}, "Alpaca"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "ShareGPT"),
        ({"messages": [USER, ANSWER]}, '"messages" is for train_sft.py --sft'),
        ({"chosen": "One", "rejected": "Two"}, 'neither a "prompt" nor a word with which both'),
        ({"chosen": "Q? ", "rejected": "Q? A"}, '"chosen" is empty'),
        ({"chosen": f"{LOUD} B{HUMAN} E", "rejected": f"{LOUD} C{HUMAN} E"},
         "the transcripts differ before their last answers"),
        ({"chosen": f"{HUMAN} A{HUMAN} B", "rejected": f"{HUMAN} A"}, "the transcripts differ"),
        ({"prompt": "q", "completion": "a", "label": "1"}, '"label" is "1", neither true nor'),
        ({"prompt": "q", "completion": "a", "label": -1}, '"label" is -1, neither true nor false'),
        ({"prompt": "q", "response": "a", "rating": "5"}, '"rating" is "5", no finite number'),
        ({"prompt": "q", "response": "a", "rating": True}, '"rating" is true, no finite number'),
        ({"prompt": "q", "response": "a", "rating": float("nan")}, '"rating" is NaN, no finite'),
        ('{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}',
         'a field stands there twice: "prompt", "prompt", "chosen", "rejected"'),
        ({"data": [GOOD, GOOD]}, 'the fields are "data"; it is one object of many rows: write JS'),
        ({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}, "OpenAI"),
        ({"prompt": "q", "response": " ", "rating": 1}, '"response" is empty'),
        (CHAT, "pairs of conversations, but most are pairs of texts"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_stops_the_run(tmp_path, line, reason):
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    message = refusal(own_file, path)
    assert "pairs.jsonl, line 3: " in message and reason in message
    assert "bad lines: 1. Mend them, or pass --skip-bad" in message


@pytest.mark.parametrize(
    "record, reason",
    [
        (CHAT | {"rejected": [USER]}, '"rejected" ends with a turn of "user", not of "assistant"'),
        (CHAT | {"prompt": [ANSWER]}, 'the prompt ends with a turn of "assistant", not of "user"'),
        (CHAT | {"prompt": []}, "the prompt ends with a turn of none"),
        (CHAT | {"chosen": []}, '"chosen" ends with a turn of none'),
        (CHAT | {"chosen": [ANSWER | {"role": "gpt"}]}, '"chosen" has a turn of "gpt"; there are'),
        (CHAT | {"chosen": [ANSWER | {"role": ["user"]}]}, '"chosen" has a turn of "[\'user\']"'),
        (CHAT | {"chosen": [ANSWER | {"content": [1]}]}, '"chosen" has [1], which is no text'),
        (CHAT | {"chosen": [ANSWER | {"content": " "}]}, '"chosen" is empty'),
        (CHAT | {"chosen": [{"from": "x", "value": "A"}]}, 'turn of "chosen" has "from", "value"'),
        (CHAT | {"chosen": [*EARLIER, USER, ANSWER]}, "differ before their last turns"),
        (CHAT | {side: [EARLIER[0], CHAT[side][0]] for side in FIELDS},
         '"chosen" is a conversation that does not repeat "prompt"'),
        (CHAT | {"prompt": [USER, SYSTEM, USER]}, 'a turn of "system" may only be the first'),
        (CHAT | {"prompt": [SYSTEM, USER], "system": "y"}, 'a turn of "system" may only be'),
        (CHAT | {"system": 5}, '"system" has 5, which is no text'),
        ({"system": "x", "chosen": "a", "rejected": "b"}, "the prompt ends with a turn of none"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_named(tmp_path, record, reason):
    path = write(tmp_path, [CHAT, record])
    message = refusal(own_file, path)
    assert "pairs.jsonl, line 2: " in message and reason in message


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "pairs.jsonl: it is empty"),
        ("\n \n", "pairs.jsonl: it is empty"),
        ("[]", "pairs.jsonl: it is empty"),
        ("{}", "line 1: the fields are none; wanted are"),
        ('prompt,chosen,rejected\n"a","b","c"\n', 'is CSV of "prompt", "chosen", "rejected"; give'),
        (b"PAR1\x15\x04", "is Parquet: write JSON lines"),
        ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"PK\x03\x04...", "is a zip archive: unpack it"),
        (gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot read"),
        (b"\x1f\x8bnot gzip", "cannot read"),
        ('[\n{"prompt": "a"},\n{"chosen"\n]', "no JSON array: Expecting ':' delimiter: line 4"),
        ('[{"prompt": "a", "prompt": "b"}]', 'no JSON array: a field stands there twice: "prompt"'),
        (json.dumps({"data": [GOOD]}, indent=1), '1: the fields are "data"; it is one object'),
        ('{\n"prompt": "a"}\n{\n"prompt": "b"}', "put each object on one line, or all in [ ]"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, content, reason):
    assert reason in refusal(own_file, write(tmp_path, content))


def test_lines_arrays_gzip_and_pipes_hold_the_same(tmp_path):
    records = [GOOD | {"prompt": f"Où est {i} 🙂?"} for i in range(40)]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    expected = [tuple(record.values()) for record in records]
    array = json.dumps(records, indent=2)
    mac = lines.replace("\n", "\r")
    for text in (lines, mac, "\ufeff" + lines.replace("\n", "\r\n\r\n  \n"), array, "\n" + array):
        assert rows_of(tmp_path, text) == expected
        assert rows_of(tmp_path, gzip.compress(text.encode())) == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_once_and_whole(tmp_path):
    content = "\n".join(json.dumps(GOOD | {"prompt": f"q{i}" * 500}) for i in range(300)).encode()
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    writer = threading.Thread(target=Path(pipe).write_bytes, args=[content])
    writer.start()
    assert len(own_file(pipe).rows) == 300
    writer.join()


def test_skip_bad_leaves_out_a_tenth_and_more_only_if_told_so(tmp_path, tokenizer, capsys):
    lines = [json.dumps(GOOD | {"prompt": f"{i}?"}) for i in range(18)]
    path = write(tmp_path, "\n".join([*lines, "{", json.dumps(GOOD | {"chosen": " cat" * 40})]))
    file = own_file(path, skip_bad=True)
    file.split(tokenizer, block_size=32)
    printed = capsys.readouterr().out
    assert f"{path}: 20 read\n" in printed
    assert f"  1 left out, the first: {path}, line 19: not JSON" in printed
    assert "line 20: it takes 44 tokens, and the model 32" in printed
    assert file.report["read"] == 20 == file.report["trained"] + file.report["held_out"] + 2
    long = file.report["left_out"]["it takes N tokens, and the model N"]
    assert long["count"] == 1 and "line 20" in long["first"]
    path = write(tmp_path, "\n".join([*lines, "{", "[", '{"a": 1}']))
    message = refusal(own_file, path, "pairs", "", True)
    assert "line 19: not JSON" in message
    assert "bad lines: 3. Of 21 they are more than --max-bad 0.1 allows" in message
    assert len(own_file(path, skip_bad=True, max_bad=0.2).rows) == 18


def test_a_pair_that_just_fits_is_kept_whole(tmp_path, tokenizer):
    """3 tokens of prompt + 28 + end-of-text = the block of 32."""
    pairs = [GOOD | {"chosen": " cat" * 28}, GOOD | {"prompt": "Who?"}]
    file = own_file(write(tmp_path, pairs))
    assert (GOOD["prompt"], " cat" * 28, " A dog.") in sum(file.split(tokenizer, 32), [])
    message = refusal(own_file(write(tmp_path, pairs)).split, tokenizer, 31)
    assert "line 1: it takes 32 tokens, and the model 31" in message


def test_what_is_odd_is_said_once(tmp_path, tokenizer, capsys):
    def printed(records, wanted="pairs"):
        own_file(write(tmp_path, records), wanted).split(tokenizer, 64)
        return capsys.readouterr().out

    plain = [GOOD | {"prompt": f"{i}?"} for i in range(30)]
    quiet = printed(plain)
    assert "30 read\n" in quiet and " pairs to train on, " in quiet and "space" not in quiet
    assert "repeat another" not in quiet
    glued = [r | {"chosen": "A cat.", "rejected": "A dog."} for r in plain]
    assert (
        printed(glued).count("begin without a space, and are joined as they are: '0?A cat.'") == 1
    )
    repeated = [r | {"chosen": r["prompt"] + " A", "rejected": r["prompt"] + " B"} for r in plain]
    assert "repeat their prompts" in printed(repeated)
    spaced = [r | {"prompt": r["prompt"] + "\n"} for r in plain[1:2]]
    assert "2 repeat another, word for word" in printed([*plain, plain[0], *spaced])
    more = [r | {"score": 1, "id": "x", "system_prompt": "Be kind."} for r in plain]
    assert printed(more).count('not read: "score", "id", "system_prompt"\n') == 1
    inner = [CHAT | {"prompt": [USER | {"content": f"{i}?", "weight": 0}]} for i in range(30)]
    assert printed(inner).count('not read: "weight in prompt"\n') == 1
    implicit = [{"chosen": f"{i}? One", "rejected": f"{i}? Two"} for i in range(30)]
    assert "no \"prompt\": it is what both texts begin with, as '0?'" in printed(implicit)
    flipped = [*plain, GOOD | {"prompt": "0?", "chosen": " A dog.", "rejected": " A cat."}]
    assert "2 pairs stand there with the opposite label, too" in printed(flipped)
    thumbs = [{"prompt": f"{i}?", "completion": " A", "label": i % 3 > 0} for i in range(30)]
    said = printed([*thumbs, thumbs[0] | {"label": True}])
    assert "2 thumbs stand there with the opposite label, too" in said
    assert "thumbs up are " in said and "opposite" not in printed(thumbs)
    demos = [{"prompt": f"{i}?", "completion": " A", "label": True} for i in range(30)]
    assert 'not read: "label"' in printed(demos, "sft")


def test_thumbs_of_one_kind_are_refused(tmp_path, tokenizer, capsys):
    rows = [{"prompt": f"{i}?", "completion": " A", "label": True} for i in range(30)]
    message = refusal(own_file(write(tmp_path, rows)).split, tokenizer, 64)
    assert "all labels are true, and KTO learns from both kinds" in message
    assert "30 read\n" in capsys.readouterr().out


def hashed_low(text):
    """Whether a text's SHA-256 begins with a byte below 26, which a tenth of all do."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:2], 16) < 26


def test_the_split_follows_from_the_prompt_alone():
    questions = [f"What is {i}?" for i in range(300)]
    train, held_out = hold_out([(q, " a") for q in questions], "f")
    assert held_out == [(q, " a") for q in questions if hashed_low(q)]
    assert 20 < len(held_out) < 40 and sorted(train + held_out) == sorted(
        (q, " a") for q in questions
    )
    # Other lines, another order, white space, another turn or answer: each stays on its side.
    others = [(f" {q}\n", " b", " c") for q in questions[150::-1]]
    others += [
        (data.apply_template([{"role": "user", "content": q}, ANSWER, USER])[0], " d")
        for q in questions
    ]
    others += [(f"\n\nHuman: {q}\n\nAssistant:", " e") for q in questions]
    held = {q for q, _ in held_out}
    for part, out in zip(hold_out(others, "f"), (False, True)):
        assert all((first_turn(row[0]) in held) == out for row in part)
    assert first_turn(others[-1][0]) == first_turn(others[-301][0]) == questions[-1]


def test_a_small_file_holds_out_its_smallest_hashes_and_says_so(capsys):
    for count, held in ((2, 1), (3, 1), (4, 2), (5, 2), (40, 4)):
        rows = [(f"{i}?", " a") for i in range(1000) if not hashed_low(f"{i}?")][:count]
        _, held_out = hold_out(rows, "pairs.jsonl")
        rows.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())
        assert sorted(held_out) == sorted(rows[:held])
        assert f"of only {count} prompts the {held} with the smallest" in capsys.readouterr().out
    low = [(f"{i}?", " a") for i in range(1000) if hashed_low(f"{i}?")][:4]
    assert [len(part) for part in hold_out(low, "pairs.jsonl")] == [2, 2]
    assert "one prompt is too few" in refusal(hold_out, [("a", 1), ("a ", 2)], "pairs.jsonl")


def test_conversations_that_all_begin_alike_are_split_by_the_rest_of_their_prompts():
    rows = [(f"User: Hi.\n\nAssistant: Ho.\n\nUser: {i}?\n\nAssistant:", " a") for i in range(100)]
    train, held_out = hold_out(rows, "f")
    assert held_out == [row for row in rows if hashed_low(row[0])] and len(held_out) > 1


def test_a_file_to_hold_out_takes_the_place_of_the_split(tmp_path, tokenizer, capsys):
    path = write(tmp_path, [GOOD | {"prompt": f"{i}?"} for i in range(30)])
    other = write(tmp_path, [GOOD | {"prompt": f"{i}? "} for i in range(29, 34)], "other.jsonl")
    file = own_file(path, held_out=other)
    train, held_out = file.split(tokenizer, 64)
    assert len(train) == 30 and [row[0] for row in held_out] == [f"{i}? " for i in range(29, 34)]
    assert f"{other}: 1 begin with a first turn of {path}" in capsys.readouterr().out
    assert file.report["held_out"] == 5 == file.report["held_out_file"]["read"]
    thumbs = write(tmp_path, [{"prompt": "q", "completion": "a", "label": True}], "thumbs.jsonl")
    assert "has pairs of texts, but" in refusal(own_file, path, "pairs", thumbs)
    chat = write(tmp_path, [CHAT], "chat.jsonl")
    assert f"but {chat} has pairs of conversations" in refusal(own_file, path, "pairs", chat)


def test_most_lines_say_what_a_file_holds(tmp_path):
    """One odd line at the top does not decide the form of the others."""
    path = write(tmp_path, [CHAT | {"system": "Be kind."}, *[GOOD] * 12])
    file = own_file(path, skip_bad=True)
    assert len(file.rows) == 12 and file.form == "texts"
    assert "line 1: pairs of conversations, but most are pairs of texts" in refusal(own_file, path)


def test_a_rated_log_gives_the_pairs_it_should(tmp_path, tokenizer, capsys):
    """Best against worst of each prompt; a prompt with one rating, or with equal ones, none."""
    said = [("q1", " a", 3), ("q2", " b", 1), ("q1 ", " c", 5), ("q1", " d", 1.5), ("q2", " e", 1)]
    said += [("q3", " f", 2), ("q4", " g", -1), ("q4", " h", 0), ("q1", " i", 5)]
    said.append(("q4", " j", -(10**400)))  # a number that no float holds
    records = [{"prompt": p, "response": r, "rating": x} for p, r, x in said]
    pairs = sum(own_file(write(tmp_path, records)).split(tokenizer, 64), [])
    assert sorted(pairs) == [("q1 ", " c", " d"), ("q4", " h", " j")]
    said = "10 rated responses to 4 prompts give 2 pairs; 1 prompts have one response, 1 none that"
    assert said in capsys.readouterr().out
    message = refusal(own_file(write(tmp_path, records[1:2])).split, tokenizer, 64)
    assert "no prompt has two responses of different ratings" in message


def test_the_length_of_answers_is_that_of_95_in_100(tmp_path, tokenizer):
    """Of 50 pairs 95 responses of three tokens (A, cat, end), 4 of five, and one of eight."""
    records = [{"prompt": f"{i}?", "chosen": " cat dog", "rejected": " dog cat"} for i in range(50)]
    for i in range(3):
        records[i]["chosen"] = " cat" * 4
    file = own_file(write(tmp_path, records))
    file.split(tokenizer, 64)
    assert file.learnt == {"conversations": False, "answer_tokens": 3}
    for i in range(3, 6):
        records[i]["chosen"] = " cat" * 4
    file = own_file(write(tmp_path, records))
    file.split(tokenizer, 64)
    assert file.learnt == {"conversations": False, "answer_tokens": 5}


THEIRS = {  # for each function of docs/own-data.md a file, what it is for, and the row it holds
    "Alpaca": (
        json.dumps([{"instruction": "Which pet?", "input": "", "output": "A cat."}], indent=1),
        "sft",
        CHAT_ROW[:2],
    ),
    "ShareGPT": (
        '{"conversations": [{"from": "human", "value": "Which pet?"}, '
        '{"from": "gpt", "value": "A cat."}]}\n',
        "sft",
        CHAT_ROW[:2],
    ),
    "Orca": (
        '{"system": "", "question": "Which pet?", "chosen": "A cat.", "rejected": "A dog."}\n',
        "pairs",
        CHAT_ROW,
    ),
    "CSV": (
        '\ufeffprompt,completion,rating\r\n"Which, say,\npet?",A cat.,4\r\n',
        "pairs",
        ("User: Which, say,\npet?\n\nAssistant:", " A cat.", 4.0),
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_conversions_in_the_docs_give_what_is_read(tmp_path, name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own-data.md").read_text(), re.S)
    frame, functions = blocks[0], dict(zip(THEIRS, blocks[1:], strict=True))
    content, wanted, row = THEIRS[name]
    theirs = write(tmp_path, content, "theirs" + (".csv" if name == "CSV" else ".json"))
    script = write(tmp_path, functions[name] + frame, "convert.py")
    converted = subprocess.run([sys.executable, script, theirs], stdout=subprocess.PIPE, check=True)
    assert rows_of(tmp_path, converted.stdout, wanted) == [row]
