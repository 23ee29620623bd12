"""Every method compared, seed by seed: the same SFT model, pairs, questions and measurement.

    python experiments/compare.py                            every method, where figures are missing
    python experiments/compare.py --seeds 1 --only dpo,ipo   one seed, some methods
    python experiments/compare.py --part rates               DPO at other rates, with other pairs
    python experiments/compare.py --part noise               with labels that were flipped
    python experiments/tables.py                             then the tables

A run's figures go to experiments/results/STUDY/SEED.json, and it is not repeated while they are
there and the code that computed them is the same: --study mine begins a set of your own. Seconds
are those from the SFT model on: sampling, labels, the reference's pass, training.
"""

import copy
import json
import math
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import dpo
import train_dpo
import train_sft
from experiments import results
from lab import evaluate, flags, runs, village
from lab.flags import flag
from lab.pairs import sample_pairs, true_preference
from variants import (
    reward_model,
    train_grpo,
    train_online,
    train_rlhf,
    train_selfplay,
    train_variant,
)

ROOT = Path(__file__).parent.parent
NOISE = 0.1, 0.2, 0.3
EVAL_SAMPLES = 40  # per question: twice what a single run takes
BEST_OF = 16

# name: (what the table calls it, stages after pretraining, models held in training)
METHODS = {"dpo": ("DPO", 2, 2)} | {name: (name.upper(), 2, 2) for name in train_variant.LOSSES}
METHODS |= {
    "cdpo": ("cDPO", 2, 2),
    "robust": ("robust DPO", 2, 2),
    "hinge": ("hinge", 2, 2),
    "kto_half": ("KTO, half the pairs", 2, 2),
    "sppo": ("SPPO's loss on the pairs", 2, 2),
    "simpo": ("SimPO", 2, 1),
    "orpo": ("ORPO, from the pretrained model", 1, 1),
    "sft_chosen": ("SFT on the chosen responses", 2, 1),
    "sppo_selfplay": ("SPPO self-play, 3 rounds", 4, 2),
    "rlaif": ("the same, a reward model judges", 5, 3),
    "spin": ("SPIN, 3 rounds", 4, 2),
    "sft_demos": ("SFT on SPIN's demonstrations", 2, 1),
    "rlhf": ("RLHF: reward model, PPO", 3, 3),
    "ppo_gt": ("PPO on the true reward", 2, 2),
    "grpo": ("GRPO on the true reward", 2, 2),
    "grpo_no_std": ("GRPO --no-std on the true reward", 2, 2),
    "best_of_n": (f"best of {BEST_OF}, by the true reward", 1, 1),
    "online": ("online DPO, 8 rounds", 2, 2),
    "online_48k": ("online DPO, 16 rounds", 2, 2),
    "ai_feedback": ("AI feedback, 16 rounds", 2, 3),
}
ONLINE = "variants/train_online.py"
MORE_ROUNDS = "--rounds=16", "--num-pairs=48000"
SCRIPTS = {  # methods that are measured by their own script: its flags, and its report
    "dpo": (["train_dpo.py"], "dpo"),
    "online": ([ONLINE], "online"),
    "online_48k": ([ONLINE, *MORE_ROUNDS], "online"),
    "ai_feedback": ([ONLINE, "--judge=pretrained", *MORE_ROUNDS], "ai_feedback"),
}
RATES = {  # what is said of DPO in docs/findings.md: its flags
    "sgd_2e-3": ["--lr=2e-3"],
    "sgd_1.8e-2": ["--lr=1.8e-2"],
    "adamw_3e-5": ["--optimizer=adamw", "--lr=3e-5"],
    "adamw_1e-4": ["--optimizer=adamw", "--lr=1e-4"],
    "adamw_3e-4": ["--optimizer=adamw", "--lr=3e-4"],
    "pairs_3000": ["--num-pairs=3000"],
    "pairs_6000": ["--num-pairs=6000"],
    "pairs_12000": ["--num-pairs=12000"],
    "pairs_48000": ["--num-pairs=48000"],
    "pairs_6000_x4": ["--num-pairs=6000", "--epochs=4"],
}
SCRIPTS |= {name: (["train_dpo.py", *more], "dpo") for name, more in RATES.items()}
# Which files compute a method's figures, besides those that all rest on.
FILES = dict.fromkeys(train_variant.LOSSES, ("variants/losses", "variants/train_variant"))
FILES |= dict.fromkeys(("kto", "kto_half"), ("variants/losses", "variants/kto"))
SELF_PLAY = "variants/losses", "variants/train_selfplay", "variants/reward_model"
FILES |= dict.fromkeys(("sppo_selfplay", "rlaif", "spin", "sft_demos"), SELF_PLAY)
GRPO = "variants/losses", "variants/train_grpo"
FILES |= dict.fromkeys(("grpo", "grpo_no_std"), GRPO)
FILES |= dict.fromkeys(("rlhf", "ppo_gt"), (*GRPO, "variants/train_rlhf", "variants/reward_model"))
FILES |= dict.fromkeys(("online", "online_48k", "ai_feedback"), ("variants/train_online",))
USE_PAIRS = ["dpo", *train_variant.LOSSES, "kto_half", "sft_chosen", "rlhf"]


