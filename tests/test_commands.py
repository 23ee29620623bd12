"""The command lines, at toy size: what they write and print, and how mistakes end."""

import dataclasses
import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TOY_SFT, needs_unix, process, refusal, run_main

import data
import model as gpt
import responses
import train_dpo
import train_sft
from experiments import compare, frontier, results
from lab import flags as lab_flags
from lab import runs, village
from lab.pairs import check_village_fits
from tools import chat
from variants import train_grpo, train_online, train_rlhf, train_selfplay, train_variant

TOY_DPO = ["--num-pairs=48", "--batch-size=8", "--eval-questions=2", "--eval-samples=3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("village")
    sft = process("train_sft.py", f"--out={out}", *TOY_SFT)
    return out, sft, process("train_dpo.py", f"--out={out}", *TOY_DPO)


def test_the_pipeline_on_the_village(finished):
    out, sft, run = finished
    ends = "pt", "jsonl", "json"
    files = {f"{name}.{end}" for name in ("pretrained", "sft", "dpo") for end in ends}
    assert files | {"pairs.jsonl"} == {path.name for path in out.iterdir()}
    assert "nats per token on held-out text" in sft.stdout and "never asked: " in sft.stdout
    assert "loss before the first step: 0.6931" in run.stdout and "optimum, Eq. 4" in run.stdout
    assert not run.stderr  # bars are quiet when the output is no terminal
    report = json.loads((out / "dpo.json").read_text())
    for part in (report, report["never_asked"]):
        for row in ("reference", "policy", "optimum"):
            for name in ("reward", "kl", "objective", "optimality"):
                assert math.isfinite(part[row][name]) and part[row][f"{name}_se"] >= 0
    assert report["policy"]["kl"] != 0
    sft, dpo_policy = (gpt.load(out / name)[0].wte.weight for name in ("sft.pt", "dpo.pt"))
    assert not torch.equal(sft, dpo_policy)
    assert report["seed"] == report["config"]["seed"] == 0 and report["seconds"]["training"] > 0
    lines = [json.loads(line) for line in (out / "dpo.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    assert "fresh/garbled" in lines[-1] and "fresh/kl" in lines[-1] and "lr" in lines[0]


def test_the_answers_before_are_the_references_and_those_after_the_policys(finished):
    out, _, run = finished
    config, prompts = train_dpo.Config(), village.split_questions()[1][:2]
    for label, name in (("before", "sft.pt"), ("after ", "dpo.pt")):
        model, tokenizer = runs.load_checkpoint(out / name)
        _, texts = responses.sample_responses(model, tokenizer, prompts, config, "")
        for prompt, text in zip(prompts, texts):
            score = -3 if text is None else village.reward(prompt, text)
            assert f"    {label} {score:+g} {text or '(cut off)'}" in run.stdout


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(
    finished, monkeypatch, tmp_path
):
    out, *_ = finished
    for seed, same in ((0, True), (1, False)):
        flags = [f"--init={out}/sft.pt", f"--out={tmp_path}", f"--seed={seed}", *TOY_DPO]
        run_main(monkeypatch, train_dpo, *flags)
        again = (tmp_path / "dpo.jsonl").read_bytes() == (out / "dpo.jsonl").read_bytes()
        assert again == same


def test_the_pipeline_on_somebodys_own_text_and_pairs(monkeypatch, capsys, tmp_path):
    words = "the cat sat on a mat and the dog ran to an old red barn with two hens".split()
    (tmp_path / "my.txt").write_text(" ".join(words * 40))
    (tmp_path / "my.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"the {w}?", "response": " a cat"}) for w in words)
    )
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"the {w}?", "chosen": " a cat", "rejected": " a dog ran"})
            for w in words
        )
    )
    out = f"--out={tmp_path}/out"
    own = [f"--corpus={tmp_path}/my.txt", f"--sft={tmp_path}/my.jsonl", "--vocab-size=270"]
    run_main(monkeypatch, train_sft, out, *own, *TOY_SFT)
    other = ["--dtype=bfloat16", "--optimizer=adamw", "--lr=1e-4", *TOY_DPO]
    run_main(monkeypatch, train_dpo, out, f"--pairs={tmp_path}/pairs.jsonl", *other)
    printed = capsys.readouterr().out
    assert "Before and after" in printed and "held-out/accuracy" in printed
    assert "E[reward]" not in printed
    report = json.loads((tmp_path / "out" / "dpo.json").read_text())
    assert {"held-out/loss", "held-out/accuracy", "fresh/kl", "fresh/cut-off"} <= {*report}
    assert report["file"]["read"] == 18 == report["file"]["trained"] + report["file"]["held_out"]
    used = [tmp_path / "out" / "used_pairs" / f"{part}.jsonl" for part in ("train", "test")]
    texts = [path.read_text().splitlines() for path in used]
    assert [*map(len, texts)] == [report["file"]["trained"], report["file"]["held_out"]]
    assert {*sum(texts, [])} == {*(tmp_path / "pairs.jsonl").read_text().splitlines()}
    before = used[0].read_bytes()
    for path in (used[0], tmp_path / "out" / ".." / "out" / "used_pairs" / "train.jsonl"):
        again = refusal(run_main, monkeypatch, train_dpo, out, f"--pairs={path}", *other)
        assert "used_pairs is written by the run itself: give another --out" in again
    assert used[0].read_bytes() == before
    learnt = gpt.load(tmp_path / "out" / "dpo.pt")[0].learnt
    assert report["config"]["max_new_tokens"] == learnt["answer_tokens"]


