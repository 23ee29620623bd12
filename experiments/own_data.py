"""Made-up files of the kinds that people bring, and what train_dpo.py makes of them.

    python experiments/own_data.py                          the defaults, on three seeds
    python experiments/own_data.py --part rates --seeds 3   rates and optimizers, by length
    python experiments/tables.py                            then the tables

Figures go to experiments/results/own_data/SEED.json, and what is there is not repeated.
The kinds of file:

styles       short answers, kind or curt; the kind one is preferred in nine pairs of ten
styles_4     the same with four sentences in place of one, and styles_12 with twelve
transcripts  several turns of Human and Assistant, long answers; one label in three is flipped
unequal      answers of one to eight sentences; the one that gives a reason is preferred
faithful     the answer that keeps to the thing asked for is preferred; no word alone tells it
"""

import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
from experiments import results
from lab import flags
from lab.flags import flag
from lab.own import hold_out

ROOT = Path(__file__).parent.parent

THINGS = """kettle bicycle window clock drawer lamp fence boat oven tent pump ladder mirror radio
piano stove basket bench guitar camera sofa wheel blanket barrel compass saddle lantern""".split()
VERBS = "mend clean paint move open close test store sell lift wash check warm dry fold".split()
TOOLS = """brush cloth hammer rope sponge bucket screw wire ruler glove knife needle magnet towel
broom file saw clamp""".split()
PLACES = "garden kitchen cellar attic yard hall shed porch workshop harbour market barn".split()
ADVERBS = "slowly gently twice early daily firmly quietly often outside by hand".split(" ")
REASONS = """because it lasts longer;because water harms it;so that nothing breaks;because dust
collects there;since rust is slow;so that it runs well""".replace("\n", " ").split(";")

KIND = ["Gladly!", "Certainly.", "With pleasure!"], ["Good luck!", "Take care!"]
CURT = ["Look.", "Well.", "Hm."], ["Is that all?", "Do it yourself."]


def sentence(rng, thing):
    verb, adverb, tool, place = map(rng.choice, (VERBS, ADVERBS, TOOLS, PLACES))
    return rng.choice([
        f"{verb.capitalize()} the {thing} {adverb} with a {tool}.",
        f"Put the {thing} in the {place} and {verb} it {adverb}.",
        f"A {tool} from the {place} helps to {verb} the {thing}.",
        f"Never {verb} the {thing} near the {place}.",
    ])  # fmt: skip


def question(rng, thing):
    verb, adverb, tool, place = map(rng.choice, (VERBS, ADVERBS, TOOLS, PLACES))
    return rng.choice([
        f"How do I {verb} my {thing} in the {place}?",
        f"Can you tell me how to {verb} a {thing} with a {tool}?",
        f"What is the best way to {verb} the {thing} {adverb}?",
    ])  # fmt: skip


def styles(rng, thing, good, count=1):
    opening, closing = map(rng.choice, KIND if good else CURT)
    return " ".join(["", opening, *(sentence(rng, thing) for _ in range(count)), closing])


def long_answer(rng, thing, good):
    words = ["carefully", "safely", "kindly"] if good else ["somehow", "anyway", "whatever"]
    said = []
    for _ in range(rng.randint(3, 5)):
        text = sentence(rng, thing)
        said.append(text[:-1] + f", {rng.choice(words)}." if rng.random() < 0.4 else text)
    return " " + " ".join(said)


def unequal(rng, thing, good):
    said = [sentence(rng, thing) for _ in range(rng.choice([1, 1, 2, 3, 5, 8]))]
    if good:
        k = rng.randrange(len(said))
        said[k] = said[k][:-1] + f" {rng.choice(REASONS)}."
    return " " + " ".join(said)


def faithful(rng, thing, good):
    thing = thing if good else rng.choice([other for other in THINGS if other != thing])
    return " " + " ".join(sentence(rng, thing) for _ in range(rng.randint(1, 3)))


KINDS = {  # how an answer is made, the share of flipped labels, and a block that every pair fits
    "styles": (styles, 0.1, 192),
    "transcripts": (long_answer, 1 / 3, 320),
    "unequal": (unequal, 0.05, 256),
    "faithful": (faithful, 0.1, 192),
    "styles_4": (partial(styles, count=4), 0.1, 192),
    "styles_12": (partial(styles, count=12), 0.1, 384),
}
DEFAULTS = "styles", "transcripts", "unequal", "faithful"  # what train_dpo.py's are tried on
LENGTHS = "styles", "styles_4", "styles_12"  # and rates on these
RATES = [
    f"--optimizer={optimizer} --lr={rate}"
    for optimizer, rates in (("adamw", ("1e-5", "3e-5", "1e-4")), ("sgd", ("1e-5", "1e-4", "1e-3")))
    for rate in rates
]
FILES = "lab/files", "lab/own", "experiments/own_data"


@dataclass
class Config:
    seeds: str = flag("10,11,12", "with commas between them")
    part: str = flag("defaults", "what is tried", ("defaults", "rates"))
    kinds: str = flag("", "kinds of file, with commas between them; else those of the part")
    out: str = flag("out/own_data", "folder for files and models")


