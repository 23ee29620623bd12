"""Self-play: the model makes its own pairs, round after round, and each round's policy is the next
round's reference.

    python variants/train_selfplay.py                 SPPO (Wu et al. 2024, arXiv:2405.00675)
    python variants/train_selfplay.py --judge model   the same, labelled by a reward model (RLAIF)
    python variants/train_selfplay.py --spin          SPIN (Chen et al. 2024, arXiv:2401.01335)

SPPO: K responses to a question are compared with each other, with one label per pair (Eq. 1); wins
over K − 1 estimate how often a response beats the policy that wrote it (as in SPO,
arXiv:2401.04056). --judge model: round 1's labels train a reward model, which labels the others.
SPIN: demonstrations, all kind and true, are preferred to the policy's own samples by DPO's loss. It
comes to rest at the demonstrations' distribution, not at Eq. 4's optimum.

The reference moves, so only the number of rounds limits how far the policy goes from the SFT model.
The KL is to that model. Departure: each round draws its prompts from all questions.
Writes out/sppo_selfplay.pt, .jsonl and .json (spin.*, rlaif.*).
"""

import copy
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import dpo
import train_dpo
from lab import evaluate, flags, runs, village
from lab.flags import flag
from lab.metrics import check_first_loss
from lab.pairs import Village
from responses import response_logps, response_logps_no_grad, sample_responses
from variants.losses import sppo_loss
from variants.reward_model import learned_reward, train_reward_model


@dataclass
class Config(evaluate.Config):
    judge: str = flag(
        "village", "who labels: the village, or a reward model after round 1", ("village", "model")
    )
    spin: bool = flag(False, "demonstrations in place of a judge")
    rounds: int = flag(3, "rounds, each with the policy of the one before as its reference")
    questions: int = flag(2000, "questions in each round")
    group: int = flag(4, "responses to each; with --spin one, and one demonstration")
    loss_beta: float = flag(0.25, "SPPO's 1/η")
    spin_beta: float = flag(0.5, "β of Eq. 7 in SPIN")
    spin_lr: float = flag(6e-3, "the highest learning rate of SPIN")
    lr: float = flag(5e-4, "the highest learning rate of SPPO")
    batch_size: int = flag(64, "responses in each step; with --spin, pairs")
    reward_lr: float = flag(1e-3, "highest learning rate of the reward model, by AdamW")
    reward_epochs: int = flag(2, "passes of the reward model over its pairs")


def compare(rewards, generator):
    """One label for each pair of a group: rewards (P, K) -> (P, K, K) bool, [p, i, j]: i beat j."""
    p = dpo.preference_probability(rewards[:, :, None], rewards[:, None, :])  # (P, K, K)
    upper = (torch.rand(p.shape, generator=generator) < p).triu(diagonal=1)
    lower = ~upper.transpose(1, 2) & torch.ones_like(upper).tril(diagonal=-1)
    return upper | lower


def sppo_metrics(policy_logps, ref_logps, win_probs):
    """How far responses that won, and that lost, have gone from the reference."""
    s, won, lost = policy_logps.detach() - ref_logps, win_probs > 0.5, win_probs < 0.5
    return {
        "log_ratio/won": (s * won).sum() / won.sum().clamp(min=1),
        "log_ratio/lost": (s * lost).sum() / lost.sum().clamp(min=1),
    }