def test_conversations_go_through_one_template_from_fine_tuning_to_chat(
    monkeypatch, capsys, tmp_path
):
    """A model that is asked as it was trained gives its only answer."""
    (tmp_path / "my.txt").write_text(" ".join(village.stories(300, seed=0)) + " User: Who?" * 60)
    users = [{"role": "user", "content": f"Who is {name}?"} for name in village.NAMES]
    friend, nobody = ({"role": "assistant", "content": text} for text in ("A friend.", "Nobody."))
    names = ("prompt", "chosen", "rejected")
    files = {
        "my": [{"messages": [user, friend]} for user in users],
        "chat": [dict(zip(names, ([user], [friend], [nobody]))) for user in users],
        "plain": [dict(zip(names, (user["content"], " A friend.", " Nobody."))) for user in users],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [f"--corpus={tmp_path}/my.txt", f"--sft={tmp_path}/my.jsonl", "--vocab-size=400"]
    small = ["--pretrain-steps=9", "--steps=120", "--n-embd=32", "--n-layer=1", "--lr=0.01"]
    run_main(monkeypatch, train_sft, f"--out={tmp_path}", *own, *small)
    learnt = gpt.load(tmp_path / "sft.pt")[0].learnt
    assert learnt["conversations"] and gpt.load(tmp_path / "pretrained.pt")[0].learnt == {}
    capsys.readouterr()
    for name in ("chat", "plain"):
        flags = [f"--out={tmp_path}", f"--pairs={tmp_path}/{name}.jsonl", "--lr=1e-5"]
        run_main(monkeypatch, train_dpo, *flags)
        said = "the model has learnt conversations, but" in capsys.readouterr().out
        assert said == (name == "plain")
        assert gpt.load(tmp_path / "dpo.pt")[0].learnt["conversations"] == (name == "chat")
    line = ["chat.py", f"{tmp_path}/sft.pt", users[0]["content"], "--temperature=0"]
    monkeypatch.setattr(sys, "argv", line)
    chat.main()
    assert capsys.readouterr().out == "A friend.\n"


def test_thumbs_are_refused_by_dpo(finished, monkeypatch, tmp_path):
    rows = [{"prompt": f"{i}?", "completion": " a", "label": i > 9} for i in range(20)]
    (tmp_path / "thumbs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [
        f"--init={finished[0]}/sft.pt",
        f"--out={tmp_path}",
        f"--pairs={tmp_path}/thumbs.jsonl",
    ]
    message = refusal(run_main, monkeypatch, train_dpo, *flags)
    assert "thumbs.jsonl has labels of single responses" in message and "--loss kto" in message


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--beat=1"], "unrecognized arguments: --beat=1"),
        (["--be=1"], "unrecognized arguments"),
        (["--beta=x"], "invalid float value: 'x'"),
        (["--held-out=my.jsonl"], "--held-out is for files of your own"),
        (["--skip-bad"], "--skip-bad is for files of your own"),
        (["--pairs=my.jsonl", "--max-bad=1"], "--max-bad must be positive and below 1, not 1.0"),
        (["--beta=0"], "--beta must be positive, not 0.0"),
        (["--beta=-1"], "--beta must be positive"),
        (["--beta=nan"], "--beta must be positive, not nan"),
        (["--lr=inf"], "--lr must be positive"),
        (["--batch-size=0"], "--batch-size must be positive, not 0"),
        (["--seed=100000000000000000000"], "--seed must be 0 or more and below"),
        (["--momentum=1"], "--momentum must be 0 or more and below 1, not 1.0"),
        (["--epochs=0"], "--epochs must be positive"),
        (["--optimizer=adam"], "--optimizer must be one of sgd, adamw, not adam"),
        (["--dtype=int8"], "--dtype must be one of float32, bfloat16, not int8"),
        (["--device=tpu9"], "--device tpu9 is not available here"),
        (["--out=README.md/x"], "cannot write to --out README.md/x"),
        (["--init=nowhere.pt"], "there is no nowhere.pt: train_sft.py writes sft.pt"),
        (["--init=README.md"], "README.md is not a whole checkpoint"),
    ],
)
def test_a_mistake_ends_the_run_in_one_line(monkeypatch, tmp_path, flags, message):
    flags = [f"--out={tmp_path}", *flags]
    assert message in refusal(run_main, monkeypatch, train_dpo, *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps=0"], "--steps must be positive, not 0"),
        (["--pretrain-steps=0"], "--pretrain-steps must be positive, not 0"),
        (["--corpus=my.txt"], "give two of these, or none"),
        (["--sft=my.jsonl"], "give two of these, or none"),
        (["--init=a.pt"], "give two of these, or none"),
        (["--init=a.pt", "--corpus=my.txt", "--sft=my.jsonl"], "give two of these, or none"),
        (["--init=a.pt", "--sft=my.jsonl", "--n-layer=3"], "--n-layer is for a model that is not"),
    ],
)
def test_own_data_that_do_not_go_together_are_refused(monkeypatch, tmp_path, flags, message):
    assert message in refusal(run_main, monkeypatch, train_sft, *flags, f"--out={tmp_path}")


