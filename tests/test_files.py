"""lab/files.py: what happens to other people's files."""

import json
from types import SimpleNamespace

import pytest

from lab import files

GOOD = {"prompt": "Which pet?", "chosen": " A cat.", "rejected": " A dog."}
FIELDS = ("prompt", "chosen", "rejected")


def read(tmp_path, tokenizer, content, **options):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return files.read_jsonl(str(path), FIELDS, tokenizer, block_size=32, **options)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (b"\xff{}", "can't decode byte 0xff"),
        (b"[" * 100_000, "recursion"),
        (GOOD | {"chosen": None}, '"chosen" is neither a string nor a list of one message'),
        (GOOD | {"chosen": 7}, '"chosen" is neither'),
        (GOOD | {"chosen": [{"role": "assistant"}]}, '"chosen" is neither'),
        (GOOD | {"chosen": [{"content": "a"}, {"content": "b"}]}, '"chosen" is neither'),
        ({"prompt": "a", "chosen": "b"}, 'no "rejected"'),
        (GOOD | {"prompt": ""}, '"prompt" is empty'),
        (GOOD | {"rejected": " \n"}, '"rejected" is empty'),
        (GOOD | {"rejected": " A cat."}, '"chosen" equals "rejected"'),
        (GOOD | {"rejected": " cat" * 40}, 'prompt and "rejected" take 44 tokens, the model 32'),
        (GOOD | {"chosen": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named_and_stops_the_run(tmp_path, tokenizer, line, reason):
    if isinstance(line, dict):
        line = json.dumps(line)
    line = line if isinstance(line, bytes) else line.encode()
    content = json.dumps(GOOD).encode() + b"\n\n" + line + b"\n"
    with pytest.raises(SystemExit) as stop:
        read(tmp_path, tokenizer, content)
    message = str(stop.value)
    assert "pairs.jsonl, line 3: " in message and reason in message and "--skip-bad" in message
    assert "\n" not in message


def test_skip_bad_counts_and_goes_on(tmp_path, tokenizer, capsys):
    lines = [json.dumps(GOOD), "{", json.dumps(GOOD | {"chosen": ""}), json.dumps(GOOD)]
    pairs = read(tmp_path, tokenizer, "\n".join(lines), skip_bad=True)
    assert pairs == 2 * [tuple(GOOD.values())]
    assert "2 bad lines left out" in capsys.readouterr().out


def test_a_file_without_a_usable_line_stops_the_run(tmp_path, tokenizer):
    for content, options in (("", {}), ("\n \n", {}), ("{", {"skip_bad": True})):
        with pytest.raises(SystemExit, match="no usable line"):
            read(tmp_path, tokenizer, content, **options)


def test_utf8_blank_lines_windows_ends_and_a_last_line_without_end_are_fine(tmp_path, tokenizer):
    pair = GOOD | {"prompt": "Où est 🙂?"}
    text = "\ufeff" + json.dumps(GOOD) + "\r\n\r\n   \n" + json.dumps(pair, ensure_ascii=False)
    assert read(tmp_path, tokenizer, text) == [tuple(GOOD.values()), tuple(pair.values())]


def test_messages_are_read_as_their_content(tmp_path, tokenizer):
    roles = dict(zip(FIELDS, ("user", "assistant", "assistant")))
    chat = {name: [{"role": roles[name], "content": text}] for name, text in GOOD.items()}
    assert read(tmp_path, tokenizer, json.dumps(chat)) == [tuple(GOOD.values())]


def test_a_pair_that_just_fits_is_kept_whole(tmp_path, tokenizer):
    pair = GOOD | {"chosen": " cat" * 28}  # 3 tokens of prompt + 28 + end-of-text = the block of 32
    assert read(tmp_path, tokenizer, json.dumps(pair))[0][1] == " cat" * 28


def test_held_out_pairs_share_no_prompt_with_the_others():
    rows = [(f"prompt {i % 25}", i) for i in range(60)]
    train, held_out = files.hold_out(rows, "pairs.jsonl")
    assert sorted(train + held_out) == sorted(rows)
    assert {prompt for prompt, _ in held_out} == {"prompt 1", "prompt 11", "prompt 21"}
    assert not {prompt for prompt, _ in held_out} & {prompt for prompt, _ in train}
    with pytest.raises(SystemExit, match=r"pairs.jsonl: one prompt is too few"):
        files.hold_out([("a", 1), ("a", 2)], "pairs.jsonl")
    assert files.hold_out([("a", 1), ("b", 2)], "pairs.jsonl") == ([("a", 1)], [("b", 2)])


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_rated_log_gives_the_pairs_it_should(tmp_path, capsys):
    """Best against worst of each prompt; a prompt with one rating, or with equal ones, none."""
    said = [("q1", " a", 3), ("q2", " b", 1), ("q1", " c", 5), ("q1", " d", 1.5), ("q2", " e", 1)]
    said += [("q3", " f", 2), ("q4", " g", -1), ("q4", " h", 0), ("q1", " i", 5)]
    said.append(("q4", " j", -(10**400)))  # a number that no float holds
    path = write_lines(
        tmp_path / "log.jsonl", [{"prompt": p, "response": r, "rating": x} for p, r, x in said]
    )
    fields = files.fields_of(path)
    rows = files.read_jsonl(path, fields, None, 64)
    assert fields == ("prompt", "response", "rating") and rows == said
    pairs = files.pairs_from_ratings(rows, path)
    assert pairs == [("q1", " c", " d"), ("q4", " h", " j")]
    assert "10 rated responses to 4 prompts give 2 pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no prompt has two responses of different ratings"):
        files.pairs_from_ratings(rows[1:2], path)


def test_labels_of_single_responses_are_refused_by_dpo_and_taken_by_kto(tmp_path, tokenizer):
    rows = [{"prompt": f"q{i}", "completion": " a", "label": i > 1} for i in range(4)]
    path = write_lines(tmp_path / "log.jsonl", rows)
    config = SimpleNamespace(pairs=path, skip_bad=False, loss="kto")
    train, held_out = files.own_preferences(config, tokenizer, 64)
    assert sorted(train + held_out) == [(f"q{i}", " a", i > 1) for i in range(4)]
    del config.loss
    with pytest.raises(SystemExit, match="log.jsonl has labels .* --loss kto"):
        files.own_preferences(config, tokenizer, 64)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "q", "completion": "a", "label": 1}, '"label" is neither true nor false'),
        ({"prompt": "q", "response": "a", "rating": "5"}, '"rating" is no number'),
        ({"prompt": "q", "response": "a", "rating": True}, '"rating" is no number'),
        ({"prompt": "q", "response": "a", "rating": float("nan")}, '"rating" is not finite'),
        ({"prompt": "q", "response": " ", "rating": 1}, '"response" is empty'),
    ],
)
def test_a_bad_thumb_or_rating_is_named(tmp_path, row, message):
    path = write_lines(tmp_path / "log.jsonl", [row])
    with pytest.raises(SystemExit, match=f"line 1: {message}"):
        files.read_jsonl(path, files.fields_of(path), None, 64)
