"""Align the fine-tuned model with DPO, Eq. 7, against a frozen copy of itself, and measure it.

    python train_dpo.py                     pairs sampled from the reference, labelled by Eq. 1
    python train_dpo.py --pairs my.jsonl    your own {"prompt", "chosen", "rejected"} lines
    python train_dpo.py --resume            go on where a run was interrupted

Writes out/pairs.jsonl, out/dpo.pt, out/dpo.jsonl (metrics of the steps), out/dpo.json (the report);
while it runs, the policy so far and what --resume needs in out/dpo.part.pt.
"""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

import data
from dpo import dpo_loss
from lab import evaluate, flags, runs
from lab.flags import flag
from lab.pairs import OwnData, Village
from responses import response_logps, response_logps_no_grad


@dataclass
class Config(evaluate.Config):
    """The settings of DPO; lab/evaluate.py and lab/flags.py have those that are no part of it."""

    beta: float = flag(0.5, "β of Eq. 7; also of Eq. 3, by which the village judges")
    lr: float = flag(6e-3, "the highest learning rate: the best of three, README")
    optimizer: str = flag("sgd", "leaks less than adamw here, README", ("sgd", "adamw"))
    momentum: float = flag(0.9, "of sgd", zero=True, below=1)
    epochs: int = flag(1, "more learn the labels' noise by heart")
    batch_size: int = flag(64, "pairs a step")
    grad_accum: int = flag(1, "backward passes a step, each of as many pairs: saves memory")
    num_pairs: int = flag(24_000, "to sample in the village: fewer learn the facts less")
    pairs: str = flag("", "own preference file, in place of the village's pairs")
    skip_bad: bool = flag(False, "count the bad lines of that file, and go on")
    resume: bool = flag(False, "from the last saved state of the same run")


@dataclass
class Pairs:
    """N preference pairs and what the reference thinks of them. A batch is a smaller one."""

    chosen: list  # N examples (ids, mask): a prompt and its preferred response
    rejected: list  # N examples: the same prompts, the other responses
    ref_chosen_logps: Tensor  # (N,)
    ref_rejected_logps: Tensor  # (N,)

    def __len__(self):
        return len(self.chosen)

    def take(self, rows):
        chosen, rejected = ([side[i] for i in rows] for side in (self.chosen, self.rejected))
        return Pairs(chosen, rejected, self.ref_chosen_logps[rows], self.ref_rejected_logps[rows])


def add_reference_logps(reference, tokenizer, texts):
    """(prompt, chosen, rejected) texts -> Pairs. The reference never changes, and so it reads each
    response once, here, and not again at every step."""
    if texts and isinstance(texts[0][2], bool):
        raise SystemExit("likes make no pairs: python variants/train_variant.py --loss kto")
    chosen = [data.encode(tokenizer, prompt, response) for prompt, response, _ in texts]
    rejected = [data.encode(tokenizer, prompt, response) for prompt, _, response in texts]
    ref_logps = (response_logps_no_grad(reference, responses) for responses in (chosen, rejected))
    return Pairs(chosen, rejected, *ref_logps)


def pair_losses(policy_chosen_logps, policy_rejected_logps, batch, config):
    """Eq. 7 for each pair of a batch -> (B,). A relative of DPO hands train() its own function."""
    losses, _, _ = dpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        batch.ref_chosen_logps,
        batch.ref_rejected_logps,
        config.beta,
    )
    return losses


def pair_metrics(policy_chosen_logps, policy_rejected_logps, batch, config):
    """What is logged of a batch, whatever its loss. A new metric is one more line here.

    Accuracy says nothing at step 0, where policy and reference are one: the sign of each margin is
    rounding noise.
    """
    chosen_rewards = config.beta * (policy_chosen_logps.detach() - batch.ref_chosen_logps)
    rejected_rewards = config.beta * (policy_rejected_logps.detach() - batch.ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "logps/chosen": policy_chosen_logps.detach().mean(),
        "logps/rejected": policy_rejected_logps.detach().mean(),
    }


