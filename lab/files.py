"""Reads what people bring: texts to pretrain on, files of demonstrations or preferences.

A file has a JSON object on each line, or is a JSON array of objects; gzip is unpacked. It is opened
once, so that it may be a pipe. Every object, a record, becomes a row:

    demonstrations  (prompt, response)          from "messages", or "prompt" and "completion"
    pairs           (prompt, chosen, rejected)  from "chosen" and "rejected", and "prompt" or not
    thumbs          (prompt, response, liked)   from "prompt", "completion" and "label"
    ratings         (prompt, response, rating)  from "prompt", "completion" and "rating"

Texts are kept as they are. A conversation becomes texts by data.apply_template(), and so does what
has a "system" beside it. "response" may stand for "completion". All else is refused with a reason.
"""

import gzip
import json
import math
import os
import re
import zlib

import data

WANTED = {
    "sft": '"messages", or "prompt" and "completion"',
    "pairs": '"chosen" and "rejected", with "prompt" or without; or "prompt", "completion" and '
    '"label" or "rating"',
}
NEAREST = {  # fields of other formats -> what to do
    "instruction": 'Alpaca\'s: join it and "input" to a "prompt", and call "output" "completion"',
    "conversations": 'ShareGPT\'s: call it "messages" or "prompt", with "role" and "content"',
    "preferred_output": 'OpenAI\'s: call it "chosen", the other "rejected", its messages "prompt"',
    "conversation_a": 'an arena\'s: call the one that won "chosen", the other "rejected"',
    "question": 'Orca\'s: call it "prompt"',
    "query": 'to be called "prompt"',
    "input": 'to be called "prompt"',
}
ELSEWHERE = {
    "sft": {"chosen": "for train_dpo.py --pairs", "text": "for --corpus, as a mere text"},
    "pairs": dict.fromkeys(("messages", "completion", "response"), "for train_sft.py --sft"),
}
BY_ROWS = "write JSON lines, as pandas does with to_json(orient='records', lines=True)"
FOREIGN = {  # how a file begins -> what it is
    b"PAR1": f"Parquet: {BY_ROWS}",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}
NO_PROMPT = "texts without a prompt"
VALUES = {"thumbs": ("label",), "ratings": ("rating",)}
HOLDS_JSON = re.compile(r"""\s*(\[\s*\{\s*["'](role|content|from)|\{\s*["']role)["']\s*:""")
# A transcript says at the beginning of a line whose turn it is.
ASSISTANT = re.compile(r"^(?:### ?)?assistant:", re.I | re.M)


def listed(fields) -> str:
    return ", ".join(f'"{str(name)[:40]}"' for name in [*fields][:12]) or "none"


