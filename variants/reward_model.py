"""The reward model of Eq. 2, which DPO makes unnecessary: a scalar head on the SFT model.

train_rlhf.py optimises a policy against it, train_selfplay.py lets it judge. By Lemma 1 of the
paper it is known up to a constant for each prompt, which changes neither's optimum.
"""

import copy
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from lab import runs, village


class RewardModel(torch.nn.Module):
    """The SFT model with a scalar head in place of its last projection."""

    def __init__(self, reference):
        super().__init__()
        self.trunk = copy.deepcopy(reference).requires_grad_(True)
        self.head = scalar_head(reference)

    def forward(self, ids, mask):
        """ids, mask (B, T) -> the reward of each text (B,), the sum over its scored tokens."""
        scores = self.head(self.trunk.hidden(ids))[:, :, 0]  # (B, T)
        return (scores * mask).sum(dim=1)


def scalar_head(model):
    head = torch.nn.Linear(model.config.n_embd, 1).to(model.wte.weight.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def reward_model_loss(chosen_rewards, rejected_rewards):
    """Eq. 2: −log σ(r(x, y_w) − r(x, y_l)), (B,) each -> (B,)."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def train_reward_model(reference, tokenizer, pairs, config):
    """(prompt, chosen, rejected) texts -> the reward model, trained by Eq. 2."""
    if not pairs:
        raise SystemExit("the reward model has no pair to learn from")
    model = RewardModel(reference)
    device = model.head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), config.reward_lr, weight_decay=0)
    chosen = [data.encode(tokenizer, prompt, response) for prompt, response, _ in pairs]
    rejected = [data.encode(tokenizer, prompt, response) for prompt, _, response in pairs]
    steps = config.reward_epochs * math.ceil(len(pairs) / config.batch_size)
    rates = data.learning_rates(config.reward_lr, steps)
    batches = data.batches(len(pairs), config.batch_size, config.seed)
    for rate, rows in zip(tqdm(rates, "reward model", leave=False, disable=None), batches):
        optimizer.param_groups[0]["lr"] = rate
        examples = [side[i] for side in (chosen, rejected) for i in rows]
        ids, mask = data.collate(examples, device)
        loss = reward_model_loss(*model(ids, mask).chunk(2)).mean()
        loss.backward()
        runs.finite_grad_norm(model, loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.requires_grad_(False)


def learned_reward(reward_model, tokenizer):
    """-> reward(prompts, texts) as train_ppo() and train_rounds() want it. A response that was cut
    off, None, gets the village's −3."""

    def reward(prompts, texts):
        examples = [data.encode(tokenizer, p, text or "") for p, text in zip(prompts, texts)]
        rewards = reward_model(*data.collate(examples, reward_model.head.weight.device)).cpu()
        cut_off = torch.tensor([text is None for text in texts])
        return rewards.masked_fill(cut_off, village.UNPARSED)

    return reward


def accuracy(reward, pairs):
    """How often reward() agrees with the label of a (prompt, chosen, rejected)."""
    prompts, chosen, rejected = zip(*pairs)
    return (reward(prompts, chosen) > reward(prompts, rejected)).float().mean().item()
