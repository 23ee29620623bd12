"""What Eq. 2 fits to pairs and DPO makes unnecessary: a scalar head on the SFT model.

train_rlhf.py optimises a policy against it, train_selfplay.py lets it judge. By Lemma 1 of the
paper it is known up to a constant for each prompt, which changes neither's optimum.
"""

import copy

import torch
import torch.nn.functional as F

import data
import evaluate
import train_dpo
from train_sft import schedule


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
    sides = train_dpo.encode_sides(tokenizer, pairs)
    batch_size = min(config.batch_size, len(pairs))
    steps = config.reward_epochs * len(pairs) // batch_size
    batches = data.batches(len(pairs), batch_size, steps, config.seed)
    for step, rows in enumerate(evaluate.progress(batches, "reward model", steps)):
        optimizer.param_groups[0]["lr"] = config.reward_lr * schedule(step, steps)
        examples = [side[i] for side in sides for i in rows]
        ids, mask = (t.to(device) for t in data.collate(examples, tokenizer.eot_token))
        losses = reward_model_loss(*model(ids, mask).chunk(2))
        try:
            loss = losses.mean()
            loss.backward()
            train_dpo.take_step(loss, model, optimizer)
        except FloatingPointError as error:
            raise SystemExit(f"reward model: {error}; try a smaller --reward-lr")
    return model.requires_grad_(False)


def learned_reward(reward_model, tokenizer):
    """-> reward(prompts, texts) as train() wants it."""

    def reward(prompts, texts):
        examples = [data.encode(tokenizer, p, text or "") for p, text in zip(prompts, texts)]
        ids, mask = data.collate(examples, tokenizer.eot_token)
        device = reward_model.head.weight.device
        rewards = reward_model(ids.to(device), mask.to(device)).cpu()
        cut_off = torch.tensor([text is None for text in texts])
        return rewards.masked_fill(cut_off, data.UNPARSED)

    return reward


def accuracy(reward, pairs):
    """How often reward() agrees with the label of a (prompt, chosen, rejected)."""
    prompts, chosen, rejected = zip(*pairs)
    return (reward(prompts, chosen) > reward(prompts, rejected)).float().mean().item()
