"""What goes wrong on a real machine: killed runs and how they resume, full disks, foreign files."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, needs_unix, refusal, run_main

import model as gpt
import train_dpo
import train_sft
from variants import train_online

SFT = "--pretrain-steps=12 --steps=14 --lr=0.02 --n-embd=16 --n-layer=1 --n-head=2".split()
DPO = "--num-pairs=48 --batch-size=8 --epochs=4 --eval-questions=2 --eval-samples=3".split()
ADAMW = [*DPO, "--optimizer=adamw", "--lr=1e-3"]

# A script in a process that kills itself, at a MOMENT of the COUNT-th time that a state is saved:
# a file half written, a whole one not yet renamed or just so, a step after the last save.
DYING = """
import importlib, os, signal, sys
import model as gpt
moment, count, script = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.argv = sys.argv[3:]
module, saves, replace, save = importlib.import_module(script), 0, os.replace, gpt.torch.save
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def dying_save(state, path):
    global saves
    saves += ".part." in path
    if moment == "while writing" and saves == count:
        open(path, "wb").write(b"PK half a file")
        die()
    save(state, path)
def dying_replace(source, target):
    if moment == "before renaming" and saves == count and ".part." in target:
        die()
    replace(source, target)
    if moment == "after renaming" and saves == count and ".part." in target:
        die()
gpt.torch.save, os.replace = dying_save, dying_replace
step = gpt.GPT.forward
def dying_forward(self, *inputs):
    if moment == "in a step" and saves == count and self.training_seen:
        die()
    self.training_seen = self.wte.weight.requires_grad and saves == count
    return step(self, *inputs)
