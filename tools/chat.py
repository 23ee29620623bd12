"""Talk to a checkpoint, or to several side by side.

    python tools/chat.py out/dpo.pt "What does Mara do for work?"
    python tools/chat.py out/dpo.pt              asks on, until an empty line
    python tools/chat.py out/sft.pt out/dpo.pt   what ends in .pt is a checkpoint, the rest is asked

What is typed is asked as it is, or as a user's turn if the model has learnt conversations. Each
question stands alone. An answer is a sample: --temperature 1 is the policy itself, 0 its likeliest
token every time. All start from the same --seed. In front of an answer to a village question stands
its true reward.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
from lab import runs, village


def refuse(message):
    raise SystemExit(f"chat.py: {message}")


def read_arguments():
    """-> the flags, with `checkpoints` and `question`, None where there is none."""
    parser = argparse.ArgumentParser(prog="chat.py", allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("words", nargs="*", metavar="CHECKPOINT.pt ... [QUESTION]")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, help="default: the model's own, or 24")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_intermixed_args()
    if flags.temperature != 0 and not 0.01 <= flags.temperature < math.inf:
        refuse(f"--temperature must be 0, or 0.01 or more, not {flags.temperature}")
    if flags.max_new_tokens is not None and flags.max_new_tokens < 1:
        refuse(f"--max-new-tokens must be positive, not {flags.max_new_tokens}")
    if not 0 <= flags.seed < 2**63:
        refuse(f"--seed must be from 0 to 2^63 - 1, not {flags.seed}")
    flags.checkpoints = [word for word in flags.words if word.endswith(".pt")]
    asked = [word for word in flags.words if not word.endswith(".pt")]
    flags.question = " ".join(asked) if asked else None
    if not flags.checkpoints:
        refuse("name a checkpoint, say out/dpo.pt")
    if asked and not flags.question.strip():
        refuse("the question is empty")
    return flags


def as_learnt(model, question):
    """-> a question as the model has learnt to be asked, and how many tokens an answer may have."""
    if model.learnt.get("conversations"):
        (question,) = data.apply_template([{"role": "user", "content": question}])
    return question, model.learnt.get("answer_tokens", 24)


def answer(model, tokenizer, generator, question, flags):
    """A response as a line, its true reward in front. Raises ValueError where it does not fit."""
    prompt, limit = as_learnt(model, question)
    prompt_ids, end = tokenizer.encode_ordinary(prompt), tokenizer.eot_token
    limits = flags.max_new_tokens or limit, flags.temperature
    (reply,) = model.generate([prompt_ids], end, *limits, generator=generator)
    cut_off = reply[-1] != end
    text = tokenizer.decode(reply if cut_off else reply[:-1])
    line = text.strip() + " (cut off)" * cut_off
    if question not in village.QUESTIONS:
        return line
    score = village.UNPARSED if cut_off else village.reward(question, text)
    return f"{score:+g}  {line}"


def speak(speakers, question, flags):
    """Print what every checkpoint answers. Raises ValueError where one of them cannot."""
    width = max(map(len, speakers)) + 2 if len(speakers) > 1 else 0
    for path, speaker in speakers.items():
        try:
            line = answer(*speaker, question, flags)
        except (ValueError, FloatingPointError) as error:
            raise ValueError(f"{path} cannot answer: {error}")
        print(f"{path:{width}}{line}" if width else line)


def converse(speakers, flags):
    """Question after question; one that does not fit is no reason to stop."""
    sys.stdin.reconfigure(errors="replace")
    while (question := input("> ")).strip():
        try:
            speak(speakers, question, flags)
        except ValueError as error:
            print(error)


def main():
    flags, speakers = read_arguments(), {}
    for path in flags.checkpoints:
        generator = torch.Generator().manual_seed(flags.seed)
        speakers[path] = *runs.load_checkpoint(path), generator
    if flags.question is None:
        return converse(speakers, flags)
    try:
        speak(speakers, flags.question, flags)
    except ValueError as error:
        raise SystemExit(str(error))


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