def excerpt(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"


def read_bytes(path: str) -> bytes:
    """What a file holds, unpacked."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")
    for start, what in FOREIGN.items():
        if content.startswith(start):
            raise SystemExit(f"{path} is {what}")
    return content


def read_records(path: str, wanted: str) -> list[tuple]:
    """-> of each record (where it stands, a line's bytes or an array's element)."""
    content = read_bytes(path)
    try:
        whole = json.loads(content, object_pairs_hook=fields_once)
        if isinstance(whole, list):
            return [(f"record {i}", record) for i, record in enumerate(whole, 1)]
        return [("line 1", whole)]
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith(b"[") and not str(error).startswith("Extra data"):
            raise SystemExit(f"{path} is no JSON array: {error}")
    lines = [(f"line {i}", b) for i, b in enumerate(content.splitlines(), 1) if b.strip()]
    head = lines[0][1].decode(errors="replace") if lines else ""
    columns = [name.strip(' "\ufeff') for name in re.split("[,;\t]", head.strip())]
    known = {"prompt", "chosen", "rejected", "completion", "response", "messages", *NEAREST}
    if known & {*columns}:
        raise SystemExit(f"{path} is CSV of {listed(columns)}; give JSON with {WANTED[wanted]}")
    return lines


def fields_once(fields: list[tuple]) -> dict:
    """A JSON object. Refuses a field that stands there twice: json would drop the first."""
    if len(fields) > len({name for name, _ in fields}):
        raise ValueError(f"a field stands there twice: {listed(name for name, _ in fields)}")
    return dict(fields)


def parse(line: bytes):
    """A line of JSON -> its value. Raises ValueError, which says what is wrong."""
    try:
        text = line.decode("utf-8-sig").strip()
        return json.loads(text, object_pairs_hook=fields_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at its byte {error.start}: save the file as UTF-8")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.startswith("{"):
            first, end = json.JSONDecoder().raw_decode(text)
            if text[end:].strip() == ",":
                raise ValueError("a comma after the object: take it out, or put the file in [ ]")
            raise ValueError(f"several objects, the first with {listed(first)}; give one per line")
        hint = ": put each object on one line, or all in [ ]" if text == "{" else ""
        raise ValueError(f"not JSON ({error.msg}){hint}")


def kind_of(record: dict, wanted: str) -> tuple[str, list[str]]:
    """-> what a record is, and the fields of its texts but the prompt."""
    answers = [name for name in ("completion", "response") if name in record][:1]
    values = [kind for kind, (name,) in VALUES.items() if name in record]
    has_prompt, nearest = "prompt" in record, {*NEAREST} & {*record}
    if wanted == "sft" and "messages" in record:
        return "demonstrations", ["messages"]
    if wanted == "sft" and has_prompt and answers:
        return "demonstrations", answers
    if wanted == "pairs" and {"chosen", "rejected"} <= {*record} and (has_prompt or not nearest):
        return "pairs", ["chosen", "rejected"]
    if wanted == "pairs" and has_prompt and answers and values:
        return values[0], answers
    hints = (NEAREST | ELSEWHERE[wanted]).items()
    hint = next((f'; "{name}" is {hint}' for name, hint in hints if name in record), "")
    if record and all(isinstance(value, (list, dict)) for value in record.values()):
        hint = hint or f"; it is one object of many rows: {BY_ROWS}"
    raise ValueError(f"the fields are {listed(record)}{hint}; wanted are {WANTED[wanted]}")


def check_text(text, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f'"{name}" has {excerpt(text)}, which is no text')
    if not text.strip():
        raise ValueError(f'"{name}" is empty')
    text.encode()  # half of a surrogate pair is a ValueError too
    if data.END in text:
        raise ValueError(f'"{name}" spells out {data.END}, which is added by itself: take it out')
    if HOLDS_JSON.match(text):
        raise ValueError(f'"{name}" is a string that holds JSON messages: unpack them')
    return text


def turns_of(value, name: str, role: str) -> list[dict]:
    """A conversation -> its turns, checked. A text is a single turn of `role`."""
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        cure = ": put it in [ ]" * isinstance(turns, dict)
        what = "neither a text nor a list of turns" + cure
        raise ValueError(f'"{name}" has {excerpt(turns)}, which is {what}')
    for turn in turns:
        if not {"role", "content"} <= {*turn}:
            raise ValueError(f'a turn of "{name}" has {listed(turn)}; wanted are "role", "content"')
        if turn["role"] not in [*data.ROLES]:
            role = listed([turn["role"]])
            raise ValueError(f'"{name}" has a turn of {role}; there are {listed(data.ROLES)}')
    return [{"role": t["role"], "content": check_text(t["content"], name).strip()} for t in turns]


def conversation_row(record: dict, fields: list[str]) -> tuple[str, ...]:
    """-> (prompt, the last turn of each field), through the template."""
    prompt = record.get("prompt")
    prompt = [] if prompt is None else turns_of(prompt, "prompt", "user")
    sides = [turns_of(record[name], name, "assistant") for name in fields]
    for name, side in zip(fields, sides):
        last = [turn["role"] for turn in side[-1:]]
        if last != ["assistant"]:
            raise ValueError(f'"{name}" ends with a turn of {listed(last)}, not of "assistant"')
    before = sides[0][:-1]
    if sides[-1][:-1] != before:
        raise ValueError("the conversations differ before their last turns")
    if before and not all(turn in before for turn in prompt):
        raise ValueError(f'"{fields[0]}" is a conversation that does not repeat "prompt"')
    turns = before or prompt
    last = [turn["role"] for turn in turns[-1:]]
    if last != ["user"]:
        raise ValueError(f'the prompt ends with a turn of {listed(last)}, not of "user"')
    if record.get("system"):
        turns = [{"role": "system", "content": check_text(record["system"], "system")}, *turns]
    if "system" in [turn["role"] for turn in turns[1:]]:
        raise ValueError('a turn of "system" may only be the first')
    return data.apply_template(turns, *(side[-1]["content"] for side in sides))


def split_texts(texts: list[str], fields: list[str]) -> tuple[str, ...]:
    """Texts without a prompt -> (their common beginning, what follows it in each).

    It ends where the last answer of a transcript begins, or else before a word.
    """
    common = os.path.commonprefix(texts)
    ends = {max((mark.end() for mark in ASSISTANT.finditer(text)), default=0) for text in texts}
    words = len(texts) > 1 and re.match(r".*\S(?=\s)", common, re.S)
    end = max(ends) or (words.end() if words else 0)
    if not end:
        raise ValueError('there is neither a "prompt" nor a word with which both texts begin')
    if len(ends) > 1 or end > len(common):
        raise ValueError("the transcripts differ before their last answers")
    return common[:end], *(check_text(text[end:], name) for text, name in zip(texts, fields))


def value_of(record: dict, kind: str) -> tuple:
    """-> (liked,) of thumbs, (rating,) of ratings, () of all else."""
    values = [record[name] for name in VALUES.get(kind, ())]
    for value in values:
        is_number = isinstance(value, (int, float)) and abs(value) < math.inf
        if kind == "thumbs" and (not is_number or value not in (0, 1)):
            raise ValueError(f'"label" is {excerpt(value)}, neither true nor false')
        if kind == "ratings" and (not is_number or isinstance(value, bool)):
            raise ValueError(f'"rating" is {excerpt(value)}, no finite number')
    return tuple(bool(value) if kind == "thumbs" else value for value in values)


def read_record(record, wanted: str) -> tuple:
    """A line's bytes, or an object -> its kind, the form of its texts, its row, and the fields that
    were not read. Raises ValueError, with the reason, where it cannot be used.
    """
    record = parse(record) if isinstance(record, bytes) else record
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    kind, fields = kind_of(record, wanted)
    texts, prompt = [record[name] for name in fields], record.get("prompt")
    if "system" in record or any(isinstance(text, list) for text in [*texts, prompt]):
        form, row = "conversations", conversation_row(record, fields)
    elif prompt is None:
        form, row = NO_PROMPT, split_texts([*map(check_text, texts, fields)], fields)
    else:
        form, row = "texts", (*map(check_text, [prompt, *texts], ["prompt", *fields]),)
    if kind == "pairs" and row[1].split() == row[2].split():
        raise ValueError('"chosen" equals "rejected"' + " but for white space" * (row[1] != row[2]))
    read = {"prompt", "system", *fields, *VALUES.get(kind, ())}
    unread = [name for name in record if name not in read]
    for name in ("prompt", *fields):
        turns = record.get(name) if isinstance(record.get(name), list) else []
        inner = [field for turn in turns for field in turn if field not in ("role", "content")]
        unread += [f"{field} in {name}" for field in inner]
    return kind, form, row + value_of(record, kind), unread
