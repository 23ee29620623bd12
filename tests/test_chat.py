"""tools/chat.py: answers and their rewards, several checkpoints, the loop, mistakes."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, needs_unix

import data
import model as gpt
from lab import village
from tools import chat

QUESTION = "What does Mara do for work?"
KIND = f"Gladly! Mara is a {village.TRUTH['Mara', 'job']}. Have fun!"


@pytest.fixture
def parrots(tokenizer, monkeypatch):
    """Checkpoint -> the one text that it ever says: stand-ins for models."""
    texts = {}

    def load(path):
        ids, _ = data.encode(tokenizer, "", texts[path])
        say = lambda prompts, end, limit, *_, **__: [ids[:limit]]  # noqa: E731
        return SimpleNamespace(generate=say, learnt={}), tokenizer

    monkeypatch.setattr(chat.runs, "load_checkpoint", load)
    return texts


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """-> a function: write a checkpoint of random weights, and give its path."""

    def write(name):
        torch.manual_seed(0)
        model = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, 64, n_layer=1, n_head=1, n_embd=8))
        torch.nn.init.normal_(model.wte.weight, std=0.5)
        gpt.save(tmp_path / name, model, tokenizer=data.tokenizer_state(tokenizer))
        return str(tmp_path / name)

    return write


@pytest.fixture
def run(monkeypatch, capsys):
    """-> a function: what chat.py prints, given its arguments and what is typed."""

    def call(*arguments, typed=b""):
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        chat.main()
        return capsys.readouterr().out

    return call


def test_an_answer_has_its_true_reward_in_front(parrots, run):
    parrots["a.pt"] = " " + KIND
    assert run("a.pt", QUESTION) == f"+3  {KIND}\n"
    assert run("a.pt", f" {QUESTION}") == f"{KIND}\n"  # asked as it is, so another prompt
    assert run("a.pt", *QUESTION.split()) == f"+3  {KIND}\n"  # without quotes
    assert run("a.pt", "Who is there?") == f"{KIND}\n"  # nobody knows its reward


@pytest.mark.parametrize(
    "learnt, prompt, limit",
    [
        ({}, "  Who is it? ", 24),
        ({"conversations": False, "answer_tokens": 7}, "  Who is it? ", 7),
        ({"conversations": True, "answer_tokens": 9}, "User: Who is it?\n\nAssistant:", 9),
    ],
)
def test_a_question_is_asked_as_the_checkpoint_has_learnt(
    tokenizer, run, monkeypatch, learnt, prompt, limit
):
    """What is typed is kept; a model of conversations sees it as a user's turn."""
    asked = []

    def generate(prompts, end, limit, temperature, generator):
        asked.append((tokenizer.decode(prompts[0]), limit))
        return [[end]]

    model = SimpleNamespace(generate=generate, learnt=learnt)
    monkeypatch.setattr(chat.runs, "load_checkpoint", lambda path: (model, tokenizer))
    run("a.pt", "  Who is it? ")
    run("a.pt", typed=b"  Who is it? \n\n")
    run("a.pt", "  Who is it? ", "--max-new-tokens=3")
    assert asked == [(prompt, limit), (prompt, limit), (prompt, 3)]


def test_a_garbled_answer_and_one_cut_off_score_minus_three(parrots, run):
    parrots |= {"a.pt": f" {KIND}", "b.pt": f" {KIND} Ha"}
    assert run("b.pt", QUESTION) == f"-3  {KIND} Ha\n"
    # All that the grammar wants is there but for the end of the text.
    assert run("a.pt", QUESTION, "--max-new-tokens=10") == f"-3  {KIND} (cut off)\n"


def test_two_checkpoints_answer_side_by_side(parrots, run):
    parrots |= {"out/kind.pt": f" {KIND}", "rude.pt": " Ugh."}
    both = f"out/kind.pt  +3  {KIND}\nrude.pt      -3  Ugh.\n"
    assert run("out/kind.pt", "rude.pt", QUESTION) == both
    assert run("out/kind.pt", QUESTION, "--seed", 3, "rude.pt") == both  # wherever the rest stands


