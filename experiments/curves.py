"""The metrics of a run as a picture, and the figures of several as tables.

    python experiments/curves.py out/0 out/1 ...   the picture is of the first

Of runs on somebody's own pairs there is only the picture.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

try:
    import matplotlib
    import matplotlib.pyplot as plt
except ModuleNotFoundError:
    raise SystemExit("pictures need matplotlib: pip install -r requirements-dev.txt")

matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same run gives the same file

# Told apart by the colour-blind, and in print.
COLORS = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#000000"


def read_run(folder, name):
    """-> (metrics of every step, the report)."""
    try:
        lines = (Path(folder) / f"{name}.jsonl").read_text().splitlines()
        report = json.loads((Path(folder) / f"{name}.json").read_text())
    except FileNotFoundError as error:
        raise SystemExit(f"there is no {error.filename}: no training has finished there")
    return [json.loads(line) for line in lines], report


def plot(axis, steps, name, color):
    """A metric over the steps that have it: faint, and bold the mean of the last 20, if so many.
    Its standard error, where it is known, is a band."""
    found = [line for line in steps if name in line]
    x, y = [line["step"] for line in found], [line[name] for line in found]
    smooth = 20 if len(y) > 20 else 1
    means = [statistics.fmean(y[max(0, i - smooth + 1) : i + 1]) for i in range(len(y))]
    axis.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
    axis.plot(x, means, color=color, linewidth=1.8, label=name)
    if f"{name}_se" in found[-1]:
        edges = [[line[name] + k * line[f"{name}_se"] for line in found] for k in (-1, 1)]
        axis.fill_between(x, *edges, color=color, alpha=0.15, linewidth=0)


def draw(steps, report, path):
    """A panel for each kind of metric, its name before the slash. New ones are drawn, too.

    On somebody's own pairs each measured metric has a panel. Dotted is ln 2, the loss of a model
    that cannot tell chosen from rejected.
    """
    is_own = "optimum" not in report
    if is_own:
        start, limits = report["start"], {"held-out/loss": math.log(2)}
    else:
        limits = {f"fresh/{name}": report["optimum"][name] for name in ("reward", "kl")}
        if pairs := report.get("pairs"):  # online DPO logs the limits of each round
            limits |= {"rewards/accuracies": pairs["best_accuracy"]}
            limits |= {"loss": pairs["best_loss"]} if "loss_beta" not in report["config"] else {}
        start = {f"fresh/{name}": report["reference"][name] for name in ("reward", "kl", "garbled")}
    steps = [{"step": 0} | start, *steps]
    panels = {}
    for name in dict.fromkeys(name for line in steps[1:] for name in line):
        if name not in ("step", "round", "grad_norm", "lr") and not name.endswith("_se"):
            kind = name if name.endswith("accuracies") else name.split("/")[0]
            kind = {"best_loss": "loss", "best_accuracy": "rewards/accuracies"}.get(name, kind)
            kind = name if is_own and kind in ("held-out", "fresh") else kind
            panels.setdefault(kind, []).append(name)
    columns, rows = min(5, len(panels)), math.ceil(len(panels) / 5)
    size = 3.5 * columns, 3.2 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (kind, names) in zip(axes.flat, panels.items()):
        for name, color in zip(names, COLORS):
            # At step 1 policy and reference are still one: its accuracy is rounding noise.
            plot(axis, steps[2:] if name == "rewards/accuracies" else steps, name, color)
            if name in limits:
                axis.axhline(limits[name], color=color, linestyle=":")  # of the optimum
        title = kind if len(names) > 1 else names[0]
        note = "; dotted: ln 2" * (title == "held-out/loss")
        axis.set(title=title, xlabel="step" + note)
        axis.margins(y=0.2 + 0.15 * len(names))  # room for the legend
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def mean_and_error(rows, metric, style):
    """Over several runs ± their standard deviation, of one run ± its own standard error."""
    values = [row[metric] for row in rows]
    error = statistics.stdev(values) if len(values) > 1 else rows[0][f"{metric}_se"]
    return f"{statistics.fmean(values):{style}} ± {error:{style}}"


def print_optimum_tables(reports):
    """The runs' means, as Markdown."""
    never = [report["never_asked"] for report in reports]
    parts = {"held-out questions": reports, "facts never asked": never}
    rows = {"reference": "reference", "policy": "policy", "optimum": "optimum, Eq. 4"}
    styles = {"reward": ".3f", "kl": ".3f", "objective": ".3f", "optimality": ".1%"}
    for title, part in parts.items():
        print(f"\n| {title} | E[reward] | KL(π‖π_ref) | J = E[r] − βKL | optimality |")
        print("|---|---|---|---|---|")
        for row, name in rows.items():
            runs = [report[row] for report in part]
            cells = [mean_and_error(runs, metric, style) for metric, style in styles.items()]
            print(f"| {name} |", " | ".join(cells), "|")


def print_runs(folders, runs):
    """What the pairs show (the last 50 steps) beside what fresh samples show, one run per line."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=["out"], help="of finished runs")
    parser.add_argument("--name", default="dpo", help="of the training: dpo, ipo, ...")
    parser.add_argument("--picture", help="the file to draw, in place of FOLDER/curves.svg")
    options = parser.parse_args()
    runs = [read_run(folder, options.name) for folder in options.folders]
    name = "curves" if options.name == "dpo" else f"curves-{options.name}"
    draw(*runs[0], options.picture or f"{options.folders[0]}/{name}.svg")
    if any("optimum" not in report for _, report in runs):
        return
    print_optimum_tables([report for _, report in runs])
    print("± is", "the standard deviation over runs" if len(runs) > 1 else "one standard error")
    print_runs(options.folders, runs)


if __name__ == "__main__":
    main()
