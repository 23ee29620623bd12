"""Truth by a peer: TRL's DPOTrainer and our loop, from the same weights, over the same pairs in the
same order, give the same numbers at every step. Skipped where TRL is missing (make test-peers)."""

import copy
import itertools
import json
import math
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data
import model as gpt
import train_dpo
from lab import village
from tools import gpt2_export
from variants import train_variant

# TRL still asks transformers for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

BATCH, STEPS = 8, 20
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")
NAMES += ("logps/rejected", "grad_norm")

# Our loss and its settings; TRL's for the same; TRL's loss over ours. `beta`, which scales the
# logged rewards, is the loss's own here, since TRL knows but one.
LOSSES = {
    "dpo": ({"beta": 0.5, "lr": 6e-3}, {"loss_type": "sigmoid"}, 1),
    "ipo": ({"beta": 0.1, "lr": 3e-3, "average": True}, {"loss_type": "ipo"}, 1),
    "hinge": ({"beta": 0.5, "lr": 6e-3}, {"loss_type": "hinge"}, 1),
    "robust": ({"beta": 0.5, "lr": 6e-3}, {"loss_type": "robust", "label_smoothing": 0.1}, 1),
    # Ours is a mean over a pair's two responses, as the authors' is, TRL's their sum.
    "sppo": ({"beta": 0.1, "lr": 3e-4}, {"loss_type": "sppo_hard"}, 2),
    # TRL takes the mean over all tokens of a batch, ours over each response's: so one pair a step.
    "rpo": (
        {"beta": 0.5, "lr": 1e-3, "batch_size": 1},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.1]},
        1,
    ),
}