def train(policy, optimizer, pairs, config, loss_fn=pair_losses, start=0):
    """Go down Eq. 7, and yield the metrics of each step after the first `start`."""
    batch_size, steps = count_steps(config, len(pairs))
    rates = data.learning_rates(config.lr, steps)
    batches = data.batches(len(pairs), batch_size, steps, config.seed)
    for step, rows in itertools.islice(enumerate(batches), start, None):
        optimizer.param_groups[0]["lr"] = rates[step]
        parts = []
        for k in range(config.grad_accum):
            batch = pairs.take(rows[k :: config.grad_accum])  # B pairs
            logps = response_logps(policy, batch.chosen + batch.rejected)  # (2B,)
            policy_chosen_logps, policy_rejected_logps = logps.chunk(2)  # (B,) each
            losses = loss_fn(policy_chosen_logps, policy_rejected_logps, batch, config)  # (B,)
            (losses.mean() / config.grad_accum).backward()
            metrics = pair_metrics(policy_chosen_logps, policy_rejected_logps, batch, config)
            parts.append({"loss": losses.detach().mean()} | metrics)
        metrics = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        metrics["grad_norm"] = runs.finite_grad_norm(policy, metrics["loss"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield {name: value.item() for name, value in metrics.items()} | {"lr": rates[step]}


def held_out_metrics(policy, pairs, config, loss_fn=pair_losses):
    """Loss and accuracy on pairs that no step has seen; nothing where there are none."""
    if not len(pairs):
        return {}
    logps = [response_logps_no_grad(policy, side) for side in (pairs.chosen, pairs.rejected)]
    return {
        "held-out/loss": loss_fn(*logps, pairs, config).mean().item(),
        "held-out/accuracy": pair_metrics(*logps, pairs, config)["rewards/accuracies"].item(),
    }


@torch.no_grad()
def check_start(policy, pairs, config, loss_fn=pair_losses):
    """Before its first step the policy is the reference, and Eq. 7 is ln 2 = 0.6931 for every pair.

    For any loss: it must be what the reference's own log-probabilities give.
    """
    batch_size, _ = count_steps(config, len(pairs))
    batch = pairs.take(range(batch_size))
    logps = response_logps(policy, batch.chosen + batch.rejected).chunk(2)
    loss = loss_fn(*logps, batch, config).mean().item()
    ref_logps = batch.ref_chosen_logps, batch.ref_rejected_logps
    runs.check_first_loss(loss, loss_fn(*ref_logps, batch, config).mean().item(), config)


def make_optimizer(policy, config):
    if config.optimizer == "sgd":
        return torch.optim.SGD(policy.parameters(), config.lr, config.momentum)
    return torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=0)


def count_steps(config, count):
    """How many of `count` pairs a step takes, and how many steps there are."""
    batch_size = min(config.batch_size, count)
    if batch_size % config.grad_accum:
        raise SystemExit(f"--grad-accum {config.grad_accum} does not divide a step's {batch_size}")
    return batch_size, max(1, config.epochs * count // batch_size)


SHOWN = "loss", "rewards/margins", "rewards/accuracies"


def main():
    config = flags.read_config(Config, "train_dpo.py")
    run = runs.Run("dpo", config)
    policy, tokenizer = runs.load_policy(config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    source = (OwnData if config.pairs else Village)(policy, reference, tokenizer, config)
    texts, held_out_texts = source.pairs()
    pairs = add_reference_logps(reference, tokenizer, texts)
    held_out = add_reference_logps(reference, tokenizer, held_out_texts)
    print("the first response, scored tokens marked:", data.paint(tokenizer, *pairs.chosen[0]))
    check_start(policy, pairs, config)
    optimizer = make_optimizer(policy, config)
    run.keep(policy, tokenizer, optimizer, data=texts, reference=runs.weight_sums(reference))
    run.resume()
    run.lap("pairs, read by the reference")
    training = train(policy, optimizer, pairs, config, start=run.step)
    _, steps = count_steps(config, len(pairs))
    for metrics in run.track(training, steps, SHOWN):  # ten times on the way
        metrics |= held_out_metrics(policy, held_out, config) | source.probe()
    run.finish(held_out_metrics(policy, held_out, config) | source.report())


if __name__ == "__main__":
    flags.command(main, "--resume goes on from the last saved state")