def prompt_of(rng, kind, thing):
    if kind != "transcripts":
        return question(rng, thing)
    turns = ""
    for _ in range(rng.randint(0, 2)):
        other = rng.choice(THINGS)
        turns += f"\n\nHuman: {question(rng, other)}\n\nAssistant: {sentence(rng, other)}"
    return f"{turns}\n\nHuman: {question(rng, thing)}\n\nAssistant:"


def make(kind, seed, folder, pairs=1100, demonstrations=800):
    """Write corpus, demonstrations, pairs, and prompts to label. A third of the demonstrations are
    of the preferred sort."""
    rng = random.Random(f"{kind} {seed}")
    answer, flips, _ = KINDS[kind]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    things = enumerate(rng.choices(THINGS, k=600))
    texts = [prompt_of(rng, kind, thing) + answer(rng, thing, i % 2) for i, thing in things]
    (folder / "corpus.txt").write_text("\n".join(texts))
    records = {"demonstrations": [], "pairs": []}
    for thing in rng.choices(THINGS, k=demonstrations):
        response = answer(rng, thing, rng.random() < 1 / 3)
        record = {"prompt": prompt_of(rng, kind, thing), "completion": response}
        records["demonstrations"].append(record)
    for thing in rng.choices(THINGS, k=pairs):
        good, bad = answer(rng, thing, True), answer(rng, thing, False)
        chosen, rejected = (bad, good) if rng.random() < flips else (good, bad)
        records["pairs"].append(
            {"prompt": prompt_of(rng, kind, thing), "chosen": chosen, "rejected": rejected}
        )
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = [record["prompt"] for record in records["pairs"][:20]]
    (folder / "prompts.txt").write_text("\n".join(prompt.replace("\n", " ") for prompt in prompts))


def judge_by_words(path):
    """How often a logistic regression on the words of the pairs to train on is right about those
    held out: what can be told from words alone."""
    rows = [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]
    parts = hold_out(rows, path)
    words = sorted({word for _, *texts in parts[0] for text in texts for word in text.split()})
    place = {word: i for i, word in enumerate(words)}

    def differences(pairs):
        counts = torch.zeros(len(pairs), len(words))
        for row, (_, chosen, rejected) in zip(counts, pairs):
            for text, sign in ((chosen, 1), (rejected, -1)):
                for word in text.split():
                    if word in place:
                        row[place[word]] += sign
        return counts

    train, held_out = map(differences, parts)
    weights = torch.zeros(len(words), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.softplus(-train @ weights).mean() + 0.003 * weights.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return (held_out @ weights > 0).float().mean().item()


def run(kind, seed, out, more):
    """Make the files and fine-tune, if that is not done yet; then train_dpo.py with these flags
    -> figures."""
    folder = Path(out).absolute() / f"{kind}-{seed}"
    trial = folder / ("".join(more) or "defaults")

    def train(script, out, *own):
        with open(folder / "log.txt", "a") as log:
            line = [sys.executable, script, f"--seed={seed}", f"--out={out}", *own]
            subprocess.run(line, cwd=ROOT, check=True, stdout=log, stderr=log)

    if not (folder / "sft.json").exists():
        make(kind, seed, folder)
        own = [f"--corpus={folder}/corpus.txt", f"--sft={folder}/demonstrations.jsonl"]
        train("train_sft.py", folder, *own, "--vocab-size=500", f"--block-size={KINDS[kind][2]}")
    train("train_dpo.py", trial, f"--init={folder}/sft.pt", f"--pairs={folder}/pairs.jsonl", *more)
    report = json.loads((trial / "dpo.json").read_text())
    judge = judge_by_words(folder / "pairs.jsonl")
    names = ["held-out/loss", "held-out/loss_se", "held-out/accuracy", "fresh/kl"]
    return {name: report[name] for name in names if name in report} | {
        "lr": report["config"]["lr"],
        "kept": report["kept"],
        "judge": judge,
        "tokens": report["start"]["fresh/tokens"],
        "more cut off": report["fresh/cut-off"] - report["start"]["fresh/cut-off"],
    }


def gain(figures):
    """Held-out loss at the kept step, compared with a model that cannot tell the two apart."""
    return figures["held-out/loss"] - math.log(2)


def main():
    config = flags.read_config(Config, "own_data.py")
    seeds = results.read_seeds(config.seeds)
    kinds, rates = (LENGTHS, RATES) if config.part == "rates" else (DEFAULTS, [""])
    kinds = config.kinds.split(",") if config.kinds else kinds
    if unknown := {*kinds} - {*KINDS}:
        raise SystemExit(f"--kinds: no {', '.join(unknown)} among {', '.join(KINDS)}")
    names = [f"{kind} {rate}".strip() for kind in kinds for rate in rates]
    for seed in seeds:
        missing = results.missing("own_data", seed, names)
        for name in names:
            if name not in missing:
                print(f"{name}, seed {seed}: its figures are there")
                continue
            kind, *more = name.split()
            figures = run(kind, seed, config.out, more)
            results.keep("own_data", seed, "", name, figures, FILES)
            found = f"{gain(figures):.3f} ± {figures['held-out/loss_se']:.3f}"
            print(f"{name}, seed {seed}: held-out loss - ln 2 {found}")


if __name__ == "__main__":
    flags.command(main, "what is finished is not repeated")
