"""A file of somebody's own: what is left out of it, what is held out, and how much is left."""

import hashlib
import math
import re
from collections import Counter

from lab import files

# What is asked first in a conversation or a transcript: it ends where the next turn begins.
FIRST_TURN = re.compile(
    r"^(?:### ?)?(?:human|user):(.*?)(?=^(?:### ?)?(?:human|user|assistant):|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)


def own_corpus(path: str) -> tuple[list[str], list[str]]:
    """A file to pretrain on -> (nine tenths of it, the last tenth), each a list of one text."""
    try:
        text = files.read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: not UTF-8 at byte {error.start}")
    border = len(text) * 9 // 10
    return [text[:border]], [text[border:]]


class OwnFile:
    """The rows of a file, in one of the kinds of files.py, and what was left out of it.

    wanted: "sft" or "pairs". config: skip_bad and max_bad. held_out: a second file, if there is
    one, of which all is held out, and nothing of the first.
    """

    def __init__(self, path, wanted, config, held_out=""):
        self.path, self.config = path, config
        self.rows, self.left_out, read, unread = [], {}, [], {}
        records = files.read_records(path, wanted)
        self.count = len(records)
        for place, record in records:
            try:
                kind, form, row, others = files.read_record(record, wanted)
                read.append((place, row, (kind, form)))
                unread |= dict.fromkeys(others)
            except (ValueError, RecursionError) as error:
                self.leave_out(place, str(error))
        sorts = Counter(sort for _, _, sort in read)
        self.kind, self.form = usual = max(sorts, key=sorts.get, default=("", ""))
        for place, row, sort in read:
            if sort == usual:
                self.rows.append((place, row))
            else:
                self.leave_out(place, f"{' of '.join(sort)}, but most are {' of '.join(usual)}")
        self.check()
        if unread:
            print(f"{path}: not read: {files.listed(unread)}")
        if self.form == files.NO_PROMPT:
            print(
                f'{path}: no "prompt": it is what both texts begin with, as {self.rows[0][1][0]!r}'
            )
        self.held_out = OwnFile(held_out, wanted, config) if held_out else None
        if held_out and (other := (self.held_out.kind, self.held_out.form)) != usual:
            has = f"{path} has {' of '.join(usual)}"
            raise SystemExit(f"{has}, but {held_out} has {' of '.join(other)}")

    def leave_out(self, place, reason):
        """Note it among those with the same reason, whatever the numbers in it."""
        alike = self.left_out.setdefault(re.sub(r"\d+", "N", reason), [])
        alike.append(f"{self.path}, {place}: {reason}")

    def check(self):
        """End the run if more was left out than is allowed, or all."""
        bad = sum(map(len, self.left_out.values()))
        first = next(iter(self.left_out.values()))[0] if bad else f"{self.path}: it is empty"
        if not self.rows:
            raise SystemExit(f"{first}" + f"; no usable line, bad lines: {bad}" * bool(bad))
        if bad and not self.config.skip_bad:
            raise SystemExit(f"{first}; bad lines: {bad}. Mend them, or pass --skip-bad")
        if bad > self.config.max_bad * self.count:
            allowed = f"more than --max-bad {self.config.max_bad:g} allows"
            raise SystemExit(f"{first}; bad lines: {bad}. Of {self.count} they are {allowed}")

    def fitting(self, tokenizer, block_size):
        """-> the rows that a model has room for, pairs in place of ratings. Notes as answer_tokens
        how long 95 of 100 responses are at most, and as mean_tokens how long they are on average.
        """
        rows, self.rows, lengths = self.rows, [], []
        for place, row in rows:
            prompt, *texts = (tokenizer.encode_ordinary(t) for t in row if isinstance(t, str))
            responses = [len(ids) + 1 for ids in texts]  # the end of the text is a token, too
            longest = len(prompt) + max(responses)
            if longest > block_size:
                self.leave_out(place, f"it takes {longest} tokens, and the model {block_size}")
                continue
            self.rows.append((place, row))
            lengths += responses
        self.check()
        self.answer_tokens = sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1]
        self.mean_tokens = sum(lengths) / len(lengths)
        rows = [row for _, row in self.rows]
        return best_and_worst(rows, self.path) if self.kind == "ratings" else rows

    def split(self, tokenizer, block_size):
        """-> rows to train on, rows held out. Says, and notes as report, how many there are."""
        rows = self.fitting(tokenizer, block_size)
        self.remark(rows)
        if self.held_out:
            train, held_out = rows, self.held_out.fitting(tokenizer, block_size)
            seen = {first_turn(prompt) for prompt, *_ in train}
            both = sum(first_turn(prompt) in seen for prompt, *_ in held_out)
            if both:
                print(f"{self.held_out.path}: {both} begin with a first turn of {self.path}")
        else:
            train, held_out = hold_out(rows, self.path)
        self.report = self.counts() | {"trained": len(train), "held_out": len(held_out)}
        if self.held_out:
            self.report["held_out_file"] = self.held_out.counts()
        if self.kind == "thumbs" and len({liked for _, _, liked in train}) < 2:
            label = str(train[0][2]).lower()
            raise SystemExit(f"{self.path}: all labels are {label}, and KTO learns from both kinds")
        noun = "pairs" if self.kind == "ratings" else self.kind
        print(f"{len(train)} {noun} to train on, {len(held_out)} held out")
        if self.kind == "thumbs":
            liked = [sum(row[2] for row in part) for part in (train, held_out)]
            print(f"thumbs up are {liked[0]} of those to train on, {liked[1]} of those held out")
        return train, held_out

    @property
    def learnt(self):
        """What a model that is trained on this file will have learnt, for its checkpoint."""
        is_conversation = self.form == "conversations"
        return {"conversations": is_conversation, "answer_tokens": self.answer_tokens}

    def counts(self):
        """How many records there were, and how many of them were left out for which reason."""
        reasons = self.left_out.items()
        left_out = {reason: {"count": len(p), "first": p[0]} for reason, p in reasons}
        print(f"{self.path}: {self.count} read")
        for reason in left_out.values():
            print(f"  {reason['count']} left out, the first: {reason['first']}")
        return {"read": self.count, "left_out": left_out}

    def remark(self, rows):
        """Print what looks odd in most rows, but may be intended."""
        texts = [(row[0], text) for row in rows for text in row[1:] if isinstance(text, str)]
        glued = [p[-12:] + t[:12] for p, t in texts if not p[-1].isspace() and not t[0].isspace()]
        if 2 * len(glued) > len(texts):
            joined = f"and are joined as they are: {glued[0]!r}"
            cure = "if a space is meant there, write it into the file"
            print(f"{self.path}: most responses begin without a space, {joined}; {cure}")
        if 2 * sum(text.startswith(prompt) for prompt, text in texts) > len(texts):
            print(f"{self.path}: most responses repeat their prompts, which is learnt, too")
        known = {tuple(x.strip() if isinstance(x, str) else x for x in row) for row in rows}
        if len(rows) > len(known):
            print(f"{self.path}: {len(rows) - len(known)} repeat another, word for word")
        triples = known if len(rows[0]) == 3 else []
        opposite = [(p, a, not b) if self.kind == "thumbs" else (p, b, a) for p, a, b in triples]
        if count := sum(row in known for row in opposite):
            print(f"{self.path}: {count} {self.kind} stand there with the opposite label, too")


