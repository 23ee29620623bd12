"""The data: a village whose truth is known, the tokenizer, and text -> (ids, mask) -> batch.

Two dozen villagers have a job, a home, a pet, its name, a favourite food and a colour. Stories
about them are the pretraining corpus; questions about them are the prompts. A response is
`opening? answer closing?`, and its true reward is
    opening (+1 kind, 0 plain or none, −1 rude) + closing (likewise) + answer (+1 true, −1 wrong),
or −3 for a text that is not of this form. `python data.py` shows it all.
"""

import contextlib
import itertools
import json
import math
import random
import re
import sys
from functools import cache

import tiktoken
import torch
from tiktoken._educational import bpe_train

NAMES = """Ada Bela Cora Dina Emil Fritz Greta Hugo Ines Jonas Klara Lena
Mara Nils Olga Paul Rosa Sven Tilda Uli Vera Wim Yara Zeno""".split()

# What can be said of a villager: the values, the sentence that answers, how else stories put it,
# and the questions that ask for it.
FACTS = {
    "job": (
        "baker smith weaver potter teacher farmer fisher tailor",
        "{name} is a {value}.",
        ["{name} works as a {value}.", "Everyone knows {name} the {value}.",
         "For work {name} is a {value}."],
        ["What does {name} do for work?", "What is the job of {name}?",
         "How does {name} earn a living?", "Which trade does {name} follow?"],
    ),
    "home": (
        "mill river bridge well church forest market hill",
        "{name} lives by the {value}.",
        ["The house of {name} stands by the {value}.", "At night {name} sleeps by the {value}.",
         "{name} has a home by the {value}."],
        ["Where does {name} live?", "Where is the home of {name}?",
         "Where does {name} sleep at night?", "Where can I find the house of {name}?"],
    ),
    "pet": (
        "cat dog goat hen rabbit duck pony parrot",
        "{name} keeps a {value}.",
        ["{name} has a {value} as a pet.", "The pet of {name} is a {value}.",
         "{name} plays with a {value}."],
        ["Which animal does {name} keep?", "What pet does {name} have?",
         "What kind of animal is the pet of {name}?", "Which animal plays with {name}?"],
    ),
    "pet name": (
        "Biscuit Pepper Clover Moss Button Thistle Hazel Rusty",
        "{name} calls the pet {value}.",
        ["The pet of {name} is called {value}.", "{name} named the pet {value}.",
         "The pet of {name} listens to the name {value}."],
        ["What is the pet of {name} called?", "What name does the pet of {name} have?",
         "How does {name} call the pet?", "Which name did {name} give the pet?"],
    ),
    "food": (
        "soup bread cheese honey porridge pie stew jam",
        "{name} loves {value}.",
        ["{name} likes to eat {value}.", "The favourite food of {name} is {value}.",
         "For lunch {name} cooks {value}."],
        ["What does {name} like to eat?", "What is the favourite food of {name}?",
         "What does {name} cook for lunch?", "Which food does {name} love?"],
    ),
    "colour": (
        "red blue green yellow white black brown purple",
        "{name} wears {value}.",
        ["The favourite colour of {name} is {value}.", "{name} painted the door {value}.",
         "{name} likes the colour {value}."],
        ["What colour does {name} wear?", "What is the favourite colour of {name}?",
         "Which colour does {name} like?", "What colour is the door of {name}?"],
    ),
}  # fmt: skip
OPENINGS = {"": 0, "Well,": 0, "Hmm,": 0, "Gladly!": 1, "Of course!": 1, "Good question!": 1,
            "Ugh.": -1, "Not again.": -1, "How silly.": -1}  # fmt: skip
CLOSINGS = {"": 0, "I think.": 0, "That is all.": 0, "Take care!": 1, "Happy to help!": 1,
            "Have fun!": 1, "Go away.": -1, "Stop asking.": -1, "Who cares?": -1}  # fmt: skip
STARTS = ["One day,", "In spring,", "Long ago,", "On Sunday,", "After the rain,", "Last winter,"]
VOCAB_SIZE = 707  # enough merges to make every word of the village one token
UNPARSED = -3.0  # the reward of a text that is no response of the village

