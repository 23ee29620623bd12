"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU draws other random numbers
import pytest
import torch

import data
import train_sft
from lab import village
from lab.flags import command

ROOT = Path(__file__).parent.parent
TOY_SFT = "--pretrain-steps=3 --steps=30 --lr=0.02 --n-embd=16 --n-layer=1 --n-head=2".split()

needs_unix = pytest.mark.skipif(os.name != "posix", reason="sends a Unix signal")


@pytest.fixture(scope="session")
def tokenizer():
    return data.train_tokenizer(village.every_word(), village.VOCAB_SIZE)


@pytest.fixture(scope="session", autouse=True)
def threads():
    """One, unless OMP_NUM_THREADS asks for more: small batches are faster so. The tests' processes
    get as many, since the last bit of a sum depends on it."""
    count = os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(count))


@pytest.fixture(scope="session")
def toy_sft(tmp_path_factory, threads):
    """-> a folder with sft.pt and pretrained.pt of a toy model. Nobody else writes there."""
    out = tmp_path_factory.mktemp("toy_sft")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(monkeypatch, train_sft, f"--out={out}", *TOY_SFT)
    return out


def process(script, *flags):
    """Run a script in a process of its own, every warning an error -> the finished process."""
    line = [sys.executable, "-W", "error", script, *flags]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


def run_main(monkeypatch, module, *flags):
    """Run a script in this process, which saves the seconds that torch takes to load."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, flags)])
    command(module.main)


def refusal(function, *arguments):
    """The one line in which a function ends."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    message = str(stop.value)
    assert "\n" not in message
    return message
