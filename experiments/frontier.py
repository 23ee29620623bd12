"""The paper's Figure 2 (left) in the village: reward against KL, and the frontier that is exact.

    python experiments/frontier.py             sweeps of β at seed 0, then assets/frontier.svg

Every point is a policy on fresh samples, and the number beside it is the method's own coefficient.
The line is Eq. 4 for every β: no objective E[r] − β KL is more than β E[log Z(x)], and a point that
beats it by four standard errors ends the script. Figures are kept in experiments/results/frontier/.
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import dpo
import train_dpo
from experiments import results
from experiments.compare import FILES, ROOT, Ground, training_of
from lab import evaluate, flags
from lab.flags import flag
from variants import train_online

METHODS = {  # compare.py's name, own coefficient, its values; colour and marker
    "DPO": ("dpo", "beta", (0.25, 0.5, 1.0), "#0072b2", "o"),
    "online DPO": ("online", "beta", (0.25, 0.5, 1.0), "#000000", "P"),
    "IPO": ("ipo", "loss_beta", (0.05, 0.085, 0.2), "#56b4e9", "s"),
    "PPO": ("rlhf", "kl_beta", (0.25, 0.5, 1.0), "#d55e00", "^"),
    "PPO-GT": ("ppo_gt", "kl_beta", (0.25, 0.5, 1.0), "#e69f00", "v"),
    "GRPO": ("grpo", "kl_beta", (0.2, 0.35, 0.7), "#009e73", "D"),
}


@dataclass
class Config:
    seed: int = flag(0, "of SFT model, pairs and trainings", zero=True)
    probes: int = flag(4, "measurements along a training")
    samples: int = flag(4, "for each held-out question in a measurement")
    out: str = flag("out/compare", "where compare.py keeps its SFT models")
    picture: str = flag("assets/frontier.svg", "the file to draw")


def trace(ground, method, beta, ceilings, config):
    """One training -> of every measurement its KL, its reward, and by how many standard errors it
    is above the frontier."""
    (name, coefficient, *_), points = METHODS[method], []
    settings = {coefficient: beta}
    # The curvature of Eq. 7 in Δ grows with β², and the rate that it bears falls with it.
    if name in ("dpo", "online"):
        highest = {"dpo": train_dpo.Config.lr, "online": train_online.Config.lr}[name]
        settings["lr"] = highest * min(1, (0.5 / beta) ** 2)
    policy, training, steps, *_ = training_of(ground, name, **settings)
    ruler = ground.config(train_dpo.Config, eval_samples=config.samples)
    models = policy, ground.reference, ground.tokenizer
    bar = tqdm(training, f"{method}, β {beta}", steps, leave=False, disable=None)
    for step, _ in enumerate(bar, 1):
        if step * config.probes // steps > (step - 1) * config.probes // steps:
            ruler = dataclasses.replace(ruler, seed=step)
            rows, _ = evaluate.measure(*models, ground.held_out, ground.exact, ruler)
            reward, kl, *_ = rows["policy"]  # (Q,) each
            found = kl.mean().item(), reward.mean().item(), excess(reward, kl, ceilings)
            points.append([round(x, 4) for x in found])
    return points


def bounds(exact, betas):
    """{β: β log Z(x), (Q,)}: what no policy's objective exceeds on average."""
    return {beta: beta * dpo.optimal_logps(*exact, beta)[1] for beta in betas}


def excess(reward, kl, bounds):
    """By how many standard errors rewards and KLs (Q,) beat the frontier, where they do most."""
    worst = -float("inf")
    for beta, bound in bounds.items():
        over = dpo.objective(reward, kl, beta) - bound  # (Q,)
        worst = max(worst, (over.mean() / (over.std() / len(over) ** 0.5 + 1e-12)).item())
    return worst


def frontier(exact, betas):
    """-> (KL, E[r]) of Eq. 4's optimum for every β, means over questions."""
    logps, rewards = exact
    line = []
    for beta in betas:
        best_logps, _ = dpo.optimal_logps(logps, rewards, beta)
        best = best_logps.exp()
        kl, reward = (best * (best_logps - logps)).sum(1), (best * rewards).sum(1)
        line.append((kl.mean().item(), reward.mean().item()))
    return line


def draw(sweeps, line, path):
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        print("no picture without matplotlib: pip install -r requirements-dev.txt")
        return
    plt.rcParams["svg.hashsalt"] = "frontier"  # the same points give the same file
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    axis.plot(*zip(*line), color="black", linewidth=1.5, label="exact frontier, Eq. 4")
    for method, (*_, color, marker) in METHODS.items():
        label = method
        for beta, points in sweeps[method].items():
            x, y, _ = zip(*points)
            axis.annotate(f" {beta:g}", (x[-1], y[-1]), color=color, fontsize=8, va="top")
            axis.plot(x, y, color=color, linewidth=0.6, alpha=0.6)
            axis.scatter(x[:-1], y[:-1], color=color, marker=marker, s=12, alpha=0.5, linewidths=0)
            axis.scatter(x[-1], y[-1], color=color, marker=marker, s=45, label=label)
            label = None
    axis.set(xlabel="KL(π‖π_ref), nats per response", ylabel="true reward E[r]")
    axis.set(xlim=0, title="held-out questions; large: end of training")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    os.makedirs(path.parent, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def main():
    config = flags.read_config(Config, "frontier.py")
    ground = Ground(config.seed, config.out)
    betas, sweeps, above = [0.15 * 1.15**i for i in range(40)], {}, []
    line, ceilings = frontier(ground.exact, betas), bounds(ground.exact, betas)
    where = "frontier", config.seed, ground.sft
    kept = results.read_file(*where)["runs"]
    for method, (name, _, values, *_) in METHODS.items():
        sweeps[method] = {}
        for beta in values:
            run = kept.get(f"{method} {beta}")
            if not run or results.is_stale(run):
                run = {"figures": trace(ground, method, beta, ceilings, config)}
                results.keep(*where, f"{method} {beta}", run["figures"], FILES.get(name, ()))
            sweeps[method][beta] = run["figures"]
    print(
        "\n| method | its β | KL | E[r] | standard errors above the frontier |\n" + "|---" * 5 + "|"
    )
    for method, sweep in sweeps.items():
        for beta, points in sweep.items():
            highest = max(over for _, _, over in points)
            if highest > 4:
                above.append(f"{method} at {beta}: {highest:.1f}")
            kl, reward, _ = points[-1]
            print(f"| {method} | {beta} | {kl:.2f} | {reward:.2f} | {highest:+.1f} |")
    draw(sweeps, line, ROOT / config.picture)
    if above:
        raise SystemExit("above the frontier by more than 4 standard errors: " + "; ".join(above))


if __name__ == "__main__":
    flags.command(main, "finished runs are not repeated")
