"""Collect preference pairs: a person, or a program, says which of two samples is better.

    python tools/label.py out/sft.pt prompts.txt pairs.jsonl     a prompt on each line
    python tools/label.py out/sft.pt - pairs.jsonl               prompts are typed
    python tools/label.py out/sft.pt prompts.txt pairs.jsonl --judge "python judge.py"

1 or 2 says which is better, 0 is a tie, s skips, q quits. Each choice is written at once, pairs to
the file, ties and skips to FILE.rest: labelling can go on later. A judge gets a line of JSON,
{"prompt", "responses"}, and prints 1, 2 or 0. Then: python train_dpo.py --pairs pairs.jsonl
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
from lab import files, flags, runs
from tools.chat import as_learnt

CHOICES = {"1": "pairs", "2": "pairs", "0": "ties", "s": "skipped"}


def two_samples(model, tokenizer, question, generator):
    """Two different whole responses, in the order drawn; () if ten draws have no two."""
    prompt, limit = as_learnt(model, question)
    ids, end = [tokenizer.encode_ordinary(prompt)] * 10, tokenizer.eot_token
    replies = model.generate(ids, end, limit, generator=generator)
    texts = dict.fromkeys(tokenizer.decode(r[:-1]) for r in replies if r[-1] == end)
    return [text for text in texts if text.strip()][:2] if len(texts) > 1 else ()


def choose(judge, question, responses):
    """-> "1", "2", "0", "s" or "q", by the judge's command or by a person's key."""
    if not judge:
        print(f"\n{question}\n  1 {responses[0].strip()}\n  2 {responses[1].strip()}")
        while (key := input("1, 2, 0 tie, s skip, q quit> ").strip()) not in [*CHOICES, "q"]:
            pass
        return key
    line = json.dumps({"prompt": question, "responses": responses}) + "\n"
    run = subprocess.run(shlex.split(judge), input=line, stdout=subprocess.PIPE, text=True)
    said = run.stdout.strip()
    if said not in ("1", "2", "0"):
        status = f"(exit status {run.returncode})"
        raise SystemExit(f"label.py: the judge must print 1, 2 or 0, not {said[:40]!r} {status}")
    return said


def record_of(model, question, responses, key):
    """What train_dpo.py --pairs reads, or what was chosen instead of a pair."""
    if CHOICES[key] != "pairs":
        return {"prompt": question, "choice": CHOICES[key]}
    if model.learnt.get("conversations"):
        responses = [[{"role": "assistant", "content": text.strip()}] for text in responses]
    chosen, rejected = responses if key == "1" else responses[::-1]
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def main():
    parser = argparse.ArgumentParser(prog="label.py", allow_abbrev=False)
    for name in ("checkpoint", "prompts", "pairs"):
        parser.add_argument(name)
    parser.add_argument("--judge", default="", help="a command that chooses in your place")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = runs.load_checkpoint(options.checkpoint)
    paths = {"pairs": Path(options.pairs), "rest": Path(f"{options.pairs}.rest")}
    texts = [path.read_text("utf-8") for path in paths.values() if path.exists()]
    lines = [line for text in texts for line in text.splitlines()]
    done, counts = Counter(json.loads(line)["prompt"] for line in lines), Counter()
    questions = iter(lambda: input("\nprompt> "), "")
    if options.prompts != "-":
        questions = files.read_bytes(options.prompts).decode("utf-8-sig").splitlines()
    generator = torch.Generator().manual_seed(options.seed + len(lines))
    try:
        for question in filter(str.strip, questions):
            if options.prompts != "-" and done[question]:
                done[question] -= 1  # chosen in an earlier run
                continue
            responses = two_samples(model, tokenizer, question, generator)
            key = choose(options.judge, question, responses) if len(responses) == 2 else "s"
            if key == "q":
                break
            counts[CHOICES[key]] += 1
            record = record_of(model, question, responses, key)
            with paths.get(CHOICES[key], paths["rest"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except EOFError:
        print()  # the input has ended, as with Ctrl-D
    new = ", ".join(f"{count} {what}" for what, count in counts.items()) or "nothing new"
    print(f"{new}, {len(lines)} from before; pairs are in {options.pairs}, all else in .rest")


if __name__ == "__main__":
    flags.command(main, "what was chosen is written")
