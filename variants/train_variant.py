"""train_dpo.py with another loss: the same reference, pairs, loop and report.

    python variants/train_variant.py --loss ipo
    python variants/train_variant.py --loss kto --pairs my.jsonl   thumbs up and down, or pairs

--loss: cdpo robust ipo hinge rpo simpo orpo kto sppo. Optimality is measured at --beta, one for all
methods; a loss's own coefficient is --loss-beta. Writes out/NAME.pt, .jsonl and .json.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import evaluate
import train_dpo
from train_sft import read_config, run_command, set_speed
from variants import losses

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
    loss: str = "ipo"
    loss_beta: float = 0.5  # the loss's own coefficient, called β in its paper
    label_smoothing: float = 0.1  # cdpo, robust: the share of flipped labels believed in
    average: bool = False  # ipo: means over tokens
    alpha: float = 0.1  # rpo: weight of the chosen response's SFT loss
    gamma: float = 0.5  # simpo: the margin asked for
    lambda_: float = 0.5  # orpo: weight of the odds ratio


def pair_losses(config, four, by_length):
    """The losses (B,) of a batch of pairs: four log-probabilities, and lengths by keyword."""
    beta = config.loss_beta
    match config.loss:
        case "cdpo":
            return losses.cdpo_loss(*four, beta, config.label_smoothing)
        case "robust":
            return losses.robust_loss(*four, beta, config.label_smoothing)
        case "ipo":
            return losses.ipo_loss(*four, beta, config.average, **by_length)
        case "hinge":
            return losses.hinge_loss(*four, beta)
        case "rpo":
            return losses.rpo_loss(*four, beta, config.alpha, **by_length)
        case "simpo":
            return losses.simpo_loss(*four, beta, config.gamma, **by_length)
        case "orpo":
            return losses.orpo_loss(*four, beta, config.lambda_, **by_length)
        case "sppo":  # one label a pair: the chosen response has won all its comparisons
            chosen, rejected, ref_chosen, ref_rejected = four
            won = torch.ones_like(chosen)
            chosen_losses = losses.sppo_loss(chosen, ref_chosen, won, beta)
            return (chosen_losses + losses.sppo_loss(rejected, ref_rejected, 1 - won, beta)) / 2


def pair_loss_fn(config):
    """What train_dpo.train() calls: DPO's metrics, another loss."""

    def loss_fn(policy_logps, lengths, ref_chosen_logps, ref_rejected_logps, beta):
        given = ref_chosen_logps, ref_rejected_logps
        _, metrics = train_dpo.loss_and_metrics(policy_logps, lengths, *given, beta)
        by_length = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2)))
        return pair_losses(config, (*policy_logps.chunk(2), *given), by_length), metrics

    return loss_fn


# --------------------------------------------------------------------------------------------------
# KTO: single responses with a thumb, and mismatched ones


def mismatch(examples):
    """Each prompt with the response of the next example, the last's being the first, that has
    another prompt."""
    prompts = [[i for i, scored in zip(*example) if not scored] for example in examples]
    responses = [[i for i, scored in zip(*example) if scored] for example in examples]
    if all(prompt == prompts[0] for prompt in prompts):
        raise SystemExit("KTO needs two prompts to train on and two held out: one in ten is, so 12")
    mismatched = []
    for i, prompt in enumerate(prompts):
        j = next(
            j for k in range(1, len(prompts)) if prompts[j := (i + k) % len(prompts)] != prompt
        )
        mismatched.append(data.join_ids(prompt, responses[j]))
    return mismatched


def prepare_thumbs(reference, tokenizer, rows):
    """(prompt, completion, label) rows, or pairs -> what train() takes.

    Its sides are the responses and the mismatched ones; given are the reference's log-probabilities
    of both, and whether a response is desirable. A pair is a thumb up and a thumb down.
    """
    if not isinstance(rows[0][2], bool):
        pairs = rows
        rows = [(prompt, chosen, True) for prompt, chosen, _ in pairs]
        rows += [(prompt, rejected, False) for prompt, _, rejected in pairs]
    examples = [data.encode(tokenizer, prompt, text) for prompt, text, _ in rows]
    longest = reference.config.block_size
    sides = examples, [(ids[:longest], mask[:longest]) for ids, mask in mismatch(examples)]
    ref_logps = [evaluate.known_logps(reference, side, tokenizer.eot_token) for side in sides]
    return sides, [*ref_logps, torch.tensor([label for _, _, label in rows])]


def kto_loss_fn(config):
    """What train_dpo.train() calls for KTO."""

    def loss_fn(policy_logps, lengths, ref_logps, ref_mismatched_logps, desirable, beta):
        policy_logps, policy_mismatched_logps = policy_logps.chunk(2)
        z_ref = losses.kto_reference_point(policy_mismatched_logps, ref_mismatched_logps)
        rewards = beta * (policy_logps - ref_logps - z_ref).detach()
        metrics = {
            "rewards/chosen": (rewards * desirable).sum() / desirable.sum().clamp(min=1),
            "rewards/rejected": (rewards * ~desirable).sum() / (~desirable).sum().clamp(min=1),
            "rewards/accuracies": ((rewards > 0) == desirable).float().mean(),
            "kto/z_ref": z_ref,
        }
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return losses.kto_loss(policy_logps, ref_logps, desirable, z_ref, config.loss_beta), metrics

    return loss_fn


# --------------------------------------------------------------------------------------------------


def at_the_reference(config):
    """The loss where policy and reference are one, None where it depends on log π_θ itself."""
    quarter = 1 / (4 * config.loss_beta**2)
    known = {"ipo": quarter, "sppo": quarter, "hinge": 1, "kto": 0.5}
    known |= dict.fromkeys(("cdpo", "robust"), train_dpo.LN2)
    return known.get(config.loss)


def choose(config):
    """-> the last three arguments of train_dpo.align()."""
    if config.loss == "kto":
        return prepare_thumbs, kto_loss_fn(config), at_the_reference(config)
    return train_dpo.prepare_pairs, pair_loss_fn(config), at_the_reference(config)


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--loss", nargs="?", default=Config.loss)
    name = parser.parse_known_args()[0].loss
    if name not in DEFAULTS:
        raise SystemExit(f"--loss must be one of {', '.join(DEFAULTS)}, not {name}")
    config = read_config(Config, "train_variant.py", **DEFAULTS[name])
    if config.label_smoothing >= 0.5:
        raise SystemExit("--label-smoothing must be below 0.5: at half, labels say nothing")
    if name == "kto" and (config.batch_size < 2 or config.grad_accum > 1):
        raise SystemExit("kto's z is a batch's mean: --batch-size from 2 up, no --grad-accum")
    policy, reference, tokenizer = train_dpo.start(config)
    if name == "orpo":  # merges fine-tuning with preference: the SFT model only measures KL
        sft, device = Path(config.init or f"{config.out}/sft.pt"), policy.wte.weight.device
        beside = dataclasses.replace(config, init=str(sft.with_name("pretrained.pt")))
        policy = train_dpo.load_checkpoint(beside, device)[0].requires_grad_(True)
        set_speed(policy, config, device)
    train_dpo.align(name, (policy, reference, tokenizer), config, *choose(config))


if __name__ == "__main__":
    run_command(main, "--resume goes on from the last saved state")