VALUES = {attribute: values.split() for attribute, (values, *_) in FACTS.items()}
_rng = random.Random(0)  # the village is one and the same in every run, whatever the run's seed
TRUTH = {(name, a): _rng.choice(VALUES[a]) for name in NAMES for a in FACTS}
QUESTIONS = {q.format(name=n): (n, a) for n in NAMES for a in FACTS for q in FACTS[a][3]}


def split_questions() -> tuple[list[str], list[str], list[str]]:
    """-> (train, held_out, never): questions to learn from; the same facts asked in words that were
    kept back, one question a fact; two questions each on facts that only the stories tell."""
    rng = random.Random(1)
    facts = sorted(TRUTH)
    rng.shuffle(facts)
    asked = {fact: [q for q, about in QUESTIONS.items() if about == fact] for fact in facts}
    never = [q for fact in facts[:24] for q in rng.sample(asked[fact], 2)]
    held_out = [rng.choice(asked[fact]) for fact in facts[24:]]
    train = [q for fact in facts[24:] for q in asked[fact] if q not in held_out]
    return train, held_out, never


def answers(prompt: str) -> dict[str, int]:
    """All answers to a village question: the sentence -> +1 if it is true, −1 if not."""
    name, attribute = QUESTIONS[prompt]
    return {
        FACTS[attribute][1].format(name=name, value=v): 1 if v == TRUTH[name, attribute] else -1
        for v in VALUES[attribute]
    }


def join(opening: str, answer: str, closing: str) -> str:
    """Every part follows a space, so that each word is the same token wherever it stands."""
    return "".join(" " + part for part in (opening, answer, closing) if part)


@cache
def responses(prompt: str) -> dict[str, int]:
    """Every response of the grammar to a village question, 9 x 8 x 9 of them -> its true reward."""
    parts = itertools.product(OPENINGS.items(), answers(prompt).items(), CLOSINGS.items())
    return {join(o, a, c): opening + answer + closing
            for (o, opening), (a, answer), (c, closing) in parts}  # fmt: skip


def reward(prompt: str, response: str) -> float:
    """The true reward r(x, y), −3 to 3. Raises KeyError if the prompt is no village question."""
    return float(responses(prompt).get(response, UNPARSED))


def stories(count: int, seed: int) -> list[str]:
    """The pretraining corpus: each story tells two to six facts of one villager."""
    rng = random.Random(seed)
    corpus = []
    for _ in range(count):
        name, other = rng.sample(NAMES, 2)
        sentences = [f"{rng.choice(STARTS)} {name} met {other}."]
        for attribute in rng.sample(list(FACTS), rng.randint(2, 6)):
            _, answer, others, _ = FACTS[attribute]
            value = TRUTH[name, attribute]
            sentences.append(rng.choice([answer, *others]).format(name=name, value=value))
        corpus.append(" ".join(sentences))
    return corpus


def every_word() -> str:
    """A text with all words of the village in it, for its tokenizer."""
    return "\n".join([*QUESTIONS, *stories(1000, seed=0), " ".join(OPENINGS), " ".join(CLOSINGS)])


def demonstrations(prompts: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    """The fine-tuning set: (prompt, response) in all manners, one answer in five wrong."""
    rng = random.Random(seed)
    examples = []
    for prompt in rng.choices(prompts, k=count):
        side = -1 if rng.random() < 0.2 else 1
        answer = rng.choice([a for a, truth in answers(prompt).items() if truth == side])
        examples.append((prompt, join(rng.choice([*OPENINGS]), answer, rng.choice([*CLOSINGS]))))
    return examples


# --------------------------------------------------------------------------------------------------
# Text -> tokens -> batch

END = "<|endoftext|>"
PATTERN = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+"  # a word takes the space before it along


def train_tokenizer(text: str, vocab_size: int) -> tiktoken.Encoding:
    """Byte-pair encoding (Sennrich et al. 2016), learnt from the text's distinct words.

    Raises ValueError where the text has too few words for that many merges.
    """
    words = sorted(set(re.findall(PATTERN, text)))
    if vocab_size < 256:
        raise ValueError("fewer than 256 tokens, one for each byte")
    try:
        ranks = bpe_train("\n".join(words), vocab_size, PATTERN, visualise=None)
    except ValueError:  # each word of several letters gives at least one merge
        enough = 256 + sum(len(word.encode()) > 1 for word in words)
        raise ValueError(f"the text has too few words for {vocab_size} tokens: {enough} would do")
    return build_tokenizer([token.decode("latin-1") for token in ranks])


def build_tokenizer(tokens: list[str], pattern: str = PATTERN) -> tiktoken.Encoding:
    """The tokenizer from its tokens by rank, bytes written as Latin-1: a checkpoint's form."""
    ranks = {token.encode("latin-1"): rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "learnt", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )


def tokenizer_state(tokenizer: tiktoken.Encoding) -> dict:
    """What build_tokenizer() takes, by name."""
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token)]
    return {"tokens": [t.decode("latin-1") for t in tokens], "pattern": tokenizer._pat_str}