def test_answers_are_samples_that_the_seed_repeats(checkpoint, run, tokenizer):
    path, prompt = checkpoint("a.pt"), tokenizer.encode_ordinary(QUESTION)
    model, _ = gpt.load(path)
    ways = {"--seed=0": (1, 0), "--seed=5": (1, 5), "--temperature=0": (0, 0)}
    said = {}
    for flag, (temperature, seed) in ways.items():
        generator = torch.Generator().manual_seed(seed)
        (ids,) = model.generate([prompt], tokenizer.eot_token, 24, temperature, generator)
        said[flag] = run(path, QUESTION, flag)
        assert said[flag] == f"-3  {tokenizer.decode(ids).strip()} (cut off)\n"
    assert len({*said.values()}) == 3 and run(path, QUESTION) == said["--seed=0"]


def test_checkpoints_meet_the_same_chances_and_a_question_asked_again_meets_new_ones(
    checkpoint, run
):
    one, two = checkpoint("one.pt"), checkpoint("two.pt")
    typed = f"{QUESTION}\n{QUESTION}\n\n".encode()
    _, *twice = run(one, two, typed=typed).split("> ")
    (a, b), (c, d) = (turn.removeprefix(f"{one}  ").split(f"\n{two}  ") for turn in twice[:2])
    assert a.strip() == b.strip() != c.strip() == d.strip()


def test_the_loop_goes_on_after_a_question_too_long_and_ends_with_an_empty_line(checkpoint, run):
    typed = b"word " * 50 + b"\n" + QUESTION.encode() + b"\n\nnever read\n"
    _, refusal, answer, end = run(checkpoint("a.pt"), typed=typed).split("> ")
    assert "cannot answer: a prompt of " in refusal and refusal.count("\n") == 1
    assert answer.startswith("-3  ") and end == ""


@pytest.mark.parametrize("typed", [b"", QUESTION.encode() + b"\n", b"\xff\n"])
def test_the_loop_ends_cleanly_with_the_input(checkpoint, typed):
    command = [sys.executable, ROOT / "tools" / "chat.py", checkpoint("a.pt")]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8"}  # as on most desktops
    done = subprocess.run(command, input=typed, capture_output=True, env=strict)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.endswith(b"> \n")


@needs_unix
def test_ctrl_c_ends_it_cleanly(checkpoint):
    command = [sys.executable, ROOT / "tools" / "chat.py", checkpoint("a.pt")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.read(2) == b"> "  # it waits for a question
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == b"\n" and err == b""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{}", "word " * 50], "cannot answer: a prompt of .* do not fit the block size of 64"),
        (["{}", "hi", "--max-new-tokens=64"], "64 new ones do not fit"),
        (["{}", ""], "chat.py: the question is empty"),
        (["{}", " ", ""], "chat.py: the question is empty"),
        (["hi"], "chat.py: name a checkpoint"),
        ([], "chat.py: name a checkpoint"),
        (["nowhere.pt", "hi"], "there is no nowhere.pt"),
        (["{}", "nowhere.pt", "hi"], "there is no nowhere.pt"),
        (["foreign.pt", "hi"], "foreign.pt is not a whole checkpoint of this project"),
        (["folder.pt", "hi"], "cannot read folder.pt"),
        (["bare.pt", "hi"], "bare.pt: it has no tokenizer"),
        (["nan.pt", "hi"], "nan.pt cannot answer: the model's logits are not finite"),
        (["{}", "hi", "--temperature=-1"], "--temperature must be 0, or 0.01 or more, not -1"),
        (["{}", "hi", "--temperature=1e-40"], "--temperature must be"),
        (["{}", "hi", "--temperature=nan"], "--temperature must be"),
        (["{}", "hi", "--max-new-tokens=0"], "--max-new-tokens must be positive, not 0"),
        (["{}", "hi", "--seed=-1"], "--seed must be"),
        (["{}", "hi", "--seed=x"], "chat.py: argument --seed: invalid int value"),
        (["{}", "hi", "--speed=1"], "chat.py: unrecognized arguments: --speed=1"),
    ],
)
def test_mistakes_are_named_in_one_line(checkpoint, run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    model, state = gpt.load(checkpoint("a.pt"))
    Path("foreign.pt").write_bytes(b"not a checkpoint")
    Path("folder.pt").mkdir()
    gpt.save("bare.pt", model)
    torch.nn.init.constant_(model.wte.weight, torch.nan)
    torch.save(state | {"weights": model.state_dict()}, "nan.pt")
    with pytest.raises(SystemExit, match=message) as error:
        run(*(argument.format("a.pt") for argument in arguments))
    assert "\n" not in str(error.value)
