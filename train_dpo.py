"""Align the fine-tuned model with DPO against a frozen copy of itself, and measure the result.

Eq. 7 of the paper, the loss of one pair:
    −log σ( β log π_θ(y_w|x)/π_ref(y_w|x) − β log π_θ(y_l|x)/π_ref(y_l|x) )

    python train_dpo.py                     pairs of the village, whose true reward is known
    python train_dpo.py --pairs my.jsonl    your own {"prompt", "chosen", "rejected"} lines
    python train_dpo.py --resume            go on where a run was interrupted

Writes out/dpo.pt, the trained policy; out/dpo.jsonl, the metrics of each step; out/dpo.json, the
report; out/pairs.jsonl, or out/used_pairs/ of your own pairs. out/dpo.part.pt is for --resume.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

import data
from dpo import dpo_loss
from lab import evaluate, flags, runs
from lab.flags import flag
from lab.metrics import check_first_loss, means, weight_sums
from lab.pairs import OwnData, Village
from responses import response_logps, response_logps_no_grad


@dataclass
class Config(evaluate.Config):
    """The settings of DPO. Inherited: seed, out, device, dtype, init, max_new_tokens, eval_*.
    own: the default for your own pairs, where 0 means that it is computed from the file."""

    beta: float = flag(0.5, "β of Eq. 7, and of Eq. 3, by which the report judges the policy")
    lr: float = flag(6e-3, "highest rate; for your own data lower for longer responses", own=0)
    optimizer: str = flag("sgd", "adamw needs a far lower --lr", ("sgd", "adamw"), own="adamw")
    momentum: float = flag(0.9, "momentum of sgd", zero=True, below=1)
    epochs: int = flag(1, "passes over the pairs; over your own 200 steps, or 20 passes", own=0)
    batch_size: int = flag(64, "pairs in each step", own=16)
    grad_accum: int = flag(1, "parts of a batch, each with its backward pass: takes less memory")
    num_pairs: int = flag(24_000, "pairs to sample in the village; with fewer, facts stay unlearnt")
    pairs: str = flag("", "your own preference file, in place of the village's pairs")
    held_out: str = flag("", "file to measure on, in place of a tenth of your own prompts")
    skip_bad: bool = flag(False, "leave out bad lines of these files, and count them")
    max_bad: float = flag(0.1, "share of the lines that may be bad with --skip-bad", below=1)
    resume: bool = flag(False, "go on from the last saved state of the same run")


@dataclass
class Pairs:
    """N preference pairs with the reference's log-probabilities. A batch is a smaller Pairs."""

    chosen: list  # N examples (ids, mask): a prompt and its preferred response
    rejected: list  # N examples: the same prompts, the other responses
    ref_chosen_logps: Tensor  # (N,)
    ref_rejected_logps: Tensor  # (N,)

    def __len__(self):
        return len(self.chosen)

    def take(self, rows):
        chosen = [self.chosen[i] for i in rows]
        rejected = [self.rejected[i] for i in rows]
        return Pairs(chosen, rejected, self.ref_chosen_logps[rows], self.ref_rejected_logps[rows])


def add_reference_logps(reference, tokenizer, texts):
    """(prompt, chosen, rejected) texts -> Pairs. The reference never changes, so its two numbers
    per pair are computed once, here, and the loop needs the policy alone."""
    chosen = [data.encode(tokenizer, prompt, response) for prompt, response, _ in texts]
    rejected = [data.encode(tokenizer, prompt, response) for prompt, _, response in texts]
    ref_chosen_logps = response_logps_no_grad(reference, chosen)
    ref_rejected_logps = response_logps_no_grad(reference, rejected)
    return Pairs(chosen, rejected, ref_chosen_logps, ref_rejected_logps)


def pair_losses(policy_chosen_logps, policy_rejected_logps, batch, config):
    """Eq. 7 for each pair of a batch -> (B,). For another loss, give another such function to
    train, check_start and held_out_metrics."""
    losses, _, _ = dpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        batch.ref_chosen_logps,
        batch.ref_rejected_logps,
        config.beta,
    )
    return losses


def pair_metrics(policy_chosen_logps, policy_rejected_logps, batch, config):
    """What is logged of a batch, (B,) each, to be averaged. A new metric is a line here.

    The rewards are computed here, and not by the loss, so that they mean the same for every loss.
    The accuracy of the first step says nothing: policy and reference are still one, so that every
    margin is 0, and rounding alone decides its sign.
    """
    chosen_rewards = config.beta * (policy_chosen_logps.detach() - batch.ref_chosen_logps)
    rejected_rewards = config.beta * (policy_rejected_logps.detach() - batch.ref_rejected_logps)
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "logps/chosen": policy_chosen_logps.detach(),
        "logps/rejected": policy_rejected_logps.detach(),
    }


