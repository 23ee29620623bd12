"""Fill the tables in README.md and docs/ from experiments/results/, and name those that are stale.

    python experiments/tables.py

A table stands between <!-- NAME --> and <!-- end of NAME -->, and NAME is a function below.
"""

import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
from experiments import compare, results
from experiments import own_data as own

ROOT = Path(__file__).parent.parent


def spread(values, style):
    """Mean ± standard deviation."""
    error = f" ± {statistics.stdev(values):{style}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{style}}{error}"


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def runs_of(study, name):
    """The figures of a run, of each seed that has it."""
    files = results.read(study).values()
    return [file["runs"][name]["figures"] for file in files if name in file["runs"]]


def of_policies(reports, name, style):
    return spread([report["policy"][name] for report in reports], style)


def mean_of_policies(reports, name, style):
    return f"{statistics.fmean(report['policy'][name] for report in reports):{style}}"


def with_error(values, errors, style):
    """Mean, in brackets its standard error, without the spread over seeds."""
    return f"{statistics.fmean(values):{style}} ({math.hypot(*errors) / len(errors):{style}})"


def optimality(reports):
    policies = [report["policy"] for report in reports]
    errors = [policy["optimality_se"] for policy in policies]
    return with_error([policy["optimality"] for policy in policies], errors, ".1%")


def each(reports):
    """The optimality of each seed, in the order of the seeds."""
    return ", ".join(f"{100 * report['policy']['optimality']:.1f}" for report in reports)


def thousands(count):
    return f"{count / 1000:.0f}k" if count >= 1000 else str(count)


def default():
    head = ["held-out questions", "E[reward]", "KL(π‖π_ref)", "J = E[r] − βKL", "optimality"]
    reports, rows = runs_of("village", "dpo"), []
    titles = {"reference": "reference", "policy": "DPO", "optimum": "optimum, Eq. 4"}
    for row, title in titles.items():
        cells = [[r[row][name] for r in reports] for name in ("reward", "kl", "objective")]
        cells = [spread(values, ".3f") for values in cells]
        rows.append([title, *cells, spread([r[row]["optimality"] for r in reports], ".1%")])
    return table(head, rows)


def online():
    head = [
        "method", "labels", "E[reward]", "KL", "garbled", "garbled texts' share of KL",
        "optimality", "median, worst", "optimality, never asked", "seeds",
    ]  # fmt: skip
    rows = []
    for name in ("dpo", "online", "online_48k", "ai_feedback"):
        if reports := runs_of("village", name):
            reached = [report["policy"]["optimality"] for report in reports]
            share = [r["policy"]["kl/garbled"] / r["policy"]["kl"] for r in reports]
            rows.append([
                compare.METHODS[name][0], thousands(reports[0]["labels"]),
                of_policies(reports, "reward", ".2f"), of_policies(reports, "kl", ".2f"),
                mean_of_policies(reports, "garbled", ".1%"), f"{statistics.fmean(share):.1%}",
                spread(reached, ".1%"), f"{statistics.median(reached):.1%}, {min(reached):.1%}",
                of_policies([r["never_asked"] for r in reports], "optimality", ".1%"),
                str(len(reports)),
            ])  # fmt: skip
    return table(head, rows)


def family():
    head = ["method", "labels", "E[r]", "KL", "garbled", "optimality (seeds)"]
    rows = []
    for name, (title, *_) in compare.METHODS.items():
        if (reports := runs_of("village", name)) and not name.startswith(("online", "ai_")):
            rows.append([
                title, thousands(reports[0]["labels"]),
                mean_of_policies(reports, "reward", ".2f"), mean_of_policies(reports, "kl", ".2f"),
                mean_of_policies(reports, "garbled", ".1%"),
                f"{of_policies(reports, 'optimality', '.1%')} ({len(reports)})",
            ])  # fmt: skip
    return table(head, rows)


