"""Properties that hold for any text and any file, searched by hypothesis (`make test-peers`)."""

import contextlib
import io
import json
import time

import pytest

import data
from lab import files, village

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
PAIR = ("prompt", "chosen", "rejected")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(tmp_path_factory.mktemp("properties") / "pairs.jsonl")


anything = hypothesis.settings(deadline=None, derandomize=True, max_examples=300)
texts = st.text(max_size=12).filter(str.strip)
records = st.fixed_dictionaries(
    dict.fromkeys(PAIR, texts), optional={"label": st.booleans(), "more": st.integers()}
).filter(lambda record: record["chosen"] != record["rejected"])
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PAIR), inner),
    max_leaves=6,
)
junk = st.one_of(
    st.binary(min_size=1, max_size=20).map(lambda b: b.replace(b"\n", b"")).filter(bytes.strip),
    json_values.map(lambda value: json.dumps(value).encode()),
    records.map(lambda record: json.dumps(record).encode()[:-1]),  # cut off
)


@anything
@hypothesis.given(text=st.text())
def test_any_text_round_trips_and_scores_its_own_tokens(tokenizer, text):
    ids, mask = data.encode(tokenizer, "Why?", text)
    scored = [i for i, m in zip(ids, mask) if m]
    assert tokenizer.decode(scored[:-1]) == text and scored[-1] == tokenizer.eot_token
    assert max(scored[:-1], default=0) < tokenizer.eot_token  # no text can forge the end


@anything
@hypothesis.given(rows=st.lists(records, min_size=1, max_size=5), blank=st.booleans())
def test_good_lines_load_in_order_and_whole(tokenizer, path, rows, blank):
    lines = [json.dumps(row, ensure_ascii=len(row) > 3) for row in rows]
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(("\r\n \n" if blank else "\n").join(lines))
    loaded = files.read_jsonl(path, PAIR, tokenizer, 512)
    assert loaded == [tuple(row[field] for field in PAIR) for row in rows]


@anything
@hypothesis.given(
    lines=st.lists(junk | records.map(lambda r: json.dumps(r).encode()), min_size=1, max_size=5),
    fields=st.sampled_from(files.FORMATS),
)
def test_every_line_is_loaded_or_counted(tokenizer, path, lines, fields):
    with open(path, "wb") as file:
        file.write(b"\n".join(lines))
    files.fields_of(path)
    try:
        assert len(files.read_jsonl(path, fields, tokenizer, 512)) == len(lines)
    except SystemExit as stop:
        message = str(stop)
        assert "\n" not in message and "line " in message
        bad = int(message.split("bad lines: ")[1].split(".")[0])
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                good = files.read_jsonl(path, fields, tokenizer, 512, skip_bad=True)
            assert len(good) + bad == len(lines) and f"{bad} bad lines" in said.getvalue()
        except SystemExit as stop:
            assert bad == len(lines) and "\n" not in str(stop)


@anything
@hypothesis.given(content=st.binary(max_size=200))
def test_any_bytes_load_or_give_one_line(tokenizer, path, content):
    with open(path, "wb") as file:
        file.write(content)
    try:
        assert files.read_jsonl(path, files.fields_of(path), tokenizer, 512)
    except SystemExit as stop:
        assert "\n" not in str(stop) and path in str(stop)


def test_a_hundred_thousand_lines_load_in_five_seconds(tokenizer, path):
    """Wall clock, and so with room: an idle core needs a third of it."""
    prompts = list(village.QUESTIONS)
    with open(path, "w") as file:
        for i in range(100_000):
            prompt = prompts[i % len(prompts)]
            good, bad = [*village.responses(prompt)][i % 647 :][:2]
            file.write(json.dumps(dict(zip(PAIR, (prompt, good, bad)))) + "\n")
    started = time.process_time()
    assert len(files.read_jsonl(path, PAIR, tokenizer, 128)) == 100_000
    assert time.process_time() - started < 5