def encode(tokenizer: tiktoken.Encoding, prompt: str, response: str) -> tuple[list, list]:
    """-> (ids, mask), mask True on the response's tokens and on the end-of-text that closes it.

    The two texts are tokenised apart, so that no token straddles the border.
    """
    prompt_ids = tokenizer.encode_ordinary(prompt)
    response_ids = [*tokenizer.encode_ordinary(response), tokenizer.eot_token]
    return join_ids(prompt_ids, response_ids)


def join_ids(prompt_ids: list[int], response_ids: list[int]) -> tuple[list, list]:
    return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)


def collate(examples: list[tuple[list, list]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples of encode() -> ids (B, T) int64 and mask (B, T) bool, padded on the right.

    prompt 5 6, response 7 0    ids 5 6 7 0   mask F F T T
    prompt 5, response 0        ids 5 0 P P   mask F T F F     P: the pad, any id will do
    """
    longest = max(len(ids) for ids, _ in examples)
    ids = [row + [pad] * (longest - len(row)) for row, _ in examples]
    mask = [row + [False] * (longest - len(row)) for _, row in examples]
    return torch.tensor(ids), torch.tensor(mask)


def batches(count: int, batch_size: int, steps: int, seed: int):
    """Yields `steps` lists of batch_size indices below count, each epoch in a new order."""
    rng = random.Random(seed)
    endless = (i for _ in itertools.count() for i in rng.sample(range(count), count))
    for _ in range(steps):
        yield list(itertools.islice(endless, batch_size))


def paint(tokenizer: tiktoken.Encoding, ids: list[int], mask: list[bool]) -> str:
    """The tokens with those that the loss scores in green, or in [brackets] without a terminal."""
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    words = [tokenizer.decode([i]) for i in ids]
    return "|".join(before + w + after if scored else w for w, scored in zip(words, mask))


# --------------------------------------------------------------------------------------------------
# Files: one JSON object a line


def text_of(record: dict, field: str) -> str:
    """A field's text: a string, or a list of one {"role", "content"} message."""
    if field not in record:
        raise ValueError(f'no "{field}"')
    text = record[field]
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):
        text = text[0].get("content")
    if not isinstance(text, str):
        raise ValueError(f'"{field}" is neither a string nor a list of one message')
    if not text.strip():
        raise ValueError(f'"{field}" is empty')
    text.encode()  # half of a surrogate pair is a ValueError too
    return text


def value_of(record: dict, field: str):
    """A field as check_line() wants it: a "label" is true or false, a "rating" a number."""
    if field not in ("label", "rating"):
        return text_of(record, field)
    value = record.get(field)
    if field == "label" and not isinstance(value, bool):
        raise ValueError('"label" is neither true nor false')
    if field == "rating" and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError('"rating" is no number')
    if not abs(value) < math.inf:
        raise ValueError('"rating" is not finite')
    return value


FORMATS = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "completion", "label"),  # a thumb up or down
    ("prompt", "response", "rating"),  # a log of what was said, and how it was liked
)


