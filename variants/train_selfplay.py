"""Self-play: the model makes its own pairs, round after round, and each round's policy is the next
round's reference.

    python variants/train_selfplay.py                 SPPO (Wu et al. 2024, arXiv:2405.00675)
    python variants/train_selfplay.py --judge model   the same, labelled by a reward model (RLAIF)
    python variants/train_selfplay.py --spin          SPIN (Chen et al. 2024, arXiv:2401.01335)

SPPO: K responses a question are compared with each other, one sampled label a pair (Eq. 1 of the
DPO paper); a response's wins/(K − 1) estimate its win probability against the policy that wrote it
(the same idea without language models: SPO, arXiv:2401.04056). --judge model: the labels of the
first round train a reward model (Eq. 2), which labels the later rounds for nothing.
SPIN: no judge at all. Demonstrations, all kind and true, are preferred to the policy's own samples
by DPO's loss; what it rests at is the demonstrations' distribution, not Eq. 4's optimum.

Since the reference moves, no β bounds the way from the SFT model: the number of rounds does. KL is
reported to the SFT model. Departure: each round draws its prompts from all questions.
Writes out/sppo_selfplay.pt, .jsonl and .json (spin.*, rlaif.*).
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
import evaluate
import train_dpo
from train_sft import read_config, run_command
from variants.losses import sppo_loss
from variants.reward_model import learned_reward, train_reward_model


@dataclass
class Config(train_dpo.RunConfig):
    judge: str = "village"  # or model
    spin: bool = False  # demonstrations in place of a judge
    rounds: int = 3
    questions: int = 2000  # a round
    group: int = 4  # responses a question; with spin one, and one demonstration
    loss_beta: float = 0.25  # SPPO's 1/η
    spin_beta: float = 0.5  # DPO's β in SPIN
    spin_lr: float = 6e-3
    lr: float = 5e-4
    optimizer: str = "sgd"  # or adamw
    momentum: float = 0.9  # of sgd
    epochs: int = 1  # a round
    batch_size: int = 64  # responses a step; with spin, pairs
    grad_accum: int = 1  # backward passes a step
    reward_lr: float = 1e-3  # of the reward model
    reward_epochs: int = 2


def compare(rewards, generator):
    """One label for each pair of a group: rewards (P, K) -> (P, K, K) bool, [p, i, j]: i beat j."""
    p = dpo.preference_probability(rewards[:, :, None], rewards[:, None, :])  # (P, K, K)
    upper = (torch.rand(p.shape, generator=generator) < p).triu(diagonal=1)
    lower = ~upper.transpose(1, 2) & torch.ones_like(upper).tril(diagonal=-1)
    return upper | lower


def sppo_loss_fn(policy_logps, lengths, ref_logps, win_probs, beta):
    """What train_dpo.train() calls in a round of SPPO."""
    s = (policy_logps - ref_logps).detach()
    losses = sppo_loss(policy_logps, ref_logps, win_probs, beta)
    won, lost = win_probs > 0.5, win_probs < 0.5
    return losses, {
        "log_ratio/won": (s * won).sum() / won.sum().clamp(min=1),
        "log_ratio/lost": (s * lost).sum() / lost.sum().clamp(min=1),
    }


def best_demonstrations(prompts, rng):
    """(prompt, response), all kind and true: the highest reward there is."""
    best = {q: [r for r, value in data.responses(q).items() if value == 3] for q in {*prompts}}
    return [(q, rng.choice(best[q])) for q in prompts]


def spin_round(opponent, tokenizer, prompts, examples, rng):
    """Demonstrations against own samples -> what train_dpo.train() takes."""
    demonstrations = best_demonstrations(prompts, rng)
    sides = [[data.encode(tokenizer, *demo) for demo in demonstrations], examples]
    return sides, [evaluate.known_logps(opponent, s, tokenizer.eot_token) for s in sides]


def train(models, config, questions, reward=evaluate.true_rewards):
    """Yields the metrics of every step of every round. reward(prompts, texts) -> (B,) labels."""
    policy, _, tokenizer = models
    rng = random.Random(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    chances = torch.Generator(policy.wte.weight.device).manual_seed(config.seed)
    for number in range(1, config.rounds + 1):
        opponent = copy.deepcopy(policy).requires_grad_(False)  # this round's reference
        group = 1 if config.spin else config.group
        prompts = [q for q in rng.choices(questions, k=config.questions) for _ in range(group)]
        label = f"round {number}"
        examples, texts = evaluate.sample_responses(
            opponent, tokenizer, prompts, config, label, chances
        )
        if config.spin:
            dataset = spin_round(opponent, tokenizer, prompts, examples, rng)
            loss_fn, first_loss = train_dpo.loss_and_metrics, train_dpo.LN2
            beta, lr = config.spin_beta, config.spin_lr
        else:
            wins = compare(reward(prompts, texts).view(-1, group), generator)
            win_probs = wins.sum(dim=2).flatten() / (group - 1)
            ref_logps = evaluate.known_logps(opponent, examples, tokenizer.eot_token)
            dataset = [examples], [ref_logps, win_probs]
            loss_fn, first_loss = sppo_loss_fn, None
            beta, lr = config.loss_beta, config.lr
            if config.judge == "model" and number == 1:
                pairs = labelled_pairs(prompts, texts, wins)
                judge = train_reward_model(opponent, tokenizer, pairs, config)
                reward = learned_reward(judge, tokenizer)
        round_config = dataclasses.replace(config, beta=beta, lr=lr)
        optimizer = train_dpo.make_optimizer(policy, round_config)
        arguments = dataset, round_config, tokenizer.eot_token, loss_fn, first_loss
        for metrics in train_dpo.train(policy, optimizer, *arguments):
            yield metrics | {"round": number}


def labelled_pairs(prompts, texts, wins):
    """(prompt, chosen, rejected) of all comparisons whose texts are whole and differ."""
    group = wins.shape[1]
    pairs = []
    for p, i, j in wins.nonzero().tolist():
        chosen, rejected = texts[p * group + i], texts[p * group + j]
        if chosen and rejected and chosen != rejected:
            pairs.append((prompts[p * group], chosen, rejected))
    return pairs


def count_labels(config):
    """How many comparisons the village is asked for."""
    if config.spin:
        return 0
    rounds = 1 if config.judge == "model" else config.rounds
    return rounds * config.questions * config.group * (config.group - 1) // 2


def main():
    config = read_config(Config, "train_selfplay.py")
    if config.judge not in ("village", "model"):
        raise SystemExit(f"--judge must be village or model, not {config.judge}")
    if config.spin and config.judge == "model":
        raise SystemExit("--spin has no judge: leave --judge out")
    if config.group < 2 and not config.spin:
        raise SystemExit(f"--group must be at least 2, for comparisons, not {config.group}")
    models = _, reference, tokenizer = train_dpo.start(config)
    train_dpo.check_village_fits(tokenizer, reference.config.block_size, config)
    name = "spin" if config.spin else {"village": "sppo_selfplay", "model": "rlaif"}[config.judge]
    responses = config.questions * (1 if config.spin else config.group)
    steps = config.rounds * train_dpo.count_steps(config, responses)[1]
    labels = {"labels": count_labels(config)}
    print(f"{labels['labels']} labels will be asked for in {config.rounds} rounds")
    shown = ("loss",)
    training = train(models, config, data.split_questions()[0])
    train_dpo.train_and_report(name, training, steps, models, config, {}, shown, extra=labels)


if __name__ == "__main__":
    run_command(main)
