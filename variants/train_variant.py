"""train_dpo.py with another loss: the same reference, pairs, loop and report.

    python variants/train_variant.py --loss ipo
    python variants/train_variant.py --loss kto --pairs my.jsonl   thumbs up and down, or pairs

`--loss NAME --help` shows the flags that a loss reads. Its own coefficient is --loss-beta; all are
judged by --eval-beta. Writes out/NAME.pt, .jsonl and .json.
"""

import argparse
import copy
import inspect
import math
import sys
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import train_dpo
from lab import flags, runs
from lab.flags import flag
from lab.metrics import weight_sums
from lab.pairs import OwnData, Village
from variants import kto, losses

# A new loss takes three places:
#   1. losses.py: its function, with the five parameters of dpo_loss, used or not; then numbers of
#      its own, which become flags; then, after a *, chosen_lengths and rejected_lengths in tokens.
#   2. Here: a row with its own numbers, and loss_beta if it reads beta; HELP for a new number.
#   3. tests/test_losses.py: its oracle in plain floats and a row of CASES, or a test is red.
LOSSES = {  # name: (function, paper on arXiv, flags that it reads and defaults, found on seed 0)
    "cdpo": (losses.cdpo_loss, "Mitchell", {"loss_beta": 0.3, "label_smoothing": 0.1, "lr": 1e-2}),
    "robust": (losses.robust_loss, "2403.00409",
               {"loss_beta": 0.6, "label_smoothing": 0.1, "lr": 5e-3}),
    "ipo": (losses.ipo_loss, "2310.12036", {"loss_beta": 0.085, "average": False, "lr": 1e-4}),
    "hinge": (losses.hinge_loss, "2309.06657", {"loss_beta": 0.35, "lr": 4e-3}),
    "rpo": (losses.rpo_loss, "2404.19733", {"loss_beta": 0.4, "alpha": 0.1, "lr": 8e-3}),
    "dpop": (losses.dpop_loss, "2402.13228", {"loss_beta": 0.5, "lambda_": 0.1, "lr": 6e-3}),
    "simpo": (losses.simpo_loss, "2405.14734", {"loss_beta": 2.5, "gamma": 0.5, "lr": 2e-3}),
    "orpo": (losses.orpo_loss, "2403.07691",
             {"lambda_": 1.0, "lr": 3e-3, "optimizer": "adamw", "epochs": 2}),
    "kto": (losses.kto_loss, "2402.01306", {"loss_beta": 0.5, "batch_size": 128}),  # by kto.py
    "sppo": (losses.sppo_pair_loss, "2405.00675", {"loss_beta": 0.04, "lr": 5e-5}),
}  # fmt: skip
HELP = {  # of the flags that are no flags of train_dpo.py
    "loss_beta": "the loss's own β, whatever its paper calls it",
    "label_smoothing": "share of the labels that are taken for flipped",
    "average": "means over tokens in place of sums, as in TRL",
    "alpha": "weight of the chosen response's SFT loss",
    "lambda_": "weight of the loss's second term",
    "gamma": "the margin that is asked for",
}


@dataclass
class Config(train_dpo.Config):
    beta: float = flag(0.5, "β of Eq. 3, by which all methods are judged", name="--eval-beta")
    loss: str = flag("ipo", "which relative of DPO", tuple(LOSSES))


def config_of(loss):
    """The flags of a loss: train_dpo.py's, with its own defaults, and those that it alone reads."""
    common, own = {f.name: f for f in fields(Config)}, []
    for name, default in {"loss": loss, **LOSSES[loss][2]}.items():
        below, zero = 0.5 if name == "label_smoothing" else math.inf, name != "loss_beta"
        alone = flag(default, HELP.get(name, ""), zero=zero, below=below)
        alone.type = bool if default is False else float
        like = common.get(name, alone)
        own.append((name, like.type, field(default=default, metadata=like.metadata)))
    return make_dataclass(f"{loss}_config", own, bases=(Config,))


def variant_losses(policy_chosen_logps, policy_rejected_logps, batch, config):
    """What train_dpo.train() calls in place of pair_losses(): another loss of the same pairs, which
    is handed what its parameters name."""
    function, device = LOSSES[config.loss][0], policy_chosen_logps.device
    named = vars(config) | vars(batch) | {"beta": getattr(config, "loss_beta", None)}
    named["policy_chosen_logps"] = policy_chosen_logps
    named["policy_rejected_logps"] = policy_rejected_logps
    for side in ("chosen", "rejected"):
        lengths = [sum(mask) for _, mask in named[side]]  # in tokens
        named[f"{side}_lengths"] = torch.tensor(lengths, device=device)
    return function(**{name: named[name] for name in inspect.signature(function).parameters})


def steps_of(config):
    """-> what reads the texts, what trains, what measures held-out ones, and what checks the start:
    train_dpo.py's functions with another loss, or for single responses those of kto.py."""
    if config.loss == "kto":
        return kto.add_reference_logps, kto.train_kto, kto.held_out_metrics, kto.check_start
    with_a_loss = train_dpo.train, train_dpo.held_out_metrics, train_dpo.check_start
    others = (partial(function, loss_fn=variant_losses) for function in with_a_loss)
    return train_dpo.add_reference_logps, *others


def read_flags():
    """The flags of the loss that --loss names, with its defaults. Those of others are refused."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--loss", nargs="?", default=Config.loss)
    name = parser.parse_known_args()[0].loss
    if name not in LOSSES:
        hint = " (--loss dpo is train_dpo.py)" if name == "dpo" else ""
        raise SystemExit(f"--loss must be one of {', '.join(LOSSES)}, not {name}{hint}")
    config = flags.read_config(config_of(name), f"train_variant.py --loss {name}")
    if name == "kto" and (config.batch_size < 2 or config.grad_accum > 1):
        raise SystemExit("kto's z is a batch's mean: --batch-size from 2 up, no --grad-accum")
    return config


def main():
    config = read_flags()
    add_reference_logps, train, held_out_metrics, check_start = steps_of(config)
    run = runs.Run(config.loss, config)
    policy, tokenizer = runs.load_policy(config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    if config.loss == "orpo" and not config.init:
        # It merges fine-tuning with preference: the SFT model only measures KL.
        device = policy.wte.weight.device
        policy, _ = runs.load_checkpoint(f"{config.out}/pretrained.pt", device, config.dtype)
    source = (OwnData if config.pairs else Village)(policy, reference, tokenizer, config)
    texts, held_out_texts = source.pairs()
    dataset = add_reference_logps(reference, tokenizer, texts)
    held_out = add_reference_logps(reference, tokenizer, held_out_texts)
    if config.loss != "orpo":
        check_start(policy, dataset, config)
    optimizer = train_dpo.make_optimizer(policy, config)
    run.attach(policy, tokenizer, optimizer, data=texts, reference=weight_sums(reference))
    runs.resume(run)

    def measure():
        return held_out_metrics(policy, held_out, config) | source.probe()

    if config.pairs:
        run.measure_start(measure)
    steps = train_dpo.count_steps(config, len(dataset))
    training = train(policy, optimizer, dataset, config, start=run.step)
    for metrics in run.track(training, steps):
        run.log(metrics, measure)
    run.finish(held_out_metrics(policy, held_out, config) | source.report())


if __name__ == "__main__":
    flags.command(main, "--resume goes on from the last saved state")