def train(policy, optimizer, pairs, config, loss_fn=pair_losses, start=0):
    """Skip `start` steps, which were done before --resume; take the rest. Yields the metrics of
    each step, computed before its update."""
    steps = count_steps(config, len(pairs))
    rates = data.learning_rates(config.lr, steps)
    batches = data.batches(len(pairs), config.batch_size, config.seed)
    for lr, rows in list(zip(rates, batches))[start:]:  # the rates have an end, not the batches
        optimizer.param_groups[0]["lr"] = lr
        parts = []
        for k in range(min(config.grad_accum, len(rows))):
            batch = pairs.take(rows[k :: config.grad_accum])  # every grad_accum-th: B pairs
            logps = response_logps(policy, batch.chosen + batch.rejected)  # (2B,)
            policy_chosen_logps, policy_rejected_logps = logps.chunk(2)  # (B,) each
            losses = loss_fn(policy_chosen_logps, policy_rejected_logps, batch, config)  # (B,)
            (losses.sum() / len(rows)).backward()
            part = pair_metrics(policy_chosen_logps, policy_rejected_logps, batch, config)
            parts.append({"loss": losses.detach()} | part)
        metrics = {name: torch.cat([part[name] for part in parts]).mean() for name in parts[0]}
        metrics["grad_norm"] = runs.finite_grad_norm(policy, metrics["loss"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield {name: value.item() for name, value in metrics.items()} | {"lr": lr}


def held_out_metrics(policy, pairs, config, loss_fn=pair_losses):
    """Loss and accuracy on pairs that no step has seen, with standard errors; nothing where there
    are none."""
    if not pairs.chosen:
        return {}
    logps = [response_logps_no_grad(policy, side) for side in (pairs.chosen, pairs.rejected)]
    losses = loss_fn(*logps, pairs, config)  # (N,)
    right = pair_metrics(*logps, pairs, config)["rewards/accuracies"]  # (N,)
    return means("held-out/loss", losses) | means("held-out/accuracy", right)


@torch.no_grad()
def check_start(policy, pairs, config, loss_fn=pair_losses):
    """Check that the policy starts as the reference, where Eq. 7 is −log σ(0) = 0.6931 per pair.

    Any loss must equal what it is with the reference's log-probabilities put in both places. It is
    another where these are of other texts, or where there is noise in the model.
    """
    batch = pairs.take(range(min(config.batch_size, len(pairs))))
    logps = response_logps(policy, batch.chosen + batch.rejected).chunk(2)
    loss = loss_fn(*logps, batch, config).mean().item()
    ref_logps = batch.ref_chosen_logps, batch.ref_rejected_logps
    check_first_loss(loss, loss_fn(*ref_logps, batch, config).mean().item(), config)


def make_optimizer(policy, config):
    if config.optimizer == "sgd":
        return torch.optim.SGD(policy.parameters(), config.lr, config.momentum)
    return torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=0)


def count_steps(config, count):
    """How many steps there are in config.epochs passes over `count` pairs."""
    return config.epochs * math.ceil(count / config.batch_size)


def main():
    config = flags.read_config(Config, "train_dpo.py")
    run = runs.Run("dpo", config)
    policy, tokenizer = runs.load_policy(config)
    # The reference is the policy before any step: after resume() it would be half-trained.
    reference = copy.deepcopy(policy).requires_grad_(False)
    source = (OwnData if config.pairs else Village)(policy, reference, tokenizer, config)
    texts, held_out_texts = source.pairs()
    pairs = add_reference_logps(reference, tokenizer, texts)
    held_out = add_reference_logps(reference, tokenizer, held_out_texts)
    print("the first response, scored tokens marked:", data.paint(tokenizer, *pairs.chosen[0]))
    check_start(policy, pairs, config)
    optimizer = make_optimizer(policy, config)
    run.attach(policy, tokenizer, optimizer, data=texts, reference=weight_sums(reference))
    runs.resume(run)

    def measure():
        # The village holds no pairs out, and probes the reward and KL of fresh samples instead.
        return held_out_metrics(policy, held_out, config) | source.probe()

    if config.pairs:
        run.measure_start(measure)
    steps = count_steps(config, len(pairs))
    for metrics in run.track(train(policy, optimizer, pairs, config, start=run.step), steps):
        run.log(metrics, measure)  # measures, and saves the policy, ten times in a run
    run.finish(held_out_metrics(policy, held_out, config) | source.report())
    print(f"to see it: python experiments/curves.py {config.out}")


if __name__ == "__main__":
    flags.command(main, "--resume goes on from the last saved state")
