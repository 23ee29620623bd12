"""Where the implicit reward sits, as a picture: what tools/look.py prints, of two responses.

    python experiments/tokens.py out     a run in the village -> OUT/tokens.svg

Needs matplotlib, as all pictures do (requirements-dev.txt).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import dpo
from experiments.curves import plt, read_run
from lab import runs, village
from tools import look

plt.rcParams["svg.hashsalt"] = "tokens"  # the same models give the same file
QUESTION = "What is the job of Mara?"
RESPONSES = " Gladly! Mara is a weaver. Take care!", " Ugh. Mara is a smith. I think."


def draw(rows, path):
    """rows: of each response its tokens, their shares of its implicit reward, and what to say."""
    figure, axis = plt.subplots(figsize=(8, 2.7), layout="constrained")
    for y, (words, values, said) in zip((1, 0), rows):
        x = 0.0
        for word, value in zip(words, values):
            width = max(len(word), 5) + 0.6
            color = [c / 255 for c in look.tint(value)]
            axis.add_patch(plt.Rectangle((x, y), width, 0.34, facecolor=color, edgecolor="0.8"))
            middle = {"ha": "center", "va": "center", "fontsize": 8}
            axis.text(x + width / 2, y + 0.17, word.strip(), **middle)
            axis.text(x + width / 2, y - 0.12, f"{value:+.2f}", **middle)
            x += width
        axis.text(0, y + 0.48, said, fontsize=9, va="center")
    axis.set(xlim=(-0.5, 74), ylim=(-0.3, 1.65), title=QUESTION)
    axis.set_axis_off()
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", default="out", help="folder of a finished run")
    parser.add_argument("--picture", help="the file to draw, in place of OUT/tokens.svg")
    options = parser.parse_args()
    _, report = read_run(options.out, "dpo")
    if "optimum" not in report:
        raise SystemExit(f"{options.out} is no run in the village")
    (policy, tokenizer), (reference, _) = (
        runs.load_checkpoint(f"{options.out}/{name}.pt") for name in ("dpo", "sft")
    )
    rows, sums, beta = [], [], report["config"]["beta"]
    for text in RESPONSES:
        words, values = look.shares((policy, reference), tokenizer, QUESTION, text, beta)
        sums.append(values.sum())
        reward = village.reward(QUESTION, text)
        said = f"implicit reward r̂ = {sums[-1]:+.2f}, true reward {reward:+g}"
        rows.append((words, values.tolist(), said))
    p = dpo.preference_probability(*sums)
    true_rewards = torch.tensor([village.reward(QUESTION, text) for text in RESPONSES])
    truth = dpo.preference_probability(*true_rewards)
    print(f"the first is preferred with probability {p:.3f} by Eq. 6, {truth:.3f} in truth")
    draw(rows, options.picture or f"{options.out}/tokens.svg")


if __name__ == "__main__":
    main()
