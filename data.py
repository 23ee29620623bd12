"""Text -> tokens -> (ids, mask) -> batch, and the steps in which a training sees them.

An example is a prompt and its response as tokens:
    ids   the token ids of the prompt, then those of the response, then end-of-text
    mask  True on the tokens that the loss scores: the response's, end-of-text among them
"""

import itertools
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator

import tiktoken
import torch
from tqdm import tqdm

END = "<|endoftext|>"
PATTERN = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+"  # a word includes the space before it


def train_tokenizer(text: str, vocab_size: int) -> tiktoken.Encoding:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909, Algorithm 1).

    Starting from bytes, the two neighbours in a word that occur most often become one token, again
    and again. A tie goes to the pair met first in the sorted words. Raises ValueError where the
    text has too few words for vocab_size tokens.
    """
    if vocab_size < 256:
        raise ValueError("at least 256 tokens are needed, one for each byte")
    counts = Counter(re.findall(PATTERN, text))  # how often each word occurs
    words = sorted(counts)
    parts = [[bytes([byte]) for byte in word.encode()] for word in words]  # of each word, so far
    totals, where = Counter(), defaultdict(set)  # of each pair: how often it occurs, in which words

    def note(i, sign):
        for pair in itertools.pairwise(parts[i]):
            totals[pair] += sign * counts[words[i]]
            (where[pair].add if sign > 0 else where[pair].discard)(i)

    def first_met(pair):
        i = min(where[pair])
        return i, [*itertools.pairwise(parts[i])].index(pair)

    for i in range(len(words)):
        note(i, 1)
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))  # in the order of their ranks
    with tqdm(total=vocab_size, initial=256, desc="tokens", leave=False, disable=None) as bar:
        while len(tokens) < vocab_size:
            most = max(totals.values(), default=0)
            if not most:  # nothing is left to merge
                raise ValueError(
                    f"the text has too few words for {vocab_size} tokens: {len(tokens)} would do"
                )
            pair = min((p for p, total in totals.items() if total == most), key=first_met)
            for i in [*where[pair]]:
                note(i, -1)
                parts[i] = join_pair(parts[i], pair)
                note(i, 1)
            tokens[pair[0] + pair[1]] = None  # it may be a token already, from other halves
            bar.update(len(tokens) - bar.n)
    return build_tokenizer([token.decode("latin-1") for token in tokens])


def join_pair(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """The parts of a word with each occurrence of a pair made one, from left to right."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def build_tokenizer(tokens: list[str], pattern: str = PATTERN) -> tiktoken.Encoding:
    """Tokens by rank, each byte as one Latin-1 character, as in a checkpoint -> the tokenizer."""
    ranks = {token.encode("latin-1"): rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "learnt", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )


def tokenizer_state(tokenizer: tiktoken.Encoding) -> dict:
    """The arguments of build_tokenizer(), by name."""
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token)]
    return {"tokens": [t.decode("latin-1") for t in tokens], "pattern": tokenizer._pat_str}


def encode(tokenizer: tiktoken.Encoding, prompt: str, response: str) -> tuple[list, list]:
    """Two texts -> the example (ids, mask).

    They are tokenised apart, so that no token straddles the border, and nothing is put between
    them: a response must itself begin with a space, if one is wanted there.
    """
    prompt_ids = tokenizer.encode_ordinary(prompt)
    response_ids = [*tokenizer.encode_ordinary(response), tokenizer.eot_token]
    return join_ids(prompt_ids, response_ids)


ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


def apply_template(messages: list[dict], *answers: str) -> tuple[str, ...]:
    """A conversation, and answers to it -> its prompt, and the answers as responses.

    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who is Ada?"}], "Ada."
    -> "System: Be kind.\n\nUser: Who is Ada?\n\nAssistant:", " Ada."

    White space around what somebody says is left out. Raises KeyError for a role not in ROLES.
    """
    turns = [f"{ROLES[m['role']]}: {m['content'].strip()}\n\n" for m in messages]
    return "".join([*turns, "Assistant:"]), *(f" {answer.strip()}" for answer in answers)


# The same in the language of transformers' chat templates; an answer is closed by end-of-text.
JINJA_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content | trim }}"
    "{{ eos_token if loop.last and m.role == 'assistant' else '\n\n' }}{% endfor %}"
    "{{ 'Assistant:' if add_generation_prompt }}"
)


def join_ids(prompt_ids: list[int], response_ids: list[int]) -> tuple[list, list]:
    """-> the example (ids, mask): False on the prompt's tokens, True on the response's."""
    return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)


def collate(examples: list[tuple[list, list]], device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Examples -> ids (B, T) int64 and mask (B, T) bool, padded on the right.

    prompt 5 6, response 7 9    ids 5 6 7 9   mask F F T T
    prompt 5, response 9        ids 5 9 0 0   mask F T F F

    The pads are not scored and no token before them sees them, so that any id will do.
    """
    longest = max(len(ids) for ids, _ in examples)
    ids = [row + [0] * (longest - len(row)) for row, _ in examples]
    mask = [row + [False] * (longest - len(row)) for _, row in examples]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def batches(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yields for each step, without end, the indices of its batch_size of `count` examples.

    Every epoch has a new order, and its last batch has what is left, which may be fewer.
    """
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(count), count)
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


def learning_rates(peak: float, steps: int) -> list[float]:
    """The rate of each step: it rises for a twentieth of them, then falls to zero as a cosine."""
    warmup = steps // 20
    up = [(step + 1) / (warmup + 1) for step in range(warmup)]
    angles = [math.pi * step / (steps - warmup) for step in range(steps - warmup)]
    down = [0.5 + 0.5 * math.cos(angle) for angle in angles]
    return [peak * share for share in up + down]


def paint(tokenizer: tiktoken.Encoding, ids: list[int], mask: list[bool]) -> str:
    """The tokens with those that the loss scores in green, or in [brackets] without a terminal."""
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    words = [tokenizer.decode([i]) for i in ids]
    words = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in word) for word in words]
    return "|".join(before + w + after if scored else w for w, scored in zip(words, mask))