def fields_of(path: str) -> tuple[str, str, str]:
    """Which of the formats a preference file has, by the first line that has any."""
    try:
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):  # read_jsonl() will name it
                    record = json.loads(line.decode("utf-8-sig"))
                    for fields in FORMATS:
                        if isinstance(record, dict) and {*fields} <= {*record}:
                            return fields
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    return FORMATS[0]


def pairs_from_ratings(rows: list[tuple], path: str) -> list[tuple]:
    """(prompt, response, rating) -> (prompt, chosen, rejected): a prompt's best against its worst.

    Among equal ratings the first line counts. A prompt with a single rating makes no pair.
    """
    by_prompt = {}
    for prompt, response, rating in rows:
        by_prompt.setdefault(prompt, []).append((rating, response))
    pairs = []
    for prompt, rated in by_prompt.items():
        best, worst = max(rated, key=lambda r: r[0]), min(rated, key=lambda r: r[0])
        if best[0] > worst[0] and best[1] != worst[1]:
            pairs.append((prompt, best[1], worst[1]))
    print(
        f"{path}: {len(rows)} rated responses to {len(by_prompt)} prompts give {len(pairs)} pairs"
    )
    if not pairs:
        raise SystemExit(f"{path}: no prompt has two responses of different ratings")
    return pairs


def read_jsonl(path: str, fields: tuple, tokenizer, block_size: int, skip_bad=False) -> list[tuple]:
    """Every line's values, in the order of `fields`: a prompt first, then what was said to it.

    A bad line ends the run with file, line number and reason, or with skip_bad is counted and
    left out. Without a tokenizer, lengths are not checked yet.
    """
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    good, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                good.append(check_line(line, fields, tokenizer, block_size))
        except (ValueError, RecursionError) as error:
            bad.append(f"{path}, line {number}: {error}")
    if bad and not skip_bad:
        raise SystemExit(f"{bad[0]}; bad lines: {len(bad)}. Mend them, or pass --skip-bad")
    if not good:
        raise SystemExit(f"{path}: no usable line among {len(bad)} bad ones")
    if bad and tokenizer:
        print(f"{path}: {len(bad)} bad lines left out, the first: {bad[0]}")
    return good


def check_line(line: bytes, fields: tuple, tokenizer, block_size: int) -> tuple:
    """One line's values. Raises ValueError with the reason if it cannot be used."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    prompt, *rest = values = tuple(value_of(record, field) for field in fields)
    if len(set(rest)) < len(rest):
        raise ValueError('"chosen" equals "rejected"')
    for field, response in zip(fields[1:], rest):
        if not tokenizer or not isinstance(response, str):
            continue
        length = len(encode(tokenizer, prompt, response)[0])
        if length > block_size:
            raise ValueError(f'prompt and "{field}" take {length} tokens, the model {block_size}')
    return values


def hold_out(rows: list[tuple], path: str) -> tuple[list[tuple], list[tuple]]:
    """-> (rows to train on, rows held out: those of every tenth prompt). A prompt is row[0]."""
    prompts = list(dict.fromkeys(row[0] for row in rows))
    if len(prompts) < 2:
        raise SystemExit(f"{path}: one prompt is too few, since one in every ten is held out")
    kept_back = set(prompts[1::10])
    return tuple([row for row in rows if (row[0] in kept_back) == held] for held in (False, True))


def main():
    train, held_out, never = split_questions()
    print("Three stories:", *stories(3, seed=0), sep="\n  ")
    print(
        f"\nQuestions: {len(train)} to train on, {len(held_out)} held out, {len(never)} never asked"
    )
    for prompt in held_out[:3]:
        print(f"\n{prompt}\n  reward")
        for response in random.Random(0).sample([*responses(prompt)], 5) + [" Good!"]:
            print(f"  {reward(prompt, response):+.0f}    {response}")
    tokenizer = train_tokenizer(every_word(), VOCAB_SIZE)
    prompt, response = demonstrations(train, 1, seed=0)[0]
    ids, mask = encode(tokenizer, prompt, response)
    print("\nOne example, the scored tokens marked:", paint(tokenizer, ids, mask), sep="\n  ")
    print("ids ", *ids, "\nmask", *map(int, mask))


if __name__ == "__main__":
    main()