gpt.GPT.training_seen, gpt.GPT.forward = False, dying_forward
module.main()
"""


def kill(moment, count, script, flags):
    line = [sys.executable, "-c", DYING, moment, str(count), script, *flags]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, to compare with."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(monkeypatch, train_sft, f"--out={out}", *SFT)
        run_main(monkeypatch, train_dpo, f"--out={out}", *ADAMW)
    return out


def same_weights(*paths):
    states = [gpt.load(path)[0].state_dict() for path in paths]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@needs_unix
@pytest.mark.parametrize(
    "moment, count", [("while writing", 3), ("after renaming", 5), ("in a step", 6)]
)
def test_a_killed_dpo_run_resumes_to_the_same_bits(whole, tmp_path, monkeypatch, moment, count):
    flags = [f"--out={tmp_path}", f"--init={whole}/sft.pt", *ADAMW]
    kill(moment, count, "train_dpo", flags)
    gpt.load(tmp_path / "dpo.part.pt")  # whole, whatever stands beside it
    assert not (tmp_path / "dpo.pt").exists()
    message = refusal(run_main, monkeypatch, train_dpo, *flags, "--resume", "--beta=0.4")
    assert "dpo.part.pt is of another run: beta was 0.5, is 0.4" in message
    pairs = (tmp_path / "pairs.jsonl").read_bytes()
    message = refusal(run_main, monkeypatch, train_dpo, *flags, "--resume", "--num-pairs=20")
    assert "another run: data was" in message
    assert (tmp_path / "pairs.jsonl").read_bytes() == pairs
    run_main(monkeypatch, train_dpo, *flags, "--resume")
    assert (tmp_path / "dpo.jsonl").read_bytes() == (whole / "dpo.jsonl").read_bytes()
    assert same_weights(tmp_path / "dpo.pt", whole / "dpo.pt")
    reports = [json.loads((folder / "dpo.json").read_text()) for folder in (tmp_path, whole)]
    assert reports[0]["policy"] == reports[1]["policy"]
    assert not list(tmp_path.glob("*.part.pt"))
    finished = refusal(run_main, monkeypatch, train_dpo, *flags, "--resume")
    assert finished.endswith("dpo.pt is of this very run, and finished")


@needs_unix
@pytest.mark.parametrize("moment, count", [("in a step", 5), ("before renaming", 14)])
def test_a_killed_sft_run_resumes_to_the_same_bits(whole, tmp_path, monkeypatch, moment, count):
    """Ten saves a stage: one of these moments is in pretraining, one in fine-tuning."""
    flags = [f"--out={tmp_path}", *SFT]
    kill(moment, count, "train_sft", flags)
    run_main(monkeypatch, train_sft, *flags, "--resume")
    for name in ("pretrained.pt", "sft.pt"):
        assert same_weights(tmp_path / name, whole / name)
    assert not list(tmp_path.glob("*.part.pt"))
    assert "of this very run, and finished" in refusal(
        run_main, monkeypatch, train_sft, *flags, "--resume"
    )


ONLINE = "--rounds=4 --num-pairs=32 --batch-size=4 --lr=0.02 --eval-questions=2".split()


@needs_unix
def test_a_killed_online_run_resumes_at_its_last_round_to_the_same_bits(
    whole, tmp_path, monkeypatch
):
    """It is killed in the third round, of whose pairs nothing is left."""
    init = f"--init={whole}/sft.pt"
    run_main(monkeypatch, train_online, init, f"--out={tmp_path}/whole", *ONLINE)
    flags = [init, f"--out={tmp_path}", *ONLINE]
    kill("in a step", 2, "variants.train_online", flags)
    message = refusal(run_main, monkeypatch, train_online, *flags, "--resume", "--num-pairs=64")
    assert "another run: num_pairs was" in message
    run_main(monkeypatch, train_online, *flags, "--resume")
    names = "online.jsonl", "online.pt"
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / "whole" / names[0]).read_bytes()
    assert same_weights(tmp_path / names[1], tmp_path / "whole" / names[1])


def test_pairs_that_have_changed_are_not_resumed(whole, tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    lines = (whole / "pairs.jsonl").read_text().splitlines(keepends=True)
    pairs.write_text("".join(lines))
    flags = [f"--out={tmp_path}", f"--init={whole}/sft.pt", f"--pairs={pairs}", *DPO]
    kill("in a step", 2, "train_dpo", flags)
    record = json.loads(lines[0])
    lines[0] = json.dumps(record | {"chosen": record["chosen"] + " More."}) + "\n"
    pairs.write_text("".join(lines))
    assert "another run: data was" in refusal(run_main, monkeypatch, train_dpo, *flags, "--resume")


@needs_unix
def test_a_killed_run_on_own_pairs_still_has_its_best_weights(whole, tmp_path, monkeypatch):
    """The pairs held out say the opposite, so that every step is worse than the start."""
    records = [json.loads(line) for line in (whole / "pairs.jsonl").read_text().splitlines()]
    opposite = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in records]
    for name, lines in (("pairs", records), ("opposite", opposite)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = [f"--pairs={tmp_path}/pairs.jsonl", f"--held-out={tmp_path}/opposite.jsonl"]
    flags = [f"--out={tmp_path}", f"--init={whole}/sft.pt", *files, "--lr=1e-3"]
    kill("in a step", 4, "train_dpo", flags)
    run_main(monkeypatch, train_dpo, *flags, "--resume")
    report = json.loads((tmp_path / "dpo.json").read_text())
    assert "held-out/accuracy" not in report
    assert report["kept"]["step"] == 0 and report["start"]["held-out/loss"] < 0.7
    assert same_weights(tmp_path / "dpo.pt", whole / "sft.pt")
    assert not same_weights(tmp_path / "dpo.pt", whole / "dpo.pt")


def test_data_that_bear_the_name_of_a_log_are_not_written_over(whole, tmp_path, monkeypatch):
    record = json.dumps({"prompt": "Who?", "chosen": " A cat.", "rejected": " A dog."})
    for module, name in ((train_sft, "sft"), (train_sft, "pretrained"), (train_dpo, "dpo")):
        path = tmp_path / name / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text(record)
        flags = [f"--out={path.parent}", *(DPO if name == "dpo" else SFT)]
        message = refusal(run_main, monkeypatch, module, *flags)
        assert f"{path} is no log, and one would be written over it" in message
        assert path.read_text() == record


def test_a_reference_that_has_changed_is_not_resumed(whole, tmp_path, monkeypatch):
    reference, state = gpt.load(whole / "sft.pt")
    gpt.save(tmp_path / "sft.pt", reference, tokenizer=state["tokenizer"])
    flags = [f"--out={tmp_path}", f"--pairs={whole}/pairs.jsonl", *DPO]
    kill("in a step", 2, "train_dpo", flags)
    with torch.no_grad():
        reference.wte.weight[0, 0] += 1e-6
    gpt.save(tmp_path / "sft.pt", reference, tokenizer=state["tokenizer"])
    assert "another run: reference was" in refusal(
        run_main, monkeypatch, train_dpo, *flags, "--resume"
    )


@needs_unix
def test_a_moved_folder_and_another_measurement_are_the_same_run(whole, tmp_path, monkeypatch):
    """The folder and the number of questions to measure on may change between runs."""
    flags = [f"--init={whole}/sft.pt", f"--pairs={whole}/pairs.jsonl", *DPO]
    kill("in a step", 4, "train_dpo", [f"--out={tmp_path}/old", *flags])
    run_main(monkeypatch, train_dpo, f"--out={tmp_path}/whole", *flags)
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "copy.jsonl").write_bytes((whole / "pairs.jsonl").read_bytes())
    flags = [f"--out={tmp_path}/new/../new/", f"--init={whole}/../{whole.name}/sft.pt", *DPO]
    flags += [f"--pairs={tmp_path}/copy.jsonl", "--device=cpu", "--eval-questions=1"]
    run_main(monkeypatch, train_dpo, *flags, "--resume")
    assert same_weights(tmp_path / "new" / "dpo.pt", tmp_path / "whole" / "dpo.pt")


def test_a_last_step_that_blows_up_is_one_line_and_writes_no_checkpoint(tmp_path, monkeypatch):
    """The loss of a step is computed before it: nothing but the weights tells of the last one."""
    step, steps = torch.optim.AdamW.step, 0

    def blow_up(self, *arguments):
        nonlocal steps
        steps += 1
        step(self, *arguments)
        if steps == 26:  # 12 of pretraining, 14 of fine-tuning
            self.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", blow_up)
    message = refusal(run_main, monkeypatch, train_sft, f"--out={tmp_path}", *SFT)
    assert message.startswith("the weights for ") and "not finite" in message
    assert steps == 26 and not (tmp_path / "sft.pt").exists()
    assert (tmp_path / "pretrained.pt").exists() and (tmp_path / "sft.part.pt").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_ends_the_run_in_one_line(whole, monkeypatch, tmp_path):
    (tmp_path / "dpo.part.pt.tmp").symlink_to("/dev/full")
    (tmp_path / "dpo.pt").write_bytes(b"an earlier run's")
    flags = [f"--out={tmp_path}", f"--init={whole}/sft.pt", *DPO]
    assert "is the disk full?" in refusal(run_main, monkeypatch, train_dpo, *flags)
    assert (tmp_path / "dpo.pt").read_bytes() == b"an earlier run's"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("kind", ["truncated", "foreign", "pickle", "other keys", "other shapes"])
def test_a_file_that_is_no_checkpoint_is_named_and_never_run(whole, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path, good = tmp_path / "bad.pt", (whole / "sft.pt").read_bytes()
    _, state = gpt.load(whole / "sft.pt")
    match kind:
        case "truncated":
            path.write_bytes(good[: len(good) // 2])
        case "foreign":
            torch.save({"model": torch.zeros(3)}, path)
        case "pickle":
            path.write_bytes(pickle.dumps(Bomb()))
        case "other keys":
            torch.save(state | {"config": state["config"] | {"dropout": 0.1}}, path)
        case "other shapes":
            torch.save(state | {"config": state["config"] | {"n_layer": 2}}, path)
    flags = [f"--out={tmp_path}", "--init=bad.pt", *DPO]
    message = refusal(run_main, monkeypatch, train_dpo, *flags)
    assert message.startswith("cannot start from bad.pt")
    assert not (tmp_path / "exploded").exists()
