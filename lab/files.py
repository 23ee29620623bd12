"""What people bring: a text to pretrain on, and files of one JSON object a line.

A line that cannot be used is refused with file, line number and reason. One prompt in ten is held
out, with all its lines, so that nothing that is measured on them has been seen in training.
"""

import contextlib
import json
import math

import data


def text_of(record: dict, field: str) -> str:
    """A field's text: a string, or a list of one {"role", "content"} message."""
    if field not in record:
        raise ValueError(f'no "{field}"')
    text = record[field]
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):
        text = text[0].get("content")
    if not isinstance(text, str):
        raise ValueError(f'"{field}" is neither a string nor a list of one message')
    if not text.strip():
        raise ValueError(f'"{field}" is empty')
    text.encode()  # half of a surrogate pair is a ValueError too
    return text


def value_of(record: dict, field: str):
    """A field as check_line() wants it: a "label" is true or false, a "rating" a number."""
    if field not in ("label", "rating"):
        return text_of(record, field)
    value = record.get(field)
    if field == "label" and not isinstance(value, bool):
        raise ValueError('"label" is neither true nor false')
    if field == "rating" and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError('"rating" is no number')
    if not abs(value) < math.inf:
        raise ValueError('"rating" is not finite')
    return value


FORMATS = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "completion", "label"),  # a thumb up or down
    ("prompt", "response", "rating"),  # a log of what was said, and how it was liked
)


def fields_of(path: str) -> tuple[str, str, str]:
    """Which of the formats a preference file has, by the first line that has any."""
    try:
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):  # read_jsonl() will name it
                    record = json.loads(line.decode("utf-8-sig"))
                    for fields in FORMATS:
                        if isinstance(record, dict) and {*fields} <= {*record}:
                            return fields
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    return FORMATS[0]


def pairs_from_ratings(rows: list[tuple], path: str) -> list[tuple]:
    """(prompt, response, rating) -> (prompt, chosen, rejected): a prompt's best against its worst.

    Among equal ratings the first line counts. A prompt with a single rating makes no pair.
    """
    by_prompt = {}
    for prompt, response, rating in rows:
        by_prompt.setdefault(prompt, []).append((rating, response))
    pairs = []
    for prompt, rated in by_prompt.items():
        best, worst = max(rated, key=lambda r: r[0]), min(rated, key=lambda r: r[0])
        if best[0] > worst[0] and best[1] != worst[1]:
            pairs.append((prompt, best[1], worst[1]))
    counts = f"{len(rows)} rated responses to {len(by_prompt)} prompts give {len(pairs)} pairs"
    print(f"{path}: {counts}")
    if not pairs:
        raise SystemExit(f"{path}: no prompt has two responses of different ratings")
    return pairs


def read_jsonl(path: str, fields: tuple, tokenizer, block_size: int, skip_bad=False) -> list[tuple]:
    """Every line's values, in the order of `fields`: a prompt first, then what was said to it.

    A bad line ends the run with file, line number and reason, or with skip_bad is counted and
    left out. Without a tokenizer, lengths are not checked yet.
    """
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    good, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                good.append(check_line(line, fields, tokenizer, block_size))
        except (ValueError, RecursionError) as error:
            bad.append(f"{path}, line {number}: {error}")
    if bad and not skip_bad:
        raise SystemExit(f"{bad[0]}; bad lines: {len(bad)}. Mend them, or pass --skip-bad")
    if not good:
        raise SystemExit(f"{path}: no usable line among {len(bad)} bad ones")
    if bad and tokenizer:
        print(f"{path}: {len(bad)} bad lines left out, the first: {bad[0]}")
    return good


def check_line(line: bytes, fields: tuple, tokenizer, block_size: int) -> tuple:
    """One line's values. Raises ValueError with the reason if it cannot be used."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    prompt, *rest = values = tuple(value_of(record, field) for field in fields)
    if len(set(rest)) < len(rest):
        raise ValueError('"chosen" equals "rejected"')
    for field, response in zip(fields[1:], rest):
        if not tokenizer or not isinstance(response, str):
            continue
        length = len(data.encode(tokenizer, prompt, response)[0])
        if length > block_size:
            raise ValueError(f'prompt and "{field}" take {length} tokens, the model {block_size}')
    return values


def hold_out(rows: list[tuple], path: str) -> tuple[list[tuple], list[tuple]]:
    """-> (rows to train on, rows held out: those of every tenth prompt). A prompt is row[0]."""
    prompts = list(dict.fromkeys(row[0] for row in rows))
    if len(prompts) < 2:
        raise SystemExit(f"{path}: one prompt is too few, since one in every ten is held out")
    kept_back = set(prompts[1::10])
    return tuple([row for row in rows if (row[0] in kept_back) == held] for held in (False, True))


def own_corpus(path: str) -> tuple[list[str], list[str]]:
    """A file to pretrain on -> (nine tenths of it, the last tenth), each a list of one text."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: not UTF-8 at byte {error.start}")
    border = len(text) * 9 // 10
    return [text[:border]], [text[border:]]


def own_demonstrations(config, tokenizer) -> tuple[list[tuple], list[tuple]]:
    """A file to fine-tune on -> ((prompt, response) texts, those held out)."""
    fields = ("prompt", "response")
    lines = read_jsonl(config.sft, fields, tokenizer, config.block_size, config.skip_bad)
    return hold_out(lines, config.sft)


def own_preferences(config, tokenizer, block_size: int) -> tuple[list[tuple], list[tuple]]:
    """A preference file -> (rows, rows held out), of texts (prompt, chosen, rejected), or of
    (prompt, completion, whether it is liked)."""
    fields = fields_of(config.pairs)
    if fields[-1] == "label" and getattr(config, "loss", "dpo") != "kto":
        raise SystemExit(
            f"{config.pairs} has labels of single responses, which make no pairs: train on it with "
            "python variants/train_variant.py --loss kto"
        )
    rows = read_jsonl(config.pairs, fields, tokenizer, block_size, config.skip_bad)
    if fields[-1] == "rating":
        rows = pairs_from_ratings(rows, config.pairs)
    return hold_out(rows, config.pairs)
