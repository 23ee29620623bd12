"""What DPO replaces: a reward model fitted to the pairs (Eq. 2), then PPO against it (Eq. 3).

    python variants/train_rlhf.py                  the learned reward, from the pairs DPO gets
    python variants/train_rlhf.py --true-reward    no reward model: the paper's PPO-GT

PPO is Schulman et al. 2017, arXiv:1707.06347, with advantages by GAE, arXiv:1506.02438. Every token
costs β log π_θ/π_ref and the last one earns the reward of the whole text, as in arXiv:1909.08593.
Departures from usual code, to stay with Eq. 3: losses are sums over a response's tokens, advantages
are not whitened, there is no discount, and the value loss is not clipped. The reward model sums its
head over the response's tokens (docs/family.md). A response that was cut off earns −3. The value
head also trains the policy's trunk. In PPO's steps --dtype is for the reference only.
Writes out/rlhf.pt, .jsonl and .json (ppo_gt.* with --true-reward).
"""

import copy
import dataclasses
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import dpo
from lab import evaluate, flags, runs, village
from lab.flags import flag
from lab.pairs import Village, noise_limits, sample_pairs
from variants.losses import clipped_loss
from variants.reward_model import accuracy, learned_reward, scalar_head, train_reward_model
from variants.train_grpo import roll_out


@dataclass
class Config(evaluate.Config):
    true_reward: bool = flag(False, "the village's own reward in place of a learned one")
    num_pairs: int = flag(24_000, "pairs for the reward model")
    batch_size: int = flag(64, "pairs in each step of the reward model")
    reward_lr: float = flag(1e-3, "highest learning rate of the reward model, by AdamW")
    reward_epochs: int = flag(2, "passes of the reward model over its pairs")
    kl_beta: float = flag(0.5, "weight of the KL in training")
    steps: int = flag(60, "steps of PPO, each on fresh samples")
    samples: int = flag(512, "samples in each step")
    minibatches: int = flag(2, "parts of a step's samples, one update for each")
    clip: float = flag(0.2, "clip range of a token's probability ratio, around 1")
    gae_lambda: float = flag(0.95, "λ of GAE: how far ahead an advantage looks")
    value_weight: float = flag(0.1, "weight of the value head's squared error")
    lr: float = flag(3e-4, "learning rate of the policy, by AdamW")
    value_lr: float = flag(1e-2, "learning rate of the value head, which starts at zero")


def gae(rewards, values, gae_lambda):
    """Σ_k λ^k δ_{t+k}, δ_t = r_t + V_{t+1} − V_t (Eq. 16 without discount): (B, T) each -> (B, T).

    V is zero after a response's last token.
    """
    advantages, following, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        following = advantages[:, t] = delta + gae_lambda * following
        next_value = values[:, t]
    return advantages


def token_rewards(scores, log_ratios, mask, kl_beta):
    """scores (B,), log π_θ/π_ref of each token and mask (B, T) -> each token's reward (B, T)."""
    last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)  # the last scored token
    return -kl_beta * log_ratios + last * scores[:, None]


def logps_and_values(policy, value_head, ids, mask):
    """-> log π of every token and the value before it, (B, T-1) each, 0 where not scored."""
    hidden = policy.hidden(ids)  # (B, T, C)
    values = value_head(hidden)[:, :-1, 0].masked_fill(~mask[:, 1:], 0)
    return dpo.token_logps(policy.lm_head(hidden), ids, mask), values


def train_ppo(models, config, questions, reward, true_reward=evaluate.true_rewards):
    """Yields each step's metrics: those of the loss are the last minibatch's.

    reward(prompts, texts) -> (B,); the true one is only logged.
    """
    policy, *_ = models
    value_head = scalar_head(policy)
    both = torch.nn.ModuleList([policy, value_head])
    rates = [data.learning_rates(lr, config.steps) for lr in (config.lr, config.value_lr)]
    groups = [{"params": part.parameters()} for part in both]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    rng = random.Random(config.seed)
    generator = torch.Generator(policy.wte.weight.device).manual_seed(config.seed)
    for step in range(config.steps):
        for group, group_rates in zip(optimizer.param_groups, rates):
            group["lr"] = group_rates[step]
        prompts = rng.choices(questions, k=config.samples)
        texts, ids, mask, ref_logps = roll_out(models, prompts, config, generator)
        scores = reward(prompts, texts).to(ids.device)
        with torch.no_grad():
            old_logps, values = logps_and_values(policy, value_head, ids, mask)
        scored, log_ratios = mask[:, 1:], old_logps - ref_logps  # (B, T-1)
        rewards = token_rewards(scores, log_ratios, scored, config.kl_beta)
        advantages = gae(rewards, values, config.gae_lambda)
        targets = advantages + values
        order = torch.randperm(len(ids), generator=generator, device=ids.device)
        for rows in order.chunk(config.minibatches):
            logps, new_values = logps_and_values(policy, value_head, ids[rows], mask[rows])
            losses = clipped_loss(logps, old_logps[rows], advantages[rows], config.clip)
            errors = (new_values - targets[rows]) ** 2
            losses, errors = ((x * scored[rows]).sum(dim=1).mean() for x in (losses, errors))
            ratio = (logps.detach() - old_logps[rows])[scored[rows]].exp().mean()
            loss = losses + config.value_weight * errors
            loss.backward()
            grad_norm = runs.finite_grad_norm(both, loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield {
            "reward": scores.mean().item(),
            "true_reward": true_reward(prompts, texts).mean().item(),
            "kl": log_ratios.sum(dim=1).mean().item(),
            "loss": losses.item(),
            "ratio": ratio.item(),
            "value_error": errors.item() / scored[rows].sum(dim=1).float().mean().item(),
            "grad_norm": grad_norm.item(),
            "lr": optimizer.param_groups[0]["lr"],
        }


def fit_reward_model(reference, tokenizer, config, run):
    """-> the learned reward, and for the report how well it knows pairs that it has not seen."""
    train_questions, held_out, _ = village.split_questions()
    pairs = sample_pairs(reference, tokenizer, config, train_questions)
    run.lap("pairs")
    reward_model = train_reward_model(reference, tokenizer, pairs, config)
    reward = learned_reward(reward_model, tokenizer)
    run.lap("reward model")
    fresh = dataclasses.replace(config, num_pairs=2000, seed=config.seed + 1)
    fresh_pairs = sample_pairs(reference, tokenizer, fresh, held_out)
    limits, found = noise_limits(fresh_pairs), accuracy(reward, fresh_pairs)
    print(
        f"reward model: accuracy {found:.3f} on fresh pairs on held-out questions; noisy labels "
        f"allow {limits['best_accuracy']:.3f}"
    )
    run.lap("accuracy of the reward model")
    return reward, {"labels": config.num_pairs, "pairs": limits, "reward_model_accuracy": found}


def main():
    config = flags.read_config(Config, "train_rlhf.py")
    run = runs.Run("ppo_gt" if config.true_reward else "rlhf", config)
    policy, tokenizer = runs.load_policy(config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    source = Village(policy, reference, tokenizer, config)
    if config.true_reward:
        reward, extra = evaluate.true_rewards, {"labels": config.steps * config.samples}
    else:
        reward, extra = fit_reward_model(reference, tokenizer, config, run)
    run.attach(policy, tokenizer)
    models = policy, reference, tokenizer
    training = train_ppo(models, config, source.train, reward)
    for metrics in run.track(training, config.steps):
        run.log(metrics, source.probe)
    run.finish(source.report() | extra)


if __name__ == "__main__":
    flags.command(main)
