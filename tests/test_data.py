"""data.py: the reward, the tokenizer, ids and mask, and what happens to other people's files."""

import json
import math

import pytest

import data

# --- The village --------------------------------------------------------------------------------


def test_reward_by_hand():
    job, pet = data.TRUTH["Mara", "job"], data.TRUTH["Mara", "pet"]
    wrong = next(value for value in data.VALUES["job"] if value != job)
    prompt = "What does Mara do for work?"
    for response, expected in [
        (f" Gladly! Mara is a {job}. Take care!", 3),
        (f" Mara is a {job}.", 1),
        (f" Mara is a {wrong}.", -1),
        (f" Well, Mara is a {job}. That is all.", 1),
        (f" Ugh. Mara is a {job}. Have fun!", 1),
        (f" Not again. Mara is a {wrong}. Go away.", -3),
        (f" Mara keeps a {pet}.", -3),  # true, but no answer to this question
        (f" Nils is a {job}.", -3),
        (f" Gladly! Gladly! Mara is a {job}.", -3),
        (f"Mara is a {job}.", -3),
        (" Gladly! Take care!", -3),
        ("", -3),
    ]:
        assert data.reward(prompt, response) == expected, response


def test_the_grammar_has_648_different_responses_a_question():
    for prompt in data.QUESTIONS:
        responses = data.responses(prompt)
        assert len(responses) == 9 * 8 * 9
        assert sum(reward == 3 for reward in responses.values()) == 3 * 1 * 3


def test_questions_are_split_without_a_leak():
    train, held_out, never = data.split_questions()
    assert len({*train, *held_out, *never}) == len(train) + len(held_out) + len(never)
    facts = [{data.QUESTIONS[q] for q in part} for part in (train, held_out, never)]
    assert facts[0] == facts[1] and not facts[0] & facts[2]
    assert not {prompt for prompt, _ in data.demonstrations(train, 500, 0)} - {*train}


def test_demonstrations_are_wrong_one_time_in_five():
    train, *_ = data.split_questions()
    demos = data.demonstrations(train, 4000, seed=0)
    wrong = sum(
        not any(answer in text for answer, side in data.answers(prompt).items() if side == 1)
        for prompt, text in demos
    )
    assert abs(wrong / 4000 - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 4000)  # five standard errors
    assert all(text in data.responses(prompt) for prompt, text in demos)
    assert data.demonstrations(train, 50, seed=1) == data.demonstrations(train, 50, seed=1)


# --- Tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", " Gladly!", "Où? 日本 🙂\u200d\n\t x", "<|endoftext|>", "\x00\r\n  _1", "Aé\u0301"]
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    copy = data.build_tokenizer(**data.tokenizer_state(tokenizer))
    assert copy.encode_ordinary(text) == tokenizer.encode_ordinary(text)
    assert copy.eot_token == tokenizer.eot_token


def test_every_word_of_the_village_is_one_token(tokenizer):
    prompt = "What does Mara do for work?"
    for response in data.responses(prompt):
        words = response.replace(",", " ,").replace(".", " .").replace("!", " !").replace("?", " ?")
        assert len(tokenizer.encode_ordinary(response)) == len(words.split())


def test_ids_and_mask_by_hand(tokenizer):
    ids, mask = data.encode(tokenizer, "Which pet?", " Ugh.")
    assert [tokenizer.decode([i]) for i in ids] == ["Which", " pet", "?", " Ugh", ".", data.END]
    assert mask == [False, False, False, True, True, True]


def test_the_border_between_prompt_and_response_is_exact(tokenizer):
    """Tokenised together, "Ma" + "ra" would be other tokens than apart."""
    ids, mask = data.encode(tokenizer, " Ma", "ra")
    assert ids[:-1] == tokenizer.encode_ordinary(" Ma") + tokenizer.encode_ordinary("ra")
    assert ids[:-1] != tokenizer.encode_ordinary(" Mara")
    assert tokenizer.decode([i for i, scored in zip(ids, mask) if scored]) == "ra" + data.END


def test_collate_by_hand():
    ids, mask = data.collate(
        [([5, 6, 7, 0], [False, False, True, True]), ([5, 0], [False, True])], 9
    )
    assert ids.tolist() == [[5, 6, 7, 0], [5, 0, 9, 9]]
    assert mask.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_batches_see_everything_once_an_epoch():
    batches = list(data.batches(count=10, batch_size=4, steps=5, seed=0))
    flat = [i for batch in batches for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]


def test_a_text_too_small_for_the_vocabulary_names_a_size_that_works():
    with pytest.raises(ValueError, match="too few words for 400 tokens: 259 would do"):
        data.train_tokenizer("on an on", 400)
    assert data.train_tokenizer("on an on", 259).n_vocab == 260


# --- Preference files ---------------------------------------------------------------------------

GOOD = {"prompt": "Which pet?", "chosen": " A cat.", "rejected": " A dog."}
FIELDS = ("prompt", "chosen", "rejected")


def read(tmp_path, tokenizer, content, **options):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.read_jsonl(str(path), FIELDS, tokenizer, block_size=32, **options)


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
    train, held_out = data.hold_out(rows, "pairs.jsonl")
    assert sorted(train + held_out) == sorted(rows)
    assert {prompt for prompt, _ in held_out} == {"prompt 1", "prompt 11", "prompt 21"}
    assert not {prompt for prompt, _ in held_out} & {prompt for prompt, _ in train}
    with pytest.raises(SystemExit, match=r"pairs.jsonl: one prompt is too few"):
        data.hold_out([("a", 1), ("a", 2)], "pairs.jsonl")
    assert data.hold_out([("a", 1), ("b", 2)], "pairs.jsonl") == ([("a", 1)], [("b", 2)])


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
    fields = data.fields_of(path)
    rows = data.read_jsonl(path, fields, None, 64)
    assert fields == ("prompt", "response", "rating") and rows == said
    pairs = data.pairs_from_ratings(rows, path)
    assert pairs == [("q1", " c", " d"), ("q4", " h", " j")]
    assert "10 rated responses to 4 prompts give 2 pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no prompt has two responses of different ratings"):
        data.pairs_from_ratings(rows[1:2], path)


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
        data.read_jsonl(path, data.fields_of(path), None, 64)