def rlhf():
    """DPO beside the pipeline that it replaced, and that pipeline with the true reward."""
    names = "rlhf", "dpo", "ppo_gt"
    columns = []
    for name in names:
        _, stages, models = compare.METHODS[name]
        reports = runs_of("village", name)
        reached = [report["policy"]["optimality"] for report in reports]
        columns.append([
            str(stages - 1), str(models), thousands(reports[0]["labels"]),
            f"{min(report['seconds'] for report in reports):.0f}",
            mean_of_policies(reports, "win_rate", ".1%"), spread(reached, ".1%"),
            f"{min(reached):.1%}, {max(reached):.1%}", str(len(reached)),
        ])  # fmt: skip
    what = [
        "stages after fine-tuning", "models in memory while training", "labels",
        "seconds on one core", "wins against the SFT model", "optimality", "worst and best seed",
        "seeds",
    ]  # fmt: skip
    return table(["", *(compare.METHODS[name][0] for name in names)], [*zip(what, *columns)])


def leaky():
    """From a reference that was fine-tuned for 300 steps only."""
    rows = []
    for name in ("dpo", "rpo", "ipo", "sppo", "online"):
        if reports := runs_of("leaky", name):
            garbled = mean_of_policies(reports, "garbled", ".1%")
            title = compare.METHODS[name][0]
            rows.append([title, garbled, optimality(reports), each(reports)])
    return table(["leaky reference", "garbled", "optimality", "each seed"], rows)


def parts():
    """The parts of DPO's reward: how much of each is still missing."""
    reports, rows = runs_of("village", "dpo"), []
    names = ["reward/opening", "reward/answer", "reward/closing"]
    for row, title in {"reference": "reference", "policy": "DPO", "optimum": "optimum"}.items():
        cells = [spread([r[row][name] for r in reports], ".2f") for name in names]
        garbled = spread([r[row]["garbled"] for r in reports], ".1%")
        rows.append([title, *cells, garbled])
    return table(["mean over samples", "opening", "answer", "closing", "garbled"], rows)


def noise():
    rows = []
    for name in ("dpo", "ipo", "cdpo", "robust"):
        found = [runs_of("village", f"{name}_flip_{share}") for share in compare.NOISE]
        cells = [optimality(reports) if reports else "" for reports in found]
        rows.append([compare.METHODS[name][0], *cells])
    return table(["labels flipped", *(f"{share:.0%}" for share in compare.NOISE)], rows)


def rates():
    """What the pairs show, the last 50 steps, beside what fresh samples show, on the same seeds."""
    head = ["run", "loss", "accuracy", "garbled", "E[r]", "KL", "optimality", "each seed"]
    files = [file["runs"] for file in results.read("village").values()]
    files = [runs for runs in files if {*runs} & {*compare.RATES}]
    rows = []
    for name, flags in {"dpo": ["the default"], **compare.RATES}.items():
        if reports := [runs[name]["figures"] for runs in files if name in runs]:
            means = [
                f"{statistics.fmean(report[n] for report in reports):.3f}"
                for n in ("loss", "rewards/accuracies")
            ]
            means += [mean_of_policies(reports, "garbled", ".1%")]
            means += [mean_of_policies(reports, n, ".2f") for n in ("reward", "kl")]
            rows.append([" ".join(flags), *means, optimality(reports), each(reports)])
    return table(head, rows)


def bench():
    """Speed and memory beside the peer's."""
    runs = results.read("bench")[0]["runs"]
    titles = {
        "pairs/s": "pairs per second, from texts to the trained policy",
        "pairs/s in the loop": "pairs per second in the loop alone",
        "generated tokens/s": "generated tokens per second",
        "peak memory, MB": "peak memory of the process",
    }
    rows = []
    for name, title in titles.items():
        cells = [run["figures"][name] for run in runs.values()]
        rows.append([title, *(f"{m:.2f} x ({low:.2f} to {high:.2f})" for m, low, high in cells)])
    shares = [f"{run['figures']['share of peak in the loop']:.0%}" for run in runs.values()]
    rows.append(["ours: share of the matmul peak in the loop", *shares])
    return table(["ours over theirs, median (range)", *runs], rows)


def growth():
    """Speed and memory over a range of each size, all else at its default."""
    columns = {"pairs/s": ",.0f", "peak memory, MB": ",.0f"}
    runs, rows = results.read("growth")[0]["runs"], []
    for size in ("batch_size", "length", "n_embd", "pairs"):
        found = {name: runs[name]["figures"] for name in runs if name.startswith(f"{size} ")}
        values = ", ".join(f"{int(name.split()[1]):,}" for name in found)
        cells = [
            ", ".join(f"{f[n]:{style}}" for f in found.values()) for n, style in columns.items()
        ]
        rows.append([f"`{size}` {values}", *cells])
    return table(["", *columns], rows)