def test_flags_of_the_village_beside_own_pairs_are_said_to_be_unused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", "--pairs=my.jsonl", "--num-pairs=5"])
    lab_flags.read_config(train_dpo.Config, "train_dpo.py")
    unused = "train_dpo.py: --num-pairs is the village's, and not used with your own file\n"
    assert capsys.readouterr().out == unused


def test_a_bad_pairs_file_stops_before_any_work(finished, monkeypatch, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a"}\n')
    flags = [f"--init={finished[0] / 'sft.pt'}", f"--out={tmp_path}", f"--pairs={pairs}"]
    message = refusal(run_main, monkeypatch, train_dpo, *flags)
    assert f'{pairs}, line 1: the fields are "prompt"; wanted' in message
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    flags[-1] = "--pairs=nowhere.jsonl"
    assert "nowhere.jsonl" in refusal(run_main, monkeypatch, train_dpo, *flags)


def test_a_bad_pairs_file_leaves_the_last_report(finished, monkeypatch, tmp_path):
    for name, text in (("dpo.json", "{}"), ("pairs.jsonl", "{")):
        (tmp_path / name).write_text(text)
    flags = [f"--init={finished[0] / 'sft.pt'}", f"--out={tmp_path}"]
    flags.append(f"--pairs={tmp_path}/pairs.jsonl")
    assert "not JSON" in refusal(run_main, monkeypatch, train_dpo, *flags)
    assert (tmp_path / "dpo.json").read_text() == "{}"


def test_a_model_too_small_for_the_village_is_refused(tokenizer):
    prompt = max(len(tokenizer.encode_ordinary(q)) for q in village.QUESTIONS)
    texts = (text for question in village.QUESTIONS for text in village.responses(question))
    response = max(len(data.encode(tokenizer, "", text)[0]) for text in texts)
    config = train_dpo.Config(max_new_tokens=response)
    check_village_fits(tokenizer, prompt + response, config)
    with pytest.raises(SystemExit, match=f"responses take {response} tokens and prompts {prompt}"):
        check_village_fits(tokenizer, prompt + response - 1, config)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(
    finished, monkeypatch, tmp_path
):
    good = (finished[0] / "dpo.pt").read_bytes()
    (tmp_path / "dpo.pt").write_bytes(good)
    flags = [f"--init={finished[0]}/sft.pt", f"--out={tmp_path}", "--lr=1e30", *TOY_DPO]
    message = refusal(run_main, monkeypatch, train_dpo, *flags)
    assert "not finite: try a lower learning rate" in message
    assert (tmp_path / "dpo.pt").read_bytes() == good


@needs_unix
def test_ctrl_c_leaves_whole_files_and_one_line(finished, tmp_path):
    flags = [
        "--init",
        str(finished[0] / "sft.pt"),
        "--out",
        str(tmp_path),
        "--epochs=10000",
        *TOY_DPO,
    ]
    # A test run in the background may ignore Ctrl-C, and a child would inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(
        [sys.executable, "-u", "train_dpo.py", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, handler)
    while "first step" not in running.stdout.readline():
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1 and "Traceback" not in errors
    assert errors.strip() == "interrupted; --resume goes on from the last saved state"
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) > 40


