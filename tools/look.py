"""Where the implicit reward sits, token by token: "your language model is secretly a reward model".

    python tools/look.py out "What is the job of Mara?"                  a sample of each model
    python tools/look.py out "What is the job of Mara?" " Mara is a smith." " Who cares?"
    python tools/look.py out "What is the job of Mara?" --likeliest      the likeliest ten, compared

OUT/sft.pt is the reference, OUT/dpo.pt the policy. Below each token stands its share of r̂,
β (log π_θ − log π_ref), with the β of the policy's run: blue counts for the response, orange
against it. Eq. 6 turns two r̂ into a probability.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import dpo
from lab import evaluate, runs, village
from tools.chat import as_learnt

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)  # told apart by the colour-blind


def shares(models, tokenizer, prompt, response, beta):
    """-> the response's tokens as texts, and β (log π_θ − log π_ref) of each (T,)."""
    ids, mask = data.collate([data.encode(tokenizer, prompt, response)])
    with torch.no_grad():
        policy_logps, ref_logps = (dpo.token_logps(model(ids), ids, mask) for model in models)
    scored = mask[0, 1:]
    words = [repr(tokenizer.decode([i]))[1:-1] for i in ids[0, 1:][scored].tolist()]
    return words, beta * (policy_logps - ref_logps)[0, scored]


def tint(value):
    """The colour of a share: from white at 0 to full blue or orange at 2 nats."""
    strength = min(1, abs(value) / 2)
    return tuple(round(255 + strength * (c - 255)) for c in (BLUE if value > 0 else ORANGE))


def paint(words, values, in_colour):
    """Two lines, tokens above and their shares below, of 100 columns at most, again and again."""
    lines, width = [["", ""]], 0
    for word, value in zip(words, values):
        size = max(len(word), 5) + 1
        if width + size > 98:
            lines, width = [*lines, ["", ""]], 0
        color = ";".join(map(str, tint(value)))
        ink = f"\033[38;5;16;48;2;{color}m{word}\033[0m" if in_colour else word
        lines[-1][0] += ink + " " * (size - len(word))
        lines[-1][1] += f"{value:+.2f}".ljust(size)
        width += size
    return [line for pair in lines for line in pair]


def likeliest(models, tokenizer, question, beta):
    """The ten responses to a village question that the reference finds likeliest."""
    logps, rewards = evaluate.exact_distribution(models[1], tokenizer, [question])
    policy, _ = evaluate.exact_distribution(models[0], tokenizer, [question])
    best, _ = dpo.optimal_logps(logps, rewards, beta)
    texts = [*village.responses(question), " (all garbled texts together)"]
    print("reference   policy  optimum  reward")
    for i in logps[0].argsort(descending=True)[:10].tolist():
        p = [f"{x[0, i].exp():8.2%}" for x in (logps, policy, best)]
        print(f" {' '.join(p)}  {rewards[0, i]:+6g} {texts[i]}")


def main():
    parser = argparse.ArgumentParser(prog="look.py", allow_abbrev=False)
    parser.add_argument("out", help="a folder with sft.pt and dpo.pt")
    parser.add_argument("prompt")
    parser.add_argument("responses", nargs="*")
    parser.add_argument("--policy", help="in place of OUT/dpo.pt")
    parser.add_argument("--beta", type=float, help="in place of the policy's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--likeliest", action="store_true")
    options = parser.parse_args()
    paths = options.policy or f"{options.out}/dpo.pt", f"{options.out}/sft.pt"
    (policy, tokenizer), (reference, other) = map(runs.load_checkpoint, paths)
    report = Path(paths[0]).with_suffix(".json")
    settings = json.loads(report.read_text())["config"] if report.exists() else {}
    beta = options.beta or settings.get("beta", 0.5)
    models, prompt, responses = (policy, reference), options.prompt, options.responses
    titles = [f"response {number}" for number, _ in enumerate(responses, 1)]
    if not prompt.strip():
        raise SystemExit("the prompt is empty")
    if data.tokenizer_state(tokenizer) != data.tokenizer_state(other):
        raise SystemExit("the two models have different tokenizers")
    is_village = prompt in village.QUESTIONS
    if options.likeliest:
        if not is_village:
            raise SystemExit("--likeliest is for the village's questions: python lab/village.py")
        return likeliest(models, tokenizer, prompt, beta)
    prompt, limit = as_learnt(policy, prompt)
    if not responses:
        ids = tokenizer.encode_ordinary(prompt)
        for name, model in (("reference", reference), ("policy", policy)):
            torch.manual_seed(options.seed)
            (reply,) = model.generate([ids], tokenizer.eot_token, limit)
            responses.append(tokenizer.decode([i for i in reply if i != tokenizer.eot_token]))
            titles.append(f"a sample of the {name}")
    sums = []
    for title, text in zip(titles, responses):
        words, values = shares(models, tokenizer, prompt, text, beta)
        sums.append(values.sum())
        print(*paint(words, values.tolist(), sys.stdout.isatty()), sep="\n")
        true = f", true reward {village.reward(prompt, text):+g}" if is_village else ""
        print(f"{title}: r̂ = {sums[-1]:+.2f}{true}\n")
    for title, r in zip(titles[1:], sums[1:]):
        print(f"Eq. 6: p({title} ≻ {titles[0]}) = {dpo.preference_probability(r, sums[0]):.3f}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # it does not fit the block size
        raise SystemExit(f"look.py: {error}")
