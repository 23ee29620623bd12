"""The README's picture and its tables, from what train_dpo.py wrote.

python experiments/curves.py out/0 out/1 ...   the picture of the first run, tables of all
"""

import json
import os
import statistics
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same run gives the same file

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"  # told apart by the colour-blind, and in print


def read_run(folder):
    """-> (metrics of every step, the report)."""
    try:
        lines = (Path(folder) / "dpo.jsonl").read_text().splitlines()
        report = json.loads((Path(folder) / "dpo.json").read_text())
    except FileNotFoundError as error:
        raise SystemExit(f"there is no {error.filename}: run train_dpo.py --out {folder} first")
    if "optimum" not in report:
        raise SystemExit(f"{folder} is a run on somebody's own pairs: there is no true reward")
    return [json.loads(line) for line in lines], report


def plot(axis, steps, name, color, label, smooth=20):
    """A metric over the steps that have it: every value faintly, the mean of the last 20 boldly."""
    x, y = zip(*[(line["step"], line[name]) for line in steps if name in line])
    means = [statistics.fmean(y[max(0, i - smooth + 1) : i + 1]) for i in range(len(y))]
    axis.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
    axis.plot(x, means, color=color, linewidth=1.8, label=label)


def draw(steps, report, path):
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    plot(axes[0], steps, "rewards/margins", BLUE, "margin")
    axes[0].set(title="implicit reward margin", ylabel="r̂(chosen) − r̂(rejected)")
    # At the first step policy and reference are one, and accuracy is rounding noise.
    plot(axes[1], steps[1:], "rewards/accuracies", BLUE, "accuracy")
    best = report["pairs"]["best_accuracy"]
    axes[1].axhline(best, color=GREY, linestyle="--", label="best that noisy labels allow")
    axes[1].set(title="accuracy on training pairs", ylabel="share of pairs", ylim=(0.4, 0.9))
    plot(axes[2], steps, "logps/chosen", BLUE, "chosen")
    plot(axes[2], steps, "logps/rejected", ORANGE, "rejected")
    axes[2].set(title="log-probabilities", ylabel="log π(y|x), nats")
    start = {"step": 0, "fresh/reward": report["reference"]["reward"], "fresh/kl": 0}
    steps = [start, *steps]
    plot(axes[3], steps, "fresh/reward", BLUE, "true reward E[r]", smooth=1)
    plot(axes[3], steps, "fresh/kl", ORANGE, "KL to the reference, nats", smooth=1)
    best = report["optimum"]
    axes[3].axhline(best["reward"], color=BLUE, linestyle=":", label="E[r] of the optimum")
    axes[3].axhline(best["kl"], color=ORANGE, linestyle=":", label="KL of the optimum")
    axes[3].set(title="fresh samples, held-out questions", ylim=(0, 3))
    for axis in axes:
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    os.makedirs(path.parent, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def mean_and_deviation(values, style):
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.fmean(values):{style}} ± {deviation:{style}}"


def print_optimum_tables(reports):
    """Mean ± standard deviation over runs, as Markdown."""
    never = [report["never_asked"] for report in reports]
    parts = {"held-out questions": reports, "facts never asked": never}
    rows = {"reference": "reference", "policy": "DPO", "optimum": "optimum, Eq. 4"}
    styles = {"reward": ".3f", "kl": ".3f", "objective": ".3f", "optimality": ".1%"}
    for title, part in parts.items():
        print(f"\n| {title} | E[reward] | KL(π‖π_ref) | J = E[r] − βKL | optimality |")
        print("|---|---|---|---|---|")
        for row, name in rows.items():
            cells = [
                mean_and_deviation([report[row][metric] for report in part], style)
                for metric, style in styles.items()
            ]
            print(f"| {name} |", " | ".join(cells), "|")


def print_runs(folders, runs):
    """What the pairs show (the last 50 steps) beside what fresh samples show, a run a line."""
    print("\n| run | loss | accuracy | garbled | E[r] | KL | optimality |")
    print("|---|---|---|---|---|---|---|")
    for folder, (steps, report) in zip(folders, runs):
        loss = statistics.fmean(line["loss"] for line in steps[-50:])
        accuracy = statistics.fmean(line["rewards/accuracies"] for line in steps[-50:])
        garbled = [line["fresh/garbled"] for line in steps if "fresh/garbled" in line][-1]
        policy = report["policy"]
        print(
            f"| {Path(folder).name} | {loss:.3f} | {accuracy:.3f} | {garbled:.1%} "
            f"| {policy['reward']:.2f} | {policy['kl']:.2f} "
            f"| {policy['optimality']:.1%} ± {policy['optimality_se']:.1%} |"
        )


def main():
    folders = sys.argv[1:] or ["out"]
    runs = [read_run(folder) for folder in folders]
    draw(*runs[0], Path(__file__).parent.parent / "assets" / "curves.svg")
    print_optimum_tables([report for _, report in runs])
    print_runs(folders, runs)


if __name__ == "__main__":
    main()