@pytest.fixture
def toy_ground(toy_sft, monkeypatch, tmp_path):
    """-> a folder for the experiments: a toy model of seed 0, toy sizes, twelve questions."""
    train, held_out, never = village.split_questions()
    monkeypatch.setattr(village, "split_questions", lambda: (train, held_out[:12], never[:4]))
    sizes = dict.fromkeys(("num_pairs", "batch_size", "questions", "samples"), 16)
    sizes |= {"steps": 2, "group": 4, "rounds": 2, "eval_samples": 4}

    def config(ground, cls, **settings):
        names = {field.name for field in dataclasses.fields(cls)}
        toy = {name: size for name, size in sizes.items() if name in names}
        return cls(seed=ground.seed, out=str(ground.folder), **settings | toy)

    monkeypatch.setattr(compare.Ground, "config", config)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    shutil.copytree(toy_sft, tmp_path / "0")
    return tmp_path


def test_every_method_runs_and_finished_runs_are_not_repeated(toy_ground, monkeypatch, capsys):
    names = [name for name in compare.METHODS if name not in compare.SCRIPTS]
    flags = ["--seeds=0", f"--out={toy_ground}", f"--only={','.join(names)}"]
    run_main(monkeypatch, compare, *flags)
    assert capsys.readouterr().out.count("optimality") == len(names)
    runs = results.read("village")[0]["runs"]
    assert [*runs] == names
    for run in runs.values():
        assert math.isfinite(run["figures"]["policy"]["optimality"])
    run_main(monkeypatch, compare, *flags)
    kept = "seed 0: all of it is kept in village; --study NAME measures anew\n"
    assert capsys.readouterr().out == kept


def test_a_scripts_report_is_its_methods_figure(toy_ground, monkeypatch):
    line = [compare.ONLINE, "--rounds=2", "--num-pairs=16", *SIZES]
    monkeypatch.setitem(compare.SCRIPTS, "online", (line, "online"))
    run_main(monkeypatch, compare, "--seeds=0", f"--out={toy_ground}", "--only=online")
    figures = results.read("village")[0]["runs"]["online"]["figures"]
    report = json.loads((toy_ground / "0" / "online" / "online.json").read_text())
    for row in ("reference", "policy", "optimum"):
        for name, value in figures[row].items():
            assert report[row][name] == pytest.approx(value, abs=1e-5)
    assert figures["labels"] == 16 and figures["seconds"] > 0


def test_the_frontier_is_drawn_and_no_method_is_above_it(toy_ground, monkeypatch, capsys):
    for name, (of, own, betas, *look) in frontier.METHODS.items():
        monkeypatch.setitem(frontier.METHODS, name, (of, own, betas[:1], *look))
    picture = toy_ground / "frontier.svg"
    run_main(monkeypatch, frontier, f"--out={toy_ground}", f"--picture={picture}")
    assert "| PPO-GT | 0.25 |" in (printed := capsys.readouterr().out)
    kept = {name: run["figures"] for name, run in results.read("frontier")[0]["runs"].items()}
    assert [*kept] == [f"{name} {row[2][0]}" for name, row in frontier.METHODS.items()]
    for name, points in kept.items():
        kl, reward, _ = points[-1]
        assert f"| {' | '.join(name.rsplit(' ', 1))} | {kl:.2f} | {reward:.2f} |" in printed
    if importlib.util.find_spec("matplotlib"):  # `make test` does not install it
        assert "exact frontier" in picture.read_text()