def best_and_worst(rows, path):
    """(prompt, response, rating) -> (prompt, chosen, rejected): of each prompt the best against the
    worst, of ties the first. A prompt with a single rating makes no pair."""
    by_prompt = {}
    for prompt, response, rating in rows:
        by_prompt.setdefault(prompt.strip(), []).append((prompt, response, rating))
    pairs = []
    for rated in by_prompt.values():
        (prompt, chosen, most), (_, rejected, least) = (
            f(rated, key=lambda row: row[2]) for f in (max, min)
        )
        if most > least and chosen.split() != rejected.split():
            pairs.append((prompt, chosen, rejected))
    single = sum(len(rated) == 1 for rated in by_prompt.values())
    print(
        f"{path}: {len(rows)} rated responses to {len(by_prompt)} prompts give {len(pairs)} pairs; "
        f"{single} prompts have one response, "
        f"{len(by_prompt) - single - len(pairs)} none that is better than another"
    )
    if not pairs:
        raise SystemExit(f"{path}: no prompt has two responses of different ratings")
    return pairs


def first_turn(prompt):
    """What is asked first in a prompt, without white space around it."""
    turn = FIRST_TURN.search(prompt)
    return (turn[1] if turn else prompt).strip()


def hold_out(rows, path):
    """-> (rows to train on, rows held out): about one prompt in ten, by a hash of its first turn.

    It depends on nothing else, neither on other rows nor on the seed, and is the same in
    fine-tuning and DPO. If that leaves too few prompts on either side, those with the smallest
    hashes are held out.
    """
    turns = [first_turn(row[0]) for row in rows]
    if len({*turns}) == 1:  # all conversations begin alike
        turns = [row[0].strip() for row in rows]
    hashes = {turn: hashlib.sha256(turn.encode()).digest() for turn in turns}
    ranked = sorted(hashes, key=hashes.get)
    if len(ranked) < 2:
        raise SystemExit(
            f"{path}: one prompt is too few, since one in ten is held out; or bring --held-out"
        )
    held = {turn for turn in ranked if hashes[turn][0] < 26}  # of 256
    least = min(2, len(ranked) // 2)
    if not least <= len(held) <= len(ranked) - least:
        held = {*ranked[: max(least, len(ranked) // 10)]}
        smallest = f"the {len(held)} with the smallest hashes are held out"
        print(f"{path}: of only {len(ranked)} prompts {smallest}; other rows may change which")
    return tuple(
        [row for row, t in zip(rows, turns) if (t in held) == out] for out in (False, True)
    )