def train_sppo(policy, optimizer, examples, ref_logps, win_probs, config):
    """A round of SPPO on N examples, their ref_logps (N,) and how often each has won (N,).

    Yields the metrics of each step. It is train_dpo.train() for single responses.
    """
    rates = data.learning_rates(config.lr, train_dpo.count_steps(config, len(examples)))
    batches = data.batches(len(examples), config.batch_size, config.seed)
    for lr, rows in zip(rates, batches):
        optimizer.param_groups[0]["lr"] = lr
        logps = response_logps(policy, [examples[i] for i in rows])  # (B,)
        batch = ref_logps[rows], win_probs[rows]  # (B,) each
        loss = sppo_loss(logps, *batch, config.beta).mean()
        loss.backward()
        grad_norm = runs.finite_grad_norm(policy, loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics = {"loss": loss} | sppo_metrics(logps, *batch) | {"grad_norm": grad_norm}
        yield {name: value.item() for name, value in metrics.items()} | {"lr": lr}


def best_demonstrations(prompts, rng):
    """(prompt, response) texts of the highest reward that there is."""
    best = {q: max(village.responses(q).values()) for q in {*prompts}}
    table = {q: [r for r, value in village.responses(q).items() if value == best[q]] for q in best}
    return [(q, rng.choice(table[q])) for q in prompts]


def spin_pairs(opponent, tokenizer, prompts, own, rng):
    """Demonstrations, preferred to the opponent's own responses -> what train_dpo.train() takes."""
    demonstrations = [data.encode(tokenizer, *d) for d in best_demonstrations(prompts, rng)]
    logps = [response_logps_no_grad(opponent, examples) for examples in (demonstrations, own)]
    return train_dpo.Pairs(demonstrations, own, *logps)


def train_rounds(models, config, questions, reward=evaluate.true_rewards):
    """Yields the metrics of every step of every round. reward(prompts, texts) -> (B,) labels."""
    policy, _, tokenizer = models
    beta, lr = (config.spin_beta, config.spin_lr) if config.spin else (config.loss_beta, config.lr)
    round_config = train_dpo.Config(
        beta=beta, lr=lr, batch_size=config.batch_size, seed=config.seed, dtype=config.dtype
    )
    rng = random.Random(config.seed)
    label_rng = torch.Generator().manual_seed(config.seed)
    sample_rng = torch.Generator(policy.wte.weight.device).manual_seed(config.seed)
    for number in range(1, config.rounds + 1):
        opponent = copy.deepcopy(policy).requires_grad_(False)  # this round's reference
        group = 1 if config.spin else config.group
        prompts = [q for q in rng.choices(questions, k=config.questions) for _ in range(group)]
        label = f"round {number}"
        examples, texts = sample_responses(opponent, tokenizer, prompts, config, label, sample_rng)
        optimizer = train_dpo.make_optimizer(policy, round_config)
        if config.spin:
            pairs = spin_pairs(opponent, tokenizer, prompts, examples, rng)
            train_dpo.check_start(policy, pairs, round_config)
            steps = train_dpo.train(policy, optimizer, pairs, round_config)
        else:
            wins = compare(reward(prompts, texts).view(-1, group), label_rng)
            win_probs = wins.sum(dim=2).flatten() / (group - 1)
            ref_logps = response_logps_no_grad(opponent, examples)
            win_probs = win_probs.to(ref_logps.device)
            if config.judge == "model" and number == 1:
                judge_pairs = labelled_pairs(prompts, texts, wins)
                judge = train_reward_model(opponent, tokenizer, judge_pairs, config)
                reward = learned_reward(judge, tokenizer)
            check_start(policy, examples, ref_logps, win_probs, round_config)
            steps = train_sppo(policy, optimizer, examples, ref_logps, win_probs, round_config)
        for metrics in steps:
            yield metrics | {"round": number}


@torch.no_grad()
def check_start(policy, examples, ref_logps, win_probs, config):
    """At the start of a round policy and reference are equal, and so are their losses."""
    few = slice(config.batch_size)
    logps = response_logps(policy, examples[few]), ref_logps[few]
    losses = [sppo_loss(x, ref_logps[few], win_probs[few], config.beta).mean() for x in logps]
    check_first_loss(*(loss.item() for loss in losses), config)


def labelled_pairs(prompts, texts, wins):
    """(prompt, chosen, rejected) of all comparisons whose texts are whole and differ."""
    group = wins.shape[1]
    pairs = []
    for p, i, j in wins.nonzero().tolist():
        chosen, rejected = texts[p * group + i], texts[p * group + j]
        if chosen and rejected and chosen != rejected:
            pairs.append((prompts[p * group], chosen, rejected))
    return pairs


def count_steps(config):
    """The steps of all rounds together."""
    responses = config.questions * (1 if config.spin else config.group)
    return config.rounds * math.ceil(responses / config.batch_size)


def count_labels(config):
    """How many comparisons the village is asked for."""
    if config.spin:
        return 0
    rounds = 1 if config.judge == "model" else config.rounds
    return rounds * config.questions * config.group * (config.group - 1) // 2


def main():
    config = flags.read_config(Config, "train_selfplay.py")
    if config.spin and config.judge == "model":
        raise SystemExit("--spin has no judge: leave --judge out")
    if config.group < 2 and not config.spin:
        raise SystemExit(f"--group must be at least 2, for comparisons, not {config.group}")
    name = "spin" if config.spin else {"village": "sppo_selfplay", "model": "rlaif"}[config.judge]
    run = runs.Run(name, config)
    policy, tokenizer = runs.load_policy(config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    source = Village(policy, reference, tokenizer, config)
    run.attach(policy, tokenizer)
    steps, labels = count_steps(config), count_labels(config)
    print(f"{labels} labels will be asked for in {config.rounds} rounds")
    training = train_rounds((policy, reference, tokenizer), config, source.train)
    for metrics in run.track(training, steps):
        run.log(metrics, source.probe)
    run.finish(source.report() | {"labels": labels})


if __name__ == "__main__":
    flags.command(main)