@dataclass
class Config:
    seeds: str = flag("0,1,2", "with commas between them")
    only: str = flag("", "names of methods, with commas between them; else all")
    part: str = flag("family", "what is compared", ("family", "rates", "noise"))
    out: str = flag("out/compare", "folder for models")
    study: str = flag("village", "folder of experiments/results")


class Ground:
    """What all methods of one seed share; everything is made when it is first asked for."""

    def __init__(self, seed, folder):
        self.seed, self.folder = seed, Path(folder) / str(seed)
        if not (self.folder / "sft.pt").exists():
            command = ["train_sft.py", f"--seed={seed}", f"--out={self.folder.absolute()}"]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        self.reference, self.tokenizer = runs.load_checkpoint(self.folder / "sft.pt")
        self.reference.requires_grad_(False)
        self.sft = results.digest_of(self.folder / "sft.pt")
        self.questions, self.held_out, _ = village.split_questions()
        self.exact = evaluate.exact_distribution(self.reference, self.tokenizer, self.held_out)

    def config(self, cls, **settings):
        """A trainer's defaults at this seed."""
        return cls(seed=self.seed, out=str(self.folder), **settings)

    @cached_property
    def pairs(self):
        """(texts, what train_dpo.train() takes, seconds)."""
        started, config = time.perf_counter(), self.config(train_dpo.Config)
        texts = sample_pairs(self.reference, self.tokenizer, config, self.questions)
        pairs = train_dpo.add_reference_logps(self.reference, self.tokenizer, texts)
        return texts, pairs, time.perf_counter() - started

    @cached_property
    def learned_reward(self):
        """RLHF's, from the same pairs."""
        config, texts = self.config(train_rlhf.Config), self.pairs[0]
        model = reward_model.train_reward_model(self.reference, self.tokenizer, texts, config)
        return reward_model.learned_reward(model, self.tokenizer)

    def policy(self, path=None):
        policy = runs.load_checkpoint(path)[0] if path else copy.deepcopy(self.reference)
        return policy.requires_grad_(True)


