"""What a trained policy still lacks, by exact sums over all responses to the held-out questions.

    python experiments/anatomy.py out/0 out/1 ...     folders with sft.pt, dpo.pt and dpo.json

The gap to the optimum is J* − J(π) = β KL(π‖π*) (put Eq. 4 into Eq. 3), and a KL divergence splits
by the chain rule: between reward levels, how often the policy earns each reward, and within levels,
where π* keeps the reference's proportions, so that any other preference is KL paid for nothing.
Texts outside the grammar are counted as one: what moves among them is not seen here.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import dpo
from lab import evaluate, runs, village


def shares(p, questions):
    """How often: garbled, kind opening, true answer, kind closing. p (Q, N + 1) as listed by
    village.responses(): openings, answers, closings, the last fastest; then all other texts."""
    listed = p[:, :-1].view(len(questions), len(village.OPENINGS), -1, len(village.CLOSINGS))
    kind_opening = torch.tensor([side == 1 for side in village.OPENINGS.values()])
    kind_closing = torch.tensor([side == 1 for side in village.CLOSINGS.values()])
    true = torch.tensor([[side == 1 for side in village.answers(q).values()] for q in questions])
    return [
        p[:, -1].mean().item(),
        listed[:, kind_opening].sum((1, 2, 3)).mean().item(),
        (listed.sum((1, 3)) * true).sum(1).mean().item(),
        listed[..., kind_closing].sum((1, 2, 3)).mean().item(),
    ]


def split_gap(logps, best_logps, rewards):
    """KL(π‖π*) -> (between reward levels, within them), means over questions, in nats."""
    levels = rewards.clone()
    levels[:, -1] = -4  # texts outside the grammar are a level of their own
    p, best = logps.exp(), best_logps.exp()
    between = 0
    for level in levels.unique():
        mass, best_mass = ((x * (levels == level)).sum(1) for x in (p, best))
        between += torch.where(mass > 0, mass * (mass / best_mass).log(), 0)
    total = (p * (logps - best_logps)).sum(1)
    return between.mean().item(), (total - between).mean().item()


def main():
    _, questions, _ = village.split_questions()
    for folder in sys.argv[1:] or ["out"]:
        beta = json.loads((Path(folder) / "dpo.json").read_text())["config"]["beta"]
        reference, tokenizer = runs.load_checkpoint(f"{folder}/sft.pt")
        policy, _ = runs.load_checkpoint(f"{folder}/dpo.pt")
        ref_logps, rewards = evaluate.exact_distribution(reference, tokenizer, questions)
        logps, _ = evaluate.exact_distribution(policy, tokenizer, questions)
        best_logps, log_z = dpo.optimal_logps(ref_logps, rewards, beta)
        print(f"| {folder} | garbled | kind opening | true answer | kind closing |")
        print("|---|---|---|---|---|")
        for name, row in (("reference", ref_logps), ("DPO", logps), ("optimum", best_logps)):
            cells = " | ".join(f"{share:.1%}" for share in shares(row.exp(), questions))
            print(f"| {name} | {cells} |")
        between, within = (beta * part for part in split_gap(logps, best_logps, rewards))
        print(f"J* − J = {between + within:.3f}: between levels {between:.3f}, within {within:.3f}")
        lines = (Path(folder) / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        for side in ("chosen", "rejected"):
            levels = [village.reward(pair["prompt"], pair[side]) for pair in map(json.loads, lines)]
            change = sum(levels) / len(levels) / beta - log_z.mean().item()
            print(f"{side}: at the optimum log π − log π_ref = r/β − log Z, {change:+.2f} on mean")


if __name__ == "__main__":
    main()
