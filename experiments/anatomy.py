"""What a trained policy still lacks, by exact sums over all responses to the held-out questions.

    python experiments/anatomy.py out/0 out/1 ...     folders with sft.pt, dpo.pt and dpo.json

The gap to the optimum is J* − J(π) = β KL(π‖π*) (put Eq. 4 into Eq. 3), and splits in two: between
reward levels, how often the policy earns each; and within levels, where π* keeps the reference's
proportions, so that any other preference wastes KL. All garbled texts count as one.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import dpo
from lab import evaluate, runs, village


def split_gap(logps, best_logps, rewards):
    """KL(π‖π*) -> (between reward levels, within them), means over questions, in nats."""
    levels = rewards.clone()
    levels[:, -1] = village.UNPARSED - 1  # texts outside the grammar are a level of their own
    p, best = logps.exp(), best_logps.exp()
    between = 0
    for level in levels.unique():
        mass, best_mass = ((x * (levels == level)).sum(1) for x in (p, best))
        between += torch.where(mass > 0, mass * (mass / best_mass).log(), 0)
    total = (p * (logps - best_logps)).sum(1)
    return between.mean().item(), (total - between).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=["out"], help="of runs in the village")
    _, questions, _ = village.split_questions()
    for folder in parser.parse_args().folders:
        if not (Path(folder) / "dpo.json").exists() or not (Path(folder) / "pairs.jsonl").exists():
            raise SystemExit(f"{folder} has no finished run of train_dpo.py in the village")
        beta = json.loads((Path(folder) / "dpo.json").read_text())["config"]["beta"]
        reference, tokenizer = runs.load_checkpoint(f"{folder}/sft.pt")
        policy, _ = runs.load_checkpoint(f"{folder}/dpo.pt")
        ref_logps, rewards = evaluate.exact_distribution(reference, tokenizer, questions)
        logps, _ = evaluate.exact_distribution(policy, tokenizer, questions)
        best_logps, log_z = dpo.optimal_logps(ref_logps, rewards, beta)
        head = [folder, "garbled", *village.PARTS]
        print(f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|")
        for name, row in (("reference", ref_logps), ("DPO", logps), ("optimum", best_logps)):
            p, parts = row.exp(), evaluate.reward_parts(questions)
            cells = " | ".join(f"{(p * part).sum(1).mean():.3f}" for part in parts)
            print(f"| {name} | {p[:, -1].mean():.1%} | {cells} |")
        between, within = (beta * part for part in split_gap(logps, best_logps, rewards))
        print(f"J* − J = {between + within:.3f}: between levels {between:.3f}, within {within:.3f}")
        lines = (Path(folder) / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        for side in ("chosen", "rejected"):
            levels = [village.reward(pair["prompt"], pair[side]) for pair in map(json.loads, lines)]
            change = sum(levels) / len(levels) / beta - log_z.mean().item()
            print(
                f"{side}: at the optimum log π − log π_ref = r/β − log Z, {change:+.2f} on average"
            )


if __name__ == "__main__":
    main()
