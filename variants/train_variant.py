"""train_dpo.py with another loss: the same reference, pairs, loop and report.

    python variants/train_variant.py --loss ipo
    python variants/train_variant.py --loss kto --pairs my.jsonl   thumbs up and down, or pairs

--loss: cdpo robust ipo hinge rpo simpo orpo kto sppo. Optimality is measured at --beta, one for all
methods; a loss's own coefficient is --loss-beta. Writes out/NAME.pt, .jsonl and .json.
"""

import copy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import train_dpo
from lab import flags, runs
from lab.flags import flag
from lab.pairs import OwnData, Village
from variants import kto, losses

# Found by a small sweep on seed 0 (README, "The family").
DEFAULTS = {
    "cdpo": {"loss_beta": 0.3, "lr": 1e-2},
    "robust": {"loss_beta": 0.6, "lr": 5e-3},
    "ipo": {"loss_beta": 0.085, "lr": 1e-4},
    "hinge": {"loss_beta": 0.35, "lr": 4e-3},
    "rpo": {"loss_beta": 0.4, "lr": 8e-3},
    "simpo": {"loss_beta": 2.5, "lr": 2e-3},
    "orpo": {"lambda_": 1.0, "lr": 3e-3, "optimizer": "adamw", "epochs": 2},
    "kto": {"batch_size": 128},
    "sppo": {"loss_beta": 0.04, "lr": 5e-5},
}


@dataclass
class Config(train_dpo.Config):
    beta: float = flag(0.5, "β of Eq. 3, by which all methods are judged alike")
    loss: str = flag("ipo", "which relative of DPO", choices=tuple(DEFAULTS))
    loss_beta: float = flag(0.5, "the loss's own coefficient, called β in its paper")
    label_smoothing: float = flag(0.1, "cdpo, robust: share of flipped labels", below=0.5)
    average: bool = flag(False, "ipo: means over tokens, as TRL has it")
    alpha: float = flag(0.1, "rpo: weight of the chosen response's SFT loss")
    gamma: float = flag(0.5, "simpo: the margin asked for")
    lambda_: float = flag(0.5, "orpo: weight of the odds ratio")


def variant_losses(policy_chosen_logps, policy_rejected_logps, batch, config):
    """What train_dpo.train() calls in place of pair_losses(): another loss of the same pairs."""
    chosen, rejected = policy_chosen_logps, policy_rejected_logps
    ref_chosen, ref_rejected = batch.ref_chosen_logps, batch.ref_rejected_logps
    four, beta = (chosen, rejected, ref_chosen, ref_rejected), config.loss_beta
    lengths = {  # in tokens
        f"{name}_lengths": torch.tensor([sum(mask) for _, mask in side], device=chosen.device)
        for name, side in (("chosen", batch.chosen), ("rejected", batch.rejected))
    }
    match config.loss:
        case "cdpo":
            return losses.cdpo_loss(*four, beta, config.label_smoothing)
        case "robust":
            return losses.robust_loss(*four, beta, config.label_smoothing)
        case "ipo":
            return losses.ipo_loss(*four, beta, config.average, **lengths)
        case "hinge":
            return losses.hinge_loss(*four, beta)
        case "rpo":
            return losses.rpo_loss(*four, beta, config.alpha, **lengths)
        case "simpo":
            return losses.simpo_loss(*four, beta, config.gamma, **lengths)
        case "orpo":
            return losses.orpo_loss(*four, beta, config.lambda_, **lengths)
        case "sppo":  # one label a pair: the chosen response has won all its comparisons
            won = torch.ones_like(chosen)
            chosen_losses = losses.sppo_loss(chosen, ref_chosen, won, beta)
            return (chosen_losses + losses.sppo_loss(rejected, ref_rejected, 1 - won, beta)) / 2


def steps_of(config):
    """-> what reads the texts, what trains, what measures held-out ones, and what checks the start:
    train_dpo.py's functions with another loss, or for single responses those of kto.py."""
    if config.loss == "kto":
        return kto.add_reference_logps, kto.train, kto.held_out_metrics, kto.check_start
    with_a_loss = train_dpo.train, train_dpo.held_out_metrics, train_dpo.check_start
    others = (partial(function, loss_fn=variant_losses) for function in with_a_loss)
    return train_dpo.add_reference_logps, *others


def read_flags():
    """The flags, with the defaults of the loss that they name."""
    name = flags.read_config(Config, "train_variant.py").loss
    config = flags.read_config(Config, "train_variant.py", **DEFAULTS[name])
    if name == "kto" and (config.batch_size < 2 or config.grad_accum > 1):
        raise SystemExit("kto's z is a batch's mean: --batch-size from 2 up, no --grad-accum")
    return config


def main():
    config = read_flags()
    add_reference_logps, train, held_out_metrics, check_start = steps_of(config)
    run = runs.Run(config.loss, config)
    policy, tokenizer = runs.load_policy(config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    if config.loss == "orpo":  # merges fine-tuning with preference: the SFT model only measures KL
        sft = Path(config.init or f"{config.out}/sft.pt")
        pretrained, device = sft.with_name("pretrained.pt"), policy.wte.weight.device
        policy, _ = runs.load_checkpoint(pretrained, device, config.dtype)
    source = (OwnData if config.pairs else Village)(policy, reference, tokenizer, config)
    texts, held_out_texts = source.pairs()
    dataset = add_reference_logps(reference, tokenizer, texts)
    held_out = add_reference_logps(reference, tokenizer, held_out_texts)
    if config.loss != "orpo":
        check_start(policy, dataset, config)
    optimizer = train_dpo.make_optimizer(policy, config)
    run.attach(policy, tokenizer, optimizer, data=texts, reference=runs.weight_sums(reference))
    runs.resume(run)

    def measure():
        return held_out_metrics(policy, held_out, config) | source.probe()

    steps = train_dpo.count_steps(config, len(dataset))
    training = train(policy, optimizer, dataset, config, start=run.step)
    for metrics in run.track(training, steps):
        run.log(metrics, measure)
    run.finish(held_out_metrics(policy, held_out, config) | source.report())


if __name__ == "__main__":
    flags.command(main, "--resume goes on from the last saved state")
