"""KTO's data and loop: thumbs, which are single responses with binary feedback, in place of pairs.

The functions stand in for those of the same names in train_dpo.py, and are best read beside them;
the loss is in losses.py. `python variants/train_variant.py --loss kto` runs it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import data
from lab import runs
from lab.metrics import check_first_loss, means
from responses import response_logps, response_logps_no_grad
from train_dpo import count_steps
from variants.losses import kto_loss, kto_reference_point


@dataclass
class Thumbs:
    """N responses, whether each was liked, and what the reference thinks of them."""

    examples: list  # N examples (ids, mask)
    mismatched: list  # N examples: each prompt with a response to another one, for KTO's z
    liked: Tensor  # (N,) bool: a thumb up; False is a thumb down
    ref_logps: Tensor  # (N,)
    ref_mismatched_logps: Tensor  # (N,)

    def __len__(self):
        return len(self.examples)

    def take(self, rows):
        lists = ([part[i] for i in rows] for part in (self.examples, self.mismatched))
        tensors = self.liked, self.ref_logps, self.ref_mismatched_logps
        return Thumbs(*lists, *(tensor[rows] for tensor in tensors))


def mismatch(examples):
    """Each prompt with the response of the next example, round in a circle, that has another
    prompt."""
    prompts = [[i for i, scored in zip(*example) if not scored] for example in examples]
    responses = [[i for i, scored in zip(*example) if scored] for example in examples]
    other = next((i for i, prompt in enumerate(prompts) if prompt != prompts[0]), None)
    if examples and other is None:
        raise SystemExit("KTO needs two different prompts to train on, and two held out")
    mismatched, following = [], 0
    for i in reversed(range(len(prompts))):
        if prompts[following] != prompts[i]:
            other = following
        mismatched.append(data.join_ids(prompts[i], responses[other]))
        following = i
    return mismatched[::-1]


def add_reference_logps(reference, tokenizer, rows):
    """(prompt, completion, liked) rows, or pairs, each of which is a thumb up and one down
    -> Thumbs."""
    if rows and not isinstance(rows[0][2], bool):
        up = [(prompt, chosen, True) for prompt, chosen, _ in rows]
        rows = up + [(prompt, rejected, False) for prompt, _, rejected in rows]
    examples = [data.encode(tokenizer, prompt, text) for prompt, text, _ in rows]
    longest = reference.config.block_size
    mismatched = [(ids[:longest], mask[:longest]) for ids, mask in mismatch(examples)]
    ref_logps = [response_logps_no_grad(reference, part) for part in (examples, mismatched)]
    liked = torch.tensor([row[2] for row in rows], dtype=torch.bool, device=ref_logps[0].device)
    return Thumbs(examples, mismatched, liked, *ref_logps)


def losses_and_metrics(policy_logps, policy_mismatched_logps, batch, config):
    """Losses (B,) and what is logged: rewards less z, by config.beta and not by loss_beta."""
    z_ref = kto_reference_point(policy_mismatched_logps, batch.ref_mismatched_logps)
    losses = kto_loss(policy_logps, batch.ref_logps, batch.liked, z_ref, config.loss_beta)
    rewards = config.beta * (policy_logps - batch.ref_logps - z_ref).detach()
    metrics = {
        "rewards/chosen": (rewards * batch.liked).sum() / batch.liked.sum().clamp(min=1),
        "rewards/rejected": (rewards * ~batch.liked).sum() / (~batch.liked).sum().clamp(min=1),
        "rewards/accuracies": ((rewards > 0) == batch.liked).float().mean(),
        "kto/z_ref": z_ref,
    }
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return losses, metrics


def train_kto(policy, optimizer, thumbs, config, start=0):
    """Yields the metrics of each step after the first `start`."""
    steps = count_steps(config, len(thumbs))
    rates = data.learning_rates(config.lr, steps)
    batches = data.batches(len(thumbs), config.batch_size, config.seed)
    for lr, rows in list(zip(rates, batches))[start:]:
        optimizer.param_groups[0]["lr"] = lr
        batch = thumbs.take(rows)
        logps = response_logps(policy, batch.examples + batch.mismatched)  # (2B,)
        losses, metrics = losses_and_metrics(*logps.chunk(2), batch, config)
        loss = losses.mean()
        loss.backward()
        grad_norm = runs.finite_grad_norm(policy, loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics = {"loss": loss} | metrics | {"grad_norm": grad_norm}
        yield {name: value.item() for name, value in metrics.items()} | {"lr": lr}


def held_out_metrics(policy, thumbs, config):
    """Loss and accuracy on responses that no step has seen; nothing where there are none."""
    if not thumbs.examples:
        return {}
    logps = [response_logps_no_grad(policy, part) for part in (thumbs.examples, thumbs.mismatched)]
    losses, metrics = losses_and_metrics(*logps, thumbs, config)
    accuracy = metrics["rewards/accuracies"].item()
    return means("held-out/loss", losses) | {"held-out/accuracy": accuracy}


@torch.no_grad()
def check_start(policy, thumbs, config):
    """Policy and reference start equal, so each log-ratio and z are 0, and the loss is ½."""
    batch = thumbs.take(range(min(config.batch_size, len(thumbs))))
    logps = response_logps(policy, batch.examples + batch.mismatched).chunk(2)
    ref_logps = batch.ref_logps, batch.ref_mismatched_logps
    losses, expected = (losses_and_metrics(*x, batch, config)[0] for x in (logps, ref_logps))
    check_first_loss(losses.mean().item(), expected.mean().item(), config)