def test_curves_draws_every_metric_and_prints_the_error_that_there_is(
    finished, monkeypatch, capsys, tmp_path
):
    pytest.importorskip("matplotlib")
    from experiments import curves

    shutil.copytree(finished[0], tmp_path / "run")
    lines = (tmp_path / "run" / "dpo.jsonl").read_text().splitlines()
    lines = [json.dumps(json.loads(line) | {"forked/metric": i}) for i, line in enumerate(lines)]
    (tmp_path / "run" / "dpo.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["curves.py", f"{tmp_path}/run"])
    curves.main()
    printed, drawn = capsys.readouterr().out, (tmp_path / "run" / "curves.svg").read_text()
    report = json.loads((tmp_path / "run" / "dpo.json").read_text())["policy"]
    assert f"| policy | {report['reward']:.3f} ± {report['reward_se']:.3f} |" in printed
    assert "± is one standard error" in printed
    for name in ("forked/metric", "rewards/accuracies", "logps/rejected", "fresh/garbled", "loss"):
        assert name in drawn
    monkeypatch.setattr(sys, "argv", ["curves.py", *2 * [f"{tmp_path}/run"], "--picture", "x.svg"])
    monkeypatch.chdir(tmp_path)
    curves.main()
    assert "± 0.000 |" in capsys.readouterr().out and (tmp_path / "x.svg").exists()


SIZES = ["--eval-questions=2", "--eval-samples=2"]


@pytest.mark.parametrize(
    "module, flags, name",
    [
        (train_variant, ["--loss=orpo", "--num-pairs=16", "--batch-size=8"], "orpo"),
        (train_grpo, ["--steps=2", "--questions=2", "--group=2"], "grpo"),
        (train_rlhf, ["--steps=2", "--samples=8", "--num-pairs=16"], "rlhf"),
        (train_selfplay, ["--judge=model", "--questions=4"], "rlaif"),
        (train_online, ["--judge=pretrained", "--rounds=2", "--num-pairs=16"], "ai_feedback"),
    ],
)
def test_a_trainer_writes_the_same_files_as_train_dpo(
    toy_sft, monkeypatch, capsys, tmp_path, module, flags, name
):
    flags = [f"--init={toy_sft}/sft.pt", f"--out={tmp_path}", *flags, *SIZES]
    run_main(monkeypatch, module, *flags)
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"reference", "policy", "optimum", "seconds", "config", "seed"} <= {*report}
    lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert "fresh/kl" in lines[-1] and {"loss", "grad_norm", "lr"} <= {*lines[0]}
    printed = capsys.readouterr()
    assert "optimum, Eq. 4" in printed.out and not printed.err
    paths = tmp_path / f"{name}.pt", toy_sft / "sft.pt"
    assert gpt.load(paths[0])[1]["tokenizer"] == gpt.load(paths[1])[1]["tokenizer"]


def test_kto_learns_from_somebodys_thumbs(toy_sft, monkeypatch, capsys, tmp_path):
    """Of 33 rows the last batch has a single one, whose mismatched text alone gives KTO's z."""
    answers = " No, never.", " Yes, of course."
    rows = [
        {"prompt": f"Is it {i}?", "completion": answers[i % 2], "label": i % 2 > 0}
        for i in range(40)
    ]
    paths = tmp_path / "thumbs.jsonl", tmp_path / "held_out.jsonl"
    for path, part in zip(paths, (rows[:33], rows[33:])):
        path.write_text("\n".join(map(json.dumps, part)))
    files = [f"--pairs={paths[0]}", f"--held-out={paths[1]}", f"--out={tmp_path}"]
    flags = ["--loss=kto", *files, "--batch-size=8", "--lr=1e-3", *SIZES]
    run_main(monkeypatch, train_variant, f"--init={toy_sft}/sft.pt", *flags)
    assert json.loads((tmp_path / "kto.json").read_text())["held-out/accuracy"] == 1
    assert "only 7 rows are held out: too few" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--loss=dop"], "--loss must be one of cdpo, robust, ipo"),
        (["--loss=dpo"], "--loss dpo is train_dpo.py"),
        (["--loss=rpo", "--alpha=-1"], "--alpha must be 0 or more"),
        (["--loss=cdpo", "--label-smoothing=0.5"], "must be 0 or more and below 0.5"),
        (["--loss=ipo", "--label-smoothing=0.3"], "ipo: unrecognized .* --label-smoothing=0.3"),
        (["--loss=orpo", "--loss-beta=0.3"], "orpo: unrecognized arguments: --loss-beta=0.3"),
        (["--loss=ipo", "--beta=0.01"], "--eval-beta .β of Eq. 3.* and --loss-beta .the loss's"),
        (["--loss=kto", "--batch-size=1"], "--batch-size from 2 up"),
        (["--loss=kto", "--grad-accum=2"], "no --grad-accum"),
        (["--init=nowhere.pt"], "there is no nowhere.pt"),
    ],
)
def test_a_variants_mistake_ends_in_one_line(monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr("sys.argv", ["train_variant.py", f"--out={tmp_path}", *flags])
    with pytest.raises(SystemExit, match=message):
        train_variant.main()


def test_the_top_level_knows_nothing_of_the_family():
    for path in ROOT.glob("*.py"):
        assert "import variants" not in path.read_text() and "from variants" not in path.read_text()
