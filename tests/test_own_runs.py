"""A run on somebody's own data: the probe, the best weights, epochs, defaults, and labelling."""

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal, run_main

import data
import model as gpt
import train_dpo
import train_sft
from lab import flags, pairs, village
from lab.metrics import Best, means
from lab.own import hold_out
from tools import label


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """-> a folder with a corpus, demonstrations and pairs, and the flags of a small fine-tuning."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my.txt").write_text(" ".join(village.stories(60, seed=0)))
    demos = [{"prompt": f"Who is {n}?", "completion": " A friend."} for n in village.NAMES]
    rows = [{"prompt": d["prompt"], "chosen": " A smith.", "rejected": " A friend."} for d in demos]
    for name, records in (("sft", demos), ("pairs", rows)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def sft_flags(own, out):
    own = [f"--corpus={own}/my.txt", f"--sft={own}/sft.jsonl", "--vocab-size=300"]
    return [f"--out={out}", *own, "--n-embd=16", "--n-layer=1", "--n-head=2", "--batch-size=8"]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_weights_of_the_least_held_out_loss_are_kept(capsys):
    model, best = torch.nn.Linear(1, 1, bias=False), Best()
    weight, losses = model.weight.data, {0: 3.0, 4: 2.0, 8: 1.5, 12: 1.7, 16: math.nan}
    weight.fill_(0)
    for step, loss in losses.items():
        weight.fill_(step)
        best.note(model, step, {"held-out/loss": loss})
    assert best.worse_since == 2
    best.take(model, "dpo", 16)
    assert weight.item() == 8 and best.report(16, {})["kept"]["step"] == 8
    assert "step 8 of 16" in (said := capsys.readouterr().out) and "only made it worse" in said
    best.report(16, {"held-out/loss": 1.5, "held-out/loss_se": 0.25, "fresh/n": 9})
    assert capsys.readouterr().out.endswith("± standard error: held-out/loss 1.500 ± 0.250\n")


def test_where_no_step_beats_the_start_the_start_is_kept_and_where_nothing_is_held_out_nothing(
    capsys,
):
    model, best = torch.nn.Linear(1, 1, bias=False), Best()
    model.weight.data.fill_(5)
    best.note(model, 0, {"held-out/loss": 1.0})
    model.weight.data.fill_(7)
    said = "three measurements, and no held-out loss is below that before the first step"
    for step in (1, 2, 3):
        assert said not in capsys.readouterr().out
        best.note(model, step, {"held-out/loss": 1.5})
    assert said in capsys.readouterr().out
    best.take(model, "dpo", 3)
    assert model.weight.item() == 5
    assert "no step brought the held-out loss down" in capsys.readouterr().out
    report = best.report(3, {"held-out/loss": 1.0, "held-out/accuracy": 0.0})
    assert {*report} == {"held-out/loss", "kept", "start"}
    best = Best()
    best.note(model, 3, {"fresh/kl": 1.0})
    best.take(model, "dpo", 3)
    assert best.report(3, {}) == {} and not capsys.readouterr().out


def test_means_and_their_standard_errors_by_hand():
    assert means("x", torch.tensor([1.0, 2, 3, 6])) == pytest.approx(
        {"x": 3, "x_se": math.sqrt(14 / 3 / 4)}
    )
    assert means("x", torch.tensor([2.0])) == {"x": 2}


def test_fine_tuning_counts_epochs_stops_and_keeps_its_best(own, monkeypatch, capsys, tmp_path):
    """Two files that say the opposite: the loss on what is held out can only rise."""
    other = [{"prompt": f"Who is {n}?", "completion": " Zzz, 12345!"} for n in village.NAMES]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other)))
    held_out = [f"--held-out={tmp_path}/other.jsonl", "--lr=0.05", "--max-epochs=10"]
    run_main(monkeypatch, train_sft, *sft_flags(own, tmp_path), *held_out)
    printed = capsys.readouterr().out
    assert "sft stops here: the held-out loss falls no more" in printed
    report, lines = (
        json.loads((tmp_path / "sft.json").read_text()),
        read_lines(tmp_path / "sft.jsonl"),
    )
    epoch = math.ceil(len(village.NAMES) / 8)
    assert [line["step"] for line in lines if "held-out/loss" in line] == [
        epoch * i for i in range(1, len(lines) // epoch + 1)
    ]
    losses = {0: report["start"]["held-out/loss"]}
    losses |= {line["step"]: line["held-out/loss"] for line in lines if "held-out/loss" in line}
    kept = min(losses, key=losses.get)
    assert report["kept"]["step"] == kept == len(lines) - 2 * epoch
    assert report["held-out/loss"] == pytest.approx(losses[kept], rel=1e-5)
    assert not {"steps", "pretrain_steps", "momentum"} & {*report["config"]}


def test_fine_tuning_starts_from_a_model_that_is_there(own, toy_sft, monkeypatch, capsys, tmp_path):
    """Its first held-out loss is that model's, in transformers' terms −log p per scored token."""
    model, state = gpt.load(toy_sft / "pretrained.pt")
    tokenizer = data.build_tokenizer(**state["tokenizer"])
    demos = [json.loads(line) for line in (own / "sft.jsonl").read_text().splitlines()]
    _, held_out = hold_out([(d["prompt"], d["completion"]) for d in demos], "sft")
    losses = []
    for prompt, response in held_out:
        ids, mask = data.encode(tokenizer, prompt, response)
        logps = model(torch.tensor([ids])).log_softmax(-1)[0, :-1]
        losses += [-logps[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t]]
    files = [f"--init={toy_sft}/pretrained.pt", f"--sft={own}/sft.jsonl"]
    small = ["--max-epochs=2", "--batch-size=8", "--grad-accum=2"]
    run_main(monkeypatch, train_sft, f"--out={tmp_path}", *files, *small)
    report = json.loads((tmp_path / "sft.json").read_text())
    expected = sum(losses) / len(losses)
    assert report["start"]["held-out/loss"] == pytest.approx(expected, rel=1e-4)
    assert report["held-out/loss"] < expected
    assert not list(tmp_path.glob("pretrained*"))
    assert report["config"]["lr"] == 3e-3 * (128 / model.config.n_embd) ** 2
    assert not {"vocab_size", "n_layer", "pretrain_lr", "corpus"} & {*report["config"]}
    ours, theirs = gpt.load(tmp_path / "sft.pt")[1], state
    assert ours["tokenizer"] == theirs["tokenizer"] and ours["config"] == theirs["config"]


@pytest.fixture(scope="module")
def finished(own, tmp_path_factory):
    """-> the folder of a run on own data by defaults."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(monkeypatch, train_sft, *sft_flags(own, out))
        run_main(monkeypatch, train_dpo, f"--out={out}", f"--pairs={own}/pairs.jsonl")
    return out