def on_pairs(ground, name, flips=0.0, **settings):
    """DPO or a relative on the seed's pairs, a share of whose labels is flipped."""
    texts, dataset, seconds = ground.pairs
    if name == "dpo":
        config = ground.config(train_dpo.Config, **settings)
        add_reference_logps, train = train_dpo.add_reference_logps, train_dpo.train
    else:
        config = ground.config(train_variant.config_of(name.removesuffix("_half")), **settings)
        add_reference_logps, train, *_ = train_variant.steps_of(config)
    if flips or name.startswith("kto"):
        texts = texts[: len(texts) // 2] if name == "kto_half" else texts
        texts = flip(texts, flips, ground.seed)
        dataset = add_reference_logps(ground.reference, ground.tokenizer, texts)
    policy = ground.policy(ground.folder / "pretrained.pt" if name == "orpo" else None)
    optimizer, count = train_dpo.make_optimizer(policy, config), len(dataset)
    steps = train(policy, optimizer, dataset, config)
    return policy, steps, train_dpo.count_steps(config, count), count, seconds


def flip(texts, share, seed):
    """Chosen and rejected exchanged in a share of the pairs."""
    flipped = torch.rand(len(texts), generator=torch.Generator().manual_seed(seed)) < share
    return [(p, r, c) if flip else (p, c, r) for (p, c, r), flip in zip(texts, flipped)]


def on_demonstrations(ground, demonstrations, labels=0, seconds=0):
    """Fine-tuning on (prompt, response) texts, at a third of train_sft.py's rate."""
    policy = ground.policy()
    examples = [data.encode(ground.tokenizer, *demo) for demo in demonstrations]
    count = math.ceil(len(examples) / 64)
    batches = data.batches(len(examples), 64, ground.seed)
    optimizer, rates = train_sft.make_optimizer(policy, 0), data.learning_rates(1e-3, count)
    steps = train_sft.train_supervised(policy, optimizer, examples, batches, rates)
    return policy, steps, count, labels, seconds


def training_of(ground, name, **settings):
    """Any method, at its script's defaults but for these settings -> its policy; an iterator that
    trains it; the number of steps; labels used; seconds spent before on what methods share."""
    models = policy, _, _ = ground.policy(), ground.reference, ground.tokenizer
    questions, reward = ground.questions, evaluate.true_rewards
    if name == "sft_chosen":
        texts, _, seconds = ground.pairs
        return on_demonstrations(ground, [pair[:2] for pair in texts], len(texts), seconds)
    if name == "sft_demos":
        config = ground.config(train_selfplay.Config, spin=True, **settings)
        rng = random.Random(ground.seed)
        prompts = rng.choices(questions, k=config.rounds * config.questions)
        return on_demonstrations(ground, train_selfplay.best_demonstrations(prompts, rng))
    if name in ("sppo_selfplay", "rlaif", "spin"):
        judge = {"judge": "model"} if name == "rlaif" else {"spin": name == "spin"}
        config = ground.config(train_selfplay.Config, **judge, **settings)
        steps, labels = train_selfplay.count_steps(config), train_selfplay.count_labels(config)
        return policy, train_selfplay.train_rounds(models, config, questions), steps, labels, 0
    if name == "online":
        config = ground.config(train_online.Config, **settings)
        optimizer = torch.optim.SGD(policy.parameters(), config.lr, momentum=0.9)
        steps = train_online.train_rounds(models, optimizer, config, questions, true_preference)
        count = config.rounds * train_online.count_steps(config)
        return policy, steps, count, config.num_pairs, 0
    if name in ("grpo", "grpo_no_std"):
        config = ground.config(train_grpo.Config, no_std=name == "grpo_no_std", **settings)
        steps = train_grpo.train_on_groups(models, config, questions, reward)
        return policy, steps, config.steps, train_grpo.count_labels(config), 0
    if name in ("rlhf", "ppo_gt"):
        config = ground.config(train_rlhf.Config, **settings)
        labels, seconds = config.steps * config.samples, 0
        if name == "rlhf":
            (texts, _, seconds), reward = ground.pairs, ground.learned_reward
            labels = len(texts)
        steps = train_rlhf.train_ppo(models, config, questions, reward)
        return policy, steps, config.steps, labels, seconds
    return on_pairs(ground, name, **settings)


def best_of_n(exact, n, beta):
    """Exact, from reward levels: within a level, the best of n has the reference's proportions."""
    logps, rewards = exact
    levels, p = evaluate.level_masses(logps.exp(), rewards)  # (L,), (Q, L)
    below = torch.cat([torch.zeros_like(p[:, :1]), p.cumsum(1)], dim=1)
    best = below[:, 1:] ** n - below[:, :-1] ** n
    kl = torch.where(best > 0, best * (best / p).log(), 0).sum(1)
    p_win = evaluate.win_probabilities(logps.exp(), rewards)(levels.expand(len(p), -1))
    _, log_z = dpo.optimal_logps(logps, rewards, beta)
    zero = torch.zeros_like(log_z)
    optimum = beta * log_z, zero, zero, zero  # its objective is all that is asked of it
    reference = (p * levels).sum(1), zero, zero, zero
    lowest = rewards == village.UNPARSED
    garbled = best[:, 0] * logps[:, -1].exp() / (logps.exp() * lowest).sum(1)
    policy = (best * levels).sum(1), kl, (best * p_win).sum(1), garbled
    return {"reference": reference, "policy": policy, "optimum": optimum}


def short(summary):
    """A row of a report, without standard errors but the optimality's."""
    names = [n for n in summary if not n.endswith("_se") or n == "optimality_se"]
    return {name: round(summary[name], 5) for name in names}


def run_script(ground, name):
    """-> figures from the report of a method's own script."""
    (line, report), folder = SCRIPTS[name], ground.folder.absolute()
    own = [f"--seed={ground.seed}", f"--init={folder}/sft.pt", f"--out={folder}/{name}"]
    own += [f"--eval-samples={EVAL_SAMPLES}"]
    subprocess.run([sys.executable, *line, *own], cwd=ROOT, check=True)
    lines = (folder / name / f"{report}.jsonl").read_text().splitlines()[-50:]
    last = {n: [json.loads(line)[n] for line in lines] for n in ("loss", "rewards/accuracies")}
    report = json.loads((folder / name / f"{report}.json").read_text())
    config = report["config"]
    labels = 0 if config.get("judge") == "pretrained" else config["num_pairs"]
    seconds = report["seconds"]["preparing"] + report["seconds"]["training"]
    rows = {row: short(report[row]) for row in ("reference", "policy", "optimum")}
    never = {"policy": short(report["never_asked"]["policy"])}
    means = {n: round(sum(values) / len(values), 5) for n, values in last.items()}
    return rows | means | {"never_asked": never, "labels": labels, "seconds": round(seconds, 1)}


def run(ground, name, **settings):
    """One method at one seed -> its figures."""
    if name in SCRIPTS and not settings:
        return run_script(ground, name)
    # For the measurement, whose β is the same for all.
    config = ground.config(train_dpo.Config, eval_samples=EVAL_SAMPLES)
    if name == "best_of_n":
        rows, labels, seconds = best_of_n(ground.exact, BEST_OF, config.beta), BEST_OF, 0
    else:
        if name in USE_PAIRS:
            _ = ground.pairs  # made once: every method that uses them is charged for them below
        started = time.perf_counter()
        policy, steps, count, labels, shared = training_of(ground, name, **settings)
        for _ in tqdm(steps, name, count, leave=False, disable=None):
            pass
        seconds = round(time.perf_counter() - started + shared, 1)
        models = policy, ground.reference, ground.tokenizer
        rows, _ = evaluate.measure(*models, ground.held_out, ground.exact, config)
    policy = short(evaluate.summarise(rows, config.beta)["policy"])
    return {"policy": policy, "labels": labels, "seconds": seconds}


def jobs_of(part):
    """{name of a run: (method, settings)}."""
    if part == "noise":
        jobs = {}
        for share in NOISE:
            smooth = {"label_smoothing": share}
            for name, own in (("dpo", {}), ("ipo", {}), ("cdpo", smooth), ("robust", smooth)):
                jobs[f"{name}_flip_{share}"] = name, {"flips": share, **own}
        return jobs
    return {name: (name, {}) for name in (RATES if part == "rates" else METHODS)}


def main():
    config = flags.read_config(Config, "compare.py")
    seeds, jobs = results.read_seeds(config.seeds), jobs_of(config.part)
    if config.only:
        if unknown := {*config.only.split(",")} - {*jobs}:
            raise SystemExit(f"--only: no {', '.join(unknown)} among {', '.join(jobs)}")
        jobs = {job: jobs[job] for job in config.only.split(",")}
    for seed in seeds:
        if missing := results.missing(config.study, seed, jobs):
            ground = Ground(seed, config.out)
            results.read_file(config.study, seed, ground.sft)  # or refuse before any work
        else:
            print(f"seed {seed}: all of it is kept in {config.study}; --study NAME measures anew")
        for job in tqdm(missing, f"seed {seed}", leave=False, disable=None):
            name, settings = jobs[job]
            try:
                figures = run(ground, name, **settings)
            except FloatingPointError as error:
                raise FloatingPointError(f"{job}, seed {seed}: {error}")
            results.keep(config.study, seed, ground.sft, job, figures, FILES.get(name, ()))
            policy = figures["policy"]
            print(f"{job}: optimality {policy['optimality']:.1%} ± {policy['optimality_se']:.1%}")


if __name__ == "__main__":
    flags.command(main, "finished runs are not repeated")