@pytest.fixture(scope="module")
def trl():
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def sft(tokenizer, tmp_path_factory):
    """-> (a random model, tokenizer, the folder to which they are exported)."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, 64, n_layer=2, n_head=2, n_embd=32)).eval()
    path = tmp_path_factory.mktemp("sft")
    gpt.save(path / "sft.pt", model, tokenizer=data.tokenizer_state(tokenizer))
    gpt2_export.export_folder(path / "sft.pt", path / "folder")
    return model, tokenizer, path / "folder"


@pytest.fixture(scope="module")
def pairs():
    """Responses of many lengths, the one with the higher reward chosen."""
    rng = random.Random(0)
    pairs = []
    while len(pairs) < BATCH * STEPS:
        prompt = rng.choice([*village.QUESTIONS])
        chosen, rejected = rng.sample([*village.responses(prompt)], 2)
        if village.reward(prompt, chosen) > village.reward(prompt, rejected):
            pairs.append((prompt, chosen, rejected))
    return pairs


def our_steps(sft, pairs, config):
    """-> (metrics of every step, the trained policy)."""
    model, tokenizer, _ = sft
    policy, reference = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    dataset = train_dpo.add_reference_logps(reference, tokenizer, pairs)
    is_dpo = type(config) is train_dpo.Config
    loss_fn = train_dpo.pair_losses if is_dpo else train_variant.variant_losses
    optimizer = train_dpo.make_optimizer(policy, config)
    return [*train_dpo.train(policy, optimizer, dataset, config, loss_fn)], policy


def their_trainer(trl, sft, pairs, config, settings, factor, folder):
    """TRL's trainer with our schedule and optimizer, over our pairs in our order."""
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2LMHeadModel

    policy, reference = (GPT2LMHeadModel.from_pretrained(sft[2]) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(sft[2])
    batches = itertools.islice(data.batches(len(pairs), config.batch_size, config.seed), STEPS)
    rows = [dict(zip(("prompt", "chosen", "rejected"), pairs[i])) for b in batches for i in b]
    # A loss of twice the size, at half the rate, takes the same steps.
    sgd = torch.optim.SGD(policy.parameters(), config.lr / factor, config.momentum)
    shares = [*data.learning_rates(1, STEPS), 0]  # after the last step one more is asked for
    arguments = trl.DPOConfig(
        folder, beta=config.beta, **settings,
        per_device_train_batch_size=config.batch_size, train_sampling_strategy="sequential",
        max_steps=STEPS, max_length=None, max_grad_norm=1e9,  # no cut in texts and gradients
        bf16=False, activation_checkpointing=False, use_cpu=True, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return trl.DPOTrainer(
        policy, reference, arguments,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        optimizers=(sgd, torch.optim.lr_scheduler.LambdaLR(sgd, shares.__getitem__)),
    )  # fmt: skip


def test_trl_reads_the_same_tokens(trl, sft, pairs, tmp_path):
    config = train_dpo.Config(batch_size=BATCH)
    batches = itertools.islice(data.batches(len(pairs), BATCH, config.seed), STEPS)
    trainer = their_trainer(trl, sft, pairs, config, {}, 1, tmp_path)
    for i, row in zip(itertools.chain(*batches), trainer.train_dataset, strict=True):
        for k, side in enumerate(("chosen", "rejected"), 1):
            ids, mask = data.encode(sft[1], pairs[i][0], pairs[i][k])
            border = mask.index(True)
            assert (row["prompt_ids"], row[f"{side}_ids"]) == (ids[:border], ids[border:])


@pytest.mark.parametrize("name", LOSSES)
def test_trl_takes_the_same_steps(trl, sft, pairs, tmp_path, name):
    ours, theirs, factor = LOSSES[name]
    settings = {"batch_size": BATCH} | ours
    if name == "dpo":
        config = train_dpo.Config(**settings)
    else:
        config = train_variant.config_of(name)(**settings, loss_beta=ours["beta"])
    pairs = pairs[: STEPS * config.batch_size]
    steps, policy = our_steps(sft, pairs, config)
    trainer = their_trainer(trl, sft, pairs, config, theirs, factor, tmp_path)
    trainer.train()
    their_steps = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(steps) == len(their_steps) == STEPS
    for i, (mine, their) in enumerate(zip(steps, their_steps)):
        mine |= {key: mine[key] * factor for key in ("loss", "grad_norm")}
        assert mine["lr"] == pytest.approx(their["learning_rate"] * factor)
        for key in NAMES:
            # One part in 10^4; where all is 0 at first, 10^-4. What we have seen is 10^-5 at most.
            assert mine[key] == pytest.approx(their[key], rel=1e-4, abs=1e-4), f"{key}, step {i}"
        if i:  # at step 0 the sign of every margin is rounding noise; later, perhaps of one
            one = 1 / config.batch_size + 1e-6
            assert abs(mine["rewards/accuracies"] - their["rewards/accuracies"]) <= one
    before, after = sft[0].state_dict(), policy.state_dict()
    their_weights = trainer.model.transformer.state_dict()
    for name, (their_name, transposed) in gpt2_export.weight_names(2).items():
        weight = their_weights[their_name].T if transposed else their_weights[their_name]
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-6)
        assert not torch.equal(after[name], before[name])


def test_the_way_out_and_back_goes_as_the_docs_say(trl, sft, pairs, tmp_path):
    """The last block of docs/own-data.md, on a toy model and pairs, and without a GPU."""
    model, tokenizer = copy.deepcopy(sft[0]), sft[1]
    (tmp_path / "out/my/used_pairs").mkdir(parents=True)
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs[:40]]
    for name, part in (("train", rows[:32]), ("test", rows[32:])):
        path = tmp_path / "out/my/used_pairs" / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, part)))
    model.learnt = {"answer_tokens": 21}
    gpt.save(tmp_path / "out/my/sft.pt", model, tokenizer=data.tokenizer_state(tokenizer))
    commands = (ROOT / "docs" / "own-data.md").read_text().split("```")[-2].strip().splitlines()
    assert [line.split()[0] for line in commands] == ["python", "trl", "python"]
    for line in commands:
        line = line.replace("tools/", f"{ROOT}/tools/") + " --use_cpu" * line.startswith("trl")
        program, *arguments = shlex.split(line)
        program = Path(sys.executable).with_name(program)
        run = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    aligned, state = gpt.load(tmp_path / "out/my/aligned.pt")
    assert state["tokenizer"] == data.tokenizer_state(tokenizer)
    assert aligned.learnt == model.learnt
    pairs = train_dpo.add_reference_logps(model, tokenizer, pairs[:32])
    found = train_dpo.held_out_metrics(aligned, pairs, train_dpo.Config())
    assert found["held-out/loss"] < math.log(2)  # Eq. 7, of the pairs that TRL has trained on