def gpt2():
    """A step over four pairs of 512 tokens with GPT-2 124M."""
    rows = []
    for name, run in results.read("gpt2")[0]["runs"].items():
        speed, memory = run["figures"].values()
        where = run["machine"].get("gpu", run["machine"]["cpu"])
        rows.append([where, *name.split(", ")[1:], f"{speed:.3g}", f"{memory / 1024:.1f}"])
    return table(["", "--dtype", "", "pairs/s in the loop", "peak memory, GB"], rows)


def own_data():
    """train_dpo.py's defaults on made-up files."""
    head = [
        "file", "tokens", "held-out loss − ln 2", "accuracy", "judge by words", "KL",
        "more cut off, points",
    ]  # fmt: skip
    rows = []
    for kind in own.DEFAULTS:
        if runs := runs_of("own_data", kind):
            errors = [run["held-out/loss_se"] for run in runs]
            rows.append([
                kind, f"{statistics.fmean(run['tokens'] for run in runs):.0f}",
                with_error([own.gain(run) for run in runs], errors, ".3f"),
                spread([run.get("held-out/accuracy", 0.5) for run in runs], ".3f"),
                spread([run["judge"] for run in runs], ".3f"),
                spread([run["fresh/kl"] for run in runs], ".2f"),
                spread([100 * run["more cut off"] for run in runs], ".1f"),
            ])  # fmt: skip
    return table(head, rows)


def lengths():
    """Rates and optimizers, on answers of three lengths, one seed: the gain, and the kept step."""
    head, rows = ["optimizer and rate"], []
    for rate in own.RATES:
        found = [runs_of("own_data", f"{kind} {rate}") for kind in own.LENGTHS]
        if all(found):
            head = [head[0], *(f"{run['tokens']:.0f} tokens" for run, *_ in found)]
            cells = [f"{own.gain(run):.3f} ({run['kept']['step']})" for run, *_ in found]
            rows.append([rate, *cells])
    return table(head, rows)


def mutants():
    """Changes of the code, one place at a time, and whether a test noticed."""
    (found,), parts, rows = runs_of("mutants", "mutmut"), {}, []
    for name, counts in found.items():
        part = f"{name.split('/')[0]}/" if "/" in name else f"{name}.py"
        parts[part] = parts.get(part, Counter()) + Counter(counts)
    for part, counts in parts.items():
        cells = counts["killed"] + counts["timeout"], counts["survived"], counts["no tests"]
        rows.append([part, *map(str, cells)])
    return table(["", "noticed", "survived", "in no fast test"], rows)


FUNCTIONS = (
    default, online, family, rlhf, leaky, parts, noise, rates, bench, growth, gpt2, own_data,
    lengths, mutants,
)  # fmt: skip
TABLES = {function.__name__: function for function in FUNCTIONS}


def fill(text):
    """The text with its tables filled anew."""
    for name, make in TABLES.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"(?<={re.escape(marks[0])}\n).*?(?={re.escape(marks[1])})", re.S)
        if pattern.search(text):
            parts = pattern.split(text)
            text = "\n".join(["", *make(), "", ""]).join(parts)
    return text


def count_lines(text):
    """The text with the second column of its table of files counted anew."""

    def row(found):
        path = ROOT / found[1]
        files = [path] if path.is_file() else path.glob("*.py")
        count = sum(len(file.read_text("utf-8").splitlines()) for file in files)
        return f"| `{found[1]}` | {count:,} |"

    return re.sub(r"^\| `([\w/]+(?:\.py|/))` \| [\d,]+ \|", row, text, flags=re.M)


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main():
    for path in documents():
        text = path.read_text("utf-8")
        if (filled := count_lines(fill(text))) != text:
            path.write_text(filled, "utf-8")
            print(f"filled the tables of {path.name}")
    for folder in sorted(results.RESULTS.glob("*")):
        for seed, file in results.read(folder.name).items():
            if stale := [name for name, run in file["runs"].items() if results.is_stale(run)]:
                print(f"stale: {folder.name}, seed {seed}: {', '.join(stale)}")
    print(f"{len(TABLES)} tables are those of experiments/results/")


if __name__ == "__main__":
    main()
