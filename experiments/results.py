"""Results in files, and what they were computed by.

A file for each seed, experiments/results/STUDY/SEED.json: a digest of the fine-tuned model from
which all its runs start, and of each run its figures, its commit, its machine, and a hash of the
code that computed them. A result is stale when that code has changed since.
"""

import ast
import hashlib
import json
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import torch

from lab.runs import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
CORE = "dpo model data responses train_sft train_dpo lab/village lab/pairs lab/evaluate".split()


class Computing(ast.NodeTransformer):
    """Keeps of a program what computes: no comments, doc strings, messages or help texts."""

    def visit_Expr(self, node):
        is_print = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "print"
        return None if is_print or isinstance(node.value, ast.Constant) else node

    def visit_Raise(self, node):
        return ast.Raise()

    def visit_Call(self, node):
        if ast.unparse(node.func) == "flag":
            node.args[1:2] = []  # the help text
        return self.generic_visit(node)


def plain(node):
    """A syntax tree as lists, the same in each version of Python: what is empty is left out."""
    if isinstance(node, list):
        return [plain(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [(name, plain(part)) for name, part in ast.iter_fields(node) if part not in (None, [])]
    return [type(node).__name__, *parts]


@cache
def computing(name):
    """What computes in a file, named without its ".py"."""
    return str(plain(Computing().visit(ast.parse((ROOT / f"{name}.py").read_text("utf-8")))))


def code_hash(more=()):
    """A hash of the code that every result rests on, and of more files."""
    codes = map(computing, [*CORE, *more])
    return hashlib.sha256("".join(codes).encode()).hexdigest()[:12]


def digest_of(path):
    """Of the weights in a checkpoint: another CPU fine-tunes to another model."""
    weights = torch.load(path, weights_only=True, map_location="cpu")["weights"]
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()[:12]


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def commit():
    """The commit of the checkout, with a + where files differ from it."""
    said = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=7"]
    run = subprocess.run(said, cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def read(study):
    """{seed: its file}, in the order of the seeds."""
    paths = sorted((RESULTS / study).glob("*.json"), key=lambda path: int(path.stem))
    return {int(path.stem): json.loads(path.read_text("utf-8")) for path in paths}


def read_file(study, seed, sft):
    """A seed's file, or an empty one. Refuses one of another fine-tuned model."""
    path = RESULTS / study / f"{seed}.json"
    file = json.loads(path.read_text("utf-8")) if path.exists() else {"sft": sft, "runs": {}}
    if file["sft"] != sft:
        raise SystemExit(
            f"{path} is of another fine-tuned model, as another CPU makes: remove it, or give "
            "compare.py another --study"
        )
    return file


def missing(study, seed, names):
    """Those of a seed's runs that are not kept, or are stale."""
    kept = read(study).get(seed, {"runs": {}})["runs"]
    return [name for name in names if name not in kept or is_stale(kept[name])]


def read_seeds(text):
    """What stands behind --seeds, "0,1,2" -> [0, 1, 2]."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise SystemExit(f"--seeds: numbers with commas between them, not {text}")
    return [int(seed) for seed in text.split(",")]


def keep(study, seed, sft, name, figures, more=()):
    """Add a run's figures to its seed's file."""
    file = read_file(study, seed, sft)
    by = {"commit": commit(), "code": code_hash(more), "more": [*more], "machine": machine()}
    file["runs"][name] = {"figures": figures} | by
    (RESULTS / study).mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / study / f"{seed}.json", file)


def is_stale(run):
    """Whether the code has changed since."""
    return run["code"] != code_hash(run["more"])
