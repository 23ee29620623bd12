"""GRPO (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300): no pairs, no value model. The responses
to a question are ranked against each other: advantage = (reward − group mean) / group std.

    python variants/train_grpo.py             the published loss, Eq. 3
    python variants/train_grpo.py --no-std    the plain policy gradient of the DPO paper's Eq. 3

Departures: the reward is the village's own; the std is the sample's, plus 1e-4 against 0/0.

Where the published loss comes to rest is not Eq. 4's optimum, for three reasons.
  std      dividing r by the question's std σ(x) turns β into β σ(x): a question whose samples are
           nearly alike is pushed as hard as one where they differ (arXiv:2503.20783, §3.1).
  length   the mean over tokens gives short responses larger steps, for better and for worse.
  k3       the KL estimator exp(d) − d − 1, d = log π_ref/π_θ, has the right value, but its gradient
           under the policy's samples is that of KL(π_ref‖π_θ), the other direction. Then
           π(y|x) = β σ π_ref(y|x) / (λ(x) − r(x, y)) is the best policy, where λ(x) makes it sum to
           one: a hyperbola, not an exponential (of responses of several tokens, token by token).
--no-std does without all three: only the mean is subtracted, the loss is a sum over tokens, and
−β log π_θ/π_ref is part of the reward. Writes out/grpo.pt, .jsonl and .json (grpo_no_std.*).
"""

import copy
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import dpo
from lab import evaluate, flags, runs
from lab.flags import flag
from lab.pairs import Village
from responses import sample_responses
from variants.losses import clipped_loss


@dataclass
class Config(evaluate.Config):
    no_std: bool = flag(False, "the plain policy gradient of Eq. 3 at --eval-beta")
    kl_beta: float = flag(0.35, "weight of k3 in the published loss")
    steps: int = flag(60, "steps, each on fresh samples")
    questions: int = flag(64, "questions in each step")
    group: int = flag(8, "responses to each question")
    minibatches: int = flag(2, "parts of a step's samples, one update for each")
    clip: float = flag(0.2, "clip range of a token's probability ratio, around 1")
    lr: float = flag(6e-4, "the highest learning rate, of AdamW")


def group_advantages(rewards, divide_by_std):
    """rewards (questions, group) -> advantages of that shape; a group of equals has zeros."""
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return advantages


def grpo_loss(logps, old_logps, ref_logps, mask, advantages, clip, kl_beta):
    """Eq. 3 with Eq. 4's k3. logps, old_logps, ref_logps, mask (B, T), advantages (B,) -> (B,)."""
    d = ref_logps - logps
    k3 = d.exp() - d - 1  # (B, T), at least 0
    losses = clipped_loss(logps, old_logps, advantages[:, None], clip) + kl_beta * k3  # (B, T)
    return losses.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1)


def policy_gradient_loss(logps, old_logps, mask, advantages, clip):
    """The same without KL (it is in the reward) and as a sum over tokens -> (B,)."""
    losses = clipped_loss(logps, old_logps, advantages[:, None], clip)
    return losses.masked_fill(~mask, 0).sum(dim=1)


@torch.no_grad()
def roll_out(models, prompts, config, generator):
    """One response per prompt, by the policy as it is now.

    -> texts; ids and mask (B, T); log π_ref of every token (B, T-1).
    """
    policy, reference, tokenizer = models
    examples, texts = sample_responses(policy, tokenizer, prompts, config, "samples", generator)
    ids, mask = data.collate(examples, policy.wte.weight.device)
    return texts, ids, mask, dpo.token_logps(reference(ids), ids, mask)


def train_on_groups(models, config, questions, reward):
    """Yields each step's metrics: the loss and its gradient's norm are the last minibatch's.

    reward(prompts, texts) -> (B,).
    """
    policy, *_ = models
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0)
    rng = random.Random(config.seed)
    generator = torch.Generator(policy.wte.weight.device).manual_seed(config.seed)
    for lr in data.learning_rates(config.lr, config.steps):
        optimizer.param_groups[0]["lr"] = lr
        asked = rng.choices(questions, k=config.questions)
        prompts = [question for question in asked for _ in range(config.group)]
        texts, ids, mask, ref_logps = roll_out(models, prompts, config, generator)
        with torch.no_grad():
            old_logps = dpo.token_logps(policy(ids), ids, mask)  # (B, T-1)
        log_ratios = (old_logps - ref_logps).sum(dim=1)  # (B,)
        rewards = reward(prompts, texts).to(ids.device)
        scores = rewards - config.beta * log_ratios if config.no_std else rewards
        advantages = group_advantages(scores.view(-1, config.group), not config.no_std).flatten()
        order = torch.randperm(len(ids), generator=generator, device=ids.device)
        for rows in order.chunk(config.minibatches):
            logps = dpo.token_logps(policy(ids[rows]), ids[rows], mask[rows])
            batch = mask[rows, 1:], advantages[rows]
            if config.no_std:
                losses = policy_gradient_loss(logps, old_logps[rows], *batch, config.clip)
            else:
                args = old_logps[rows], ref_logps[rows], *batch, config.clip, config.kl_beta
                losses = grpo_loss(logps, *args)
            loss = losses.mean()
            loss.backward()
            grad_norm = runs.finite_grad_norm(policy, loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield {
            "reward": rewards.mean().item(),
            "kl": log_ratios.mean().item(),
            "loss": loss.item(),
            "grad_norm": grad_norm.item(),
            "lr": lr,
        }


def count_labels(config):
    """How many true rewards are asked for."""
    return config.steps * config.questions * config.group


def main():
    config = flags.read_config(Config, "train_grpo.py")
    if config.group < 2:
        raise SystemExit(f"--group must be at least 2, to be ranked, not {config.group}")
    run = runs.Run("grpo_no_std" if config.no_std else "grpo", config)
    policy, tokenizer = runs.load_policy(config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    source = Village(policy, reference, tokenizer, config)
    run.attach(policy, tokenizer)
    labels = count_labels(config)
    print(f"{labels} true rewards will be asked for")
    models = policy, reference, tokenizer
    training = train_on_groups(models, config, source.train, evaluate.true_rewards)
    for metrics in run.track(training, config.steps):
        run.log(metrics, source.probe)
    run.finish(source.report() | {"labels": labels})


if __name__ == "__main__":
    flags.command(main)
