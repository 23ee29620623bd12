"""Properties that hold for any text and any file, searched by hypothesis (`make test-peers`)."""

import contextlib
import gzip
import io
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
from lab import village
from lab.own import OwnFile

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
FIELDS = "prompt", "chosen", "rejected", "completion", "label", "rating", "messages", "system"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(tmp_path_factory.mktemp("properties") / "pairs.jsonl")


def read(path, wanted="pairs", skip_bad=False):
    """-> (the file's rows or None, how many were left out, what the refusal says)."""
    config = SimpleNamespace(skip_bad=skip_bad, max_bad=0.99)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            file = OwnFile(path, wanted, config)
        except SystemExit as stop:
            assert "\n" not in str(stop) and path in str(stop)
            return None, 0, str(stop)
    return file.rows, sum(map(len, file.left_out.values())), ""


anything = hypothesis.settings(deadline=None, derandomize=True, max_examples=300)
texts = st.text(max_size=12).filter(str.strip)
turns = st.tuples(st.sampled_from(["user", "assistant"]), texts).map(
    lambda turn: {"role": turn[0], "content": turn[1]}
)


def shapes(prompt, chosen, rejected):
    """The same pair in each shape -> [(record, row)]."""
    said = [{"role": "user", "content": prompt}]
    chat = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    templated = (
        f"User: {prompt.strip()}\n\nAssistant:",
        f" {chosen.strip()}",
        f" {rejected.strip()}",
    )
    record = dict(zip(("prompt", "chosen", "rejected"), (prompt, chosen, rejected)))
    whole = {"chosen": said + chat[0], "rejected": said + chat[1]}
    return [
        (record, (prompt, chosen, rejected)),
        (record | {"more": 1}, (prompt, chosen, rejected)),
        ({"prompt": said, "chosen": chat[0], "rejected": chat[1]}, templated),
        (whole, templated),
        (whole | {"prompt": prompt}, templated),
        (
            {"chosen": f"Q: x{chosen}", "rejected": f"Q: y{rejected}"},
            ("Q:", f" x{chosen}", f" y{rejected}"),
        ),
    ]


differing = st.tuples(texts, texts, texts).filter(lambda said: said[1].split() != said[2].split())
pairs = st.tuples(differing, st.integers(0, 5)).map(lambda x: shapes(*x[0])[x[1]][0])
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4) | turns,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner),
    max_leaves=6,
)
lines = st.one_of(
    st.binary(min_size=1, max_size=20).map(lambda b: b.replace(b"\n", b"")).filter(bytes.strip),
    json_values.map(lambda value: json.dumps(value).encode()),
    pairs.map(lambda record: json.dumps(record).encode()[:-1]),  # cut off
    pairs.map(lambda record: json.dumps(record).encode()),
)


@anything
@hypothesis.given(text=st.text())
def test_any_text_round_trips_and_scores_its_own_tokens(tokenizer, text):
    ids, mask = data.encode(tokenizer, "Why?", text)
    scored = [i for i, m in zip(ids, mask) if m]
    assert tokenizer.decode(scored[:-1]) == text and scored[-1] == tokenizer.eot_token
    assert max(scored[:-1], default=0) < tokenizer.eot_token  # no text can forge the end


@anything
@hypothesis.given(
    said=st.lists(differing, min_size=1, max_size=5),
    shape=st.integers(0, 5),
    form=st.integers(0, 3),
)
def test_good_records_load_in_order_and_whole(path, said, shape, form):
    """As lines, with empty ones between, as an array, compressed."""
    records, expected = zip(*(shapes(*texts)[shape] for texts in said))
    lines = [json.dumps(record, ensure_ascii=form > 0) for record in records]
    content = (
        "\n".join(lines),
        "\r\n \n".join(lines),
        "[" + ",\n".join(lines) + "]",
        "\n".join(lines),
    )
    content = content[form].encode()
    Path(path).write_bytes(gzip.compress(content) if form == 3 else content)
    rows, left_out, refused = read(path)
    assert [row for _, row in rows] == [*expected] and not left_out and not refused


@anything
@hypothesis.given(
    content=st.lists(lines, min_size=1, max_size=5), wanted=st.sampled_from(("sft", "pairs"))
)
def test_every_line_is_loaded_or_counted(path, content, wanted):
    Path(path).write_bytes(b"\n".join(content))
    rows, _, refused = read(path, wanted)
    if rows:
        assert len(rows) == len(content) or isinstance(json.loads(Path(path).read_bytes()), list)
    elif "bad lines: " in refused:
        bad = int(refused.split("bad lines: ")[1].split(".")[0])
        rows, left_out, refused = read(path, wanted, skip_bad=True)
        assert left_out == bad and len(rows) + bad == len(content) if rows else bad >= 1
    else:  # another kind of file
        assert any(
            said in refused
            for said in ("is no JSON array", "is CSV", "cannot read", "UTF-16", "it is empty")
        )


@anything
@hypothesis.given(content=st.binary(max_size=200))
def test_any_bytes_load_or_give_one_line(path, content):
    Path(path).write_bytes(content)
    rows, _, refused = read(path)
    assert rows or refused


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@hypothesis.settings(deadline=None, derandomize=True, max_examples=30)
@hypothesis.given(content=st.lists(lines, max_size=5).map(b"\n".join))
def test_a_pipe_gives_what_the_file_gives(path, content):
    Path(path).write_bytes(content)
    from_file, pipe = read(path, skip_bad=True), f"{path}.pipe"
    if not os.path.exists(pipe):
        os.mkfifo(pipe)
    writer = threading.Thread(target=Path(pipe).write_bytes, args=[content])
    writer.start()
    rows, left_out, refused = read(pipe, skip_bad=True)
    writer.join()
    assert (rows, left_out, refused.replace(pipe, path)) == from_file


def test_a_hundred_thousand_lines_load_in_six_seconds(tokenizer, path):
    """Processor time, and so with room: an idle core needs less than half of it."""
    prompts = list(village.QUESTIONS)
    with open(path, "w") as file:
        for i in range(100_000):
            prompt = prompts[i % len(prompts)]
            good, bad = [*village.responses(prompt)][i % 647 :][:2]
            record = {"prompt": prompt, "chosen": good, "rejected": bad}
            file.write(json.dumps(record) + "\n")
    started = time.process_time()
    file = OwnFile(path, "pairs", SimpleNamespace(skip_bad=False, max_bad=0.1))
    train, held_out = file.split(tokenizer, 128)
    assert len(train) + len(held_out) == 100_000
    assert time.process_time() - started < 6