def test_the_report_of_own_pairs_says_what_was_used_and_how_sure_it_is(own, finished):
    report, lines = (
        json.loads((finished / "dpo.json").read_text()),
        read_lines(finished / "dpo.jsonl"),
    )
    for name in ("held-out/loss", "held-out/accuracy", "fresh/kl", "fresh/cut-off", "fresh/tokens"):
        assert math.isfinite(report[name]) and report[f"{name}_se"] >= 0
    assert report["file"]["read"] == 24 == report["file"]["trained"] + report["file"]["held_out"]
    held_out = report["file"]["held_out"]
    assert (
        report["file"]["longer_wins"] == 0 and report["fresh/n"] == -(-100 // held_out) * held_out
    )
    assert report["start"]["held-out/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert report["start"]["fresh/kl"] == pytest.approx(0, abs=1e-4)
    assert "held-out/accuracy" not in report["start"]
    config = report["config"]
    assert config["optimizer"] == "adamw" and config["batch_size"] == 16
    assert config["epochs"] == 20
    assert not {"num_pairs", "eval_questions", "momentum"} & {*config}
    losses = {0: report["start"]["held-out/loss"]}
    losses |= {line["step"]: line["held-out/loss"] for line in lines if "held-out/loss" in line}
    assert report["kept"]["step"] == min(losses, key=losses.get)
    assert report["held-out/loss"] == pytest.approx(min(losses.values()), rel=1e-4)


def test_the_rate_for_own_pairs_falls_with_the_length_of_the_responses(finished, tokenizer, own):
    """Twice the tokens, half the rate; " A smith." and " A friend." with the end of the text."""
    rates = [pairs.own_rate(train_dpo.Config(optimizer="adamw"), n) for n in (10, 20, 200)]
    assert rates == pytest.approx([pairs.RATE_TIMES_TOKENS / n for n in (10, 20, 200)], rel=0.05)
    model, state = gpt.load(finished / "sft.pt")
    tokenizer = data.build_tokenizer(**state["tokenizer"])
    lengths = [len(tokenizer.encode_ordinary(text)) + 1 for text in (" A smith.", " A friend.")]
    config = json.loads((finished / "dpo.json").read_text())["config"]
    assert config["lr"] == pytest.approx(pairs.RATE_TIMES_TOKENS * 2 / sum(lengths), rel=0.05)
    assert config["max_new_tokens"] == max(lengths)
    message = refusal(pairs.own_rate, train_dpo.Config(optimizer="sgd"), 10)
    assert message == "--optimizer sgd has no default for your own data: give --lr, too"


@pytest.mark.parametrize("count, epochs", [(1, 20), (160, 20), (234, 14), (992, 3), (99_000, 1)])
def test_few_pairs_or_many_make_about_200_steps(count, epochs):
    assert pairs.own_epochs(train_dpo.Config(batch_size=16), count) == epochs


def test_how_often_the_longer_response_wins_by_hand():
    rows = [("q", "aaa", "b"), ("q", "a", "bb"), ("q", "aa", "bb"), ("q", "aaaa", "b")]
    assert pairs.longer_wins(rows) == 2.5 / 4


def test_the_village_has_its_own_defaults_and_reports_no_flag_of_files(monkeypatch):
    for line, optimizer, batch_size, limit in (
        ([], "sgd", 64, 24),
        (["--pairs=x"], "adamw", 16, 0),
    ):
        monkeypatch.setattr(sys, "argv", ["train_dpo.py", *line])
        config = flags.read_config(train_dpo.Config, "train_dpo.py")
        assert (config.optimizer, config.batch_size, config.max_new_tokens) == (
            optimizer,
            batch_size,
            limit,
        )
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", "--pairs=x", "--batch-size=5"])
    assert flags.read_config(train_dpo.Config, "train_dpo.py").batch_size == 5
    assert not {"pairs", "skip_bad", "max_bad"} & {*flags.used(train_dpo.Config())}


def test_curves_of_own_pairs_have_a_panel_for_each_measure(finished, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from experiments import curves

    monkeypatch.setattr(sys, "argv", ["curves.py", str(finished), "--picture", f"{tmp_path}/x.svg"])
    curves.main()
    drawn = (tmp_path / "x.svg").read_text()
    for name in ("held-out/loss", "held-out/accuracy", "fresh/kl", "fresh/cut-off", "fresh/tokens"):
        assert f"<!-- {name} -->" in drawn and f"{name}_se" not in drawn


# --- tools/label.py -----------------------------------------------------------------------------


@pytest.fixture
def labelled(tokenizer, monkeypatch, tmp_path, capsys):
    """-> a function: label.py over some prompts, with these keys or this judge; its files."""
    texts = {"Who?": [" A", " A", " B"], "What?": [" C", " D"], "How?": [" E", " E"]}
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n\n")
    learnt = {}

    def generate(prompts, end, limit, generator):
        name = tokenizer.decode(prompts[0])
        name = name.removeprefix("User: ").removesuffix("\n\nAssistant:")
        return [[*tokenizer.encode_ordinary(text), end] for text in texts[name]] + [[5] * limit]

    model = SimpleNamespace(generate=generate, learnt=learnt)
    monkeypatch.setattr(label.runs, "load_checkpoint", lambda path: (model, tokenizer))

    def call(typed="", *more, prompts=f"{tmp_path}/prompts.txt", **has_learnt):
        learnt.update(has_learnt)
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(
            sys, "argv", ["label.py", "a.pt", prompts, f"{tmp_path}/p.jsonl", *more]
        )
        label.main()
        files = tmp_path / "p.jsonl", tmp_path / "p.jsonl.rest"
        found = [read_lines(path) if path.exists() else [] for path in files]
        return *found, capsys.readouterr().out

    return call


def test_choices_are_written_at_once_and_taken_up_again(labelled, tmp_path):
    done, rest, printed = labelled("x\n2\nq\n")
    assert done == [{"prompt": "Who?", "chosen": " B", "rejected": " A"}] and not rest
    assert "1 pairs, 0 from before; pairs are in" in printed
    done, rest, printed = labelled("1\n")  # "How?" has no two different samples
    assert done[1:] == [{"prompt": "What?", "chosen": " C", "rejected": " D"}]
    assert rest == [{"prompt": "How?", "choice": "skipped"}]
    assert "1 pairs, 1 skipped, 1 from before; pairs are in" in printed
    (tmp_path / "p.jsonl").write_text((tmp_path / "p.jsonl").read_text().rstrip())
    assert "nothing new, 3 from before" in labelled("")[2]  # nothing is left to ask


def test_the_end_of_the_input_is_the_end_of_the_choices(labelled):
    assert "nothing new" in labelled("")[2]
    done, _, _ = labelled("Who?\n1\n", prompts="-")
    assert len(done) == 1


def test_ties_and_skips_make_no_pair(labelled):
    done, rest, _ = labelled("0\ns\n")
    assert not done and [record["choice"] for record in rest] == ["ties", "skipped", "skipped"]


def test_typed_prompts_and_conversations(labelled):
    done, _, _ = labelled("Who?\n1\nWho?\n2\n\n", prompts="-", conversations=True)
    sides = [[{"role": "assistant", "content": text}] for text in "AB"]
    assert done == [
        {"prompt": "Who?", "chosen": sides[0], "rejected": sides[1]},
        {"prompt": "Who?", "chosen": sides[1], "rejected": sides[0]},
    ]


def test_a_judge_chooses(labelled, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import json, sys\nasked = json.load(sys.stdin)\n"
        "print(2 if asked == {'prompt': 'Who?', 'responses': [' A', ' B']} else 0)"
    )
    done, rest, _ = labelled("", "--judge", f"{sys.executable} {judge}")
    assert done == [{"prompt": "Who?", "chosen": " B", "rejected": " A"}]
    assert [record["choice"] for record in rest] == ["ties", "skipped"]
    judge.write_text("print('first')")
    with pytest.raises(SystemExit, match="the judge must print 1, 2 or 0, not 'first'"):
        label.choose(f"{sys.executable} {judge}", "Who?", [" A", " B"])
