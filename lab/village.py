"""The village: a world whose truth is known, so that a policy can be measured.

Two dozen villagers have a job, a home, a pet, its name, a favourite food and a colour. Stories
about them are the pretraining corpus; questions about them are the prompts. A response is
`opening? answer closing?`, and its true reward is
    opening (+1 kind, 0 plain or none, −1 rude) + closing (likewise) + answer (+1 true, −1 wrong),
or −3 for a text that is not of this form. `python lab/village.py` shows it all.
"""

import itertools
import random
import re
from functools import cache

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
    kept back, one question per fact; two questions each on facts that only the stories tell."""
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


PARTS = "opening", "answer", "closing"  # of the reward


@cache
def reward_parts(prompt: str) -> dict[str, tuple]:
    """Every response of the grammar to a village question, 9 x 8 x 9 of them -> its reward's PARTS.

    This table is the true reward. To change it, change what stands here, name a new part in PARTS,
    and keep UNPARSED the lowest. Labels, optimum, self-play and reports follow.
    """
    parts = itertools.product(OPENINGS.items(), answers(prompt).items(), CLOSINGS.items())
    return {join(o, a, c): (opening, answer, closing)
            for (o, opening), (a, answer), (c, closing) in parts}  # fmt: skip


@cache
def responses(prompt: str) -> dict[str, float]:
    """Every response of the grammar -> its true reward, the sum of its parts."""
    return {response: round(sum(parts), 9) for response, parts in reward_parts(prompt).items()}


def reward(prompt: str, response: str) -> float:
    """The true reward r(x, y). Raises KeyError if the prompt is no village question."""
    return float(responses(prompt).get(response, UNPARSED))


_parts = reward_parts(next(iter(QUESTIONS))).values()
assert {len(parts) for parts in _parts} == {len(PARTS)}, "PARTS must name the parts"
assert min(sum(parts) for parts in _parts) >= UNPARSED, "a reward is lower than UNPARSED"


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
    """Each word of the village once, and the line break, so that the tokenizer learns rare words
    too."""
    texts = [*QUESTIONS, *stories(1000, seed=0), " ".join(OPENINGS), " ".join(CLOSINGS)]
    return "\n".join(sorted({*re.findall(r" ?\w+| ?[^\w\s]+|\n", "\n".join(texts))}))


def demonstrations(prompts: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    """The fine-tuning set: (prompt, response) in all manners, one answer in five wrong."""
    rng = random.Random(seed)
    examples = []
    for prompt in rng.choices(prompts, k=count):
        side = -1 if rng.random() < 0.2 else 1
        answer = rng.choice([a for a, truth in answers(prompt).items() if truth == side])
        examples.append((prompt, join(rng.choice([*OPENINGS]), answer, rng.choice([*CLOSINGS]))))
    return examples


def training_texts(tokens: int, count: int, seed: int) -> tuple[tuple, tuple]:
    """-> (stories of at least `tokens` tokens, other stories to test on), (`count` demonstrations,
    others on the held-out questions)."""
    train, held_out, _ = split_questions()
    corpus = stories(200 + tokens // 35, seed), stories(500, seed + 1)  # of some 37 tokens each
    return corpus, (demonstrations(train, count, seed), demonstrations(held_out, 1000, seed + 1))


def main():
    train, held_out, never = split_questions()
    print("Three stories:", *stories(3, seed=0), sep="\n  ")
    counts = len(train), len(held_out), len(never)
    print("\nQuestions: {} to train on, {} held out, {} never asked".format(*counts))
    for prompt in held_out[:3]:
        print(f"\n{prompt}\n  reward")
        for response in random.Random(0).sample([*responses(prompt)], 5) + [" Good!"]:
            print(f"  {reward(prompt, response):+g}    {response}")


if __name__ == "__main__":
    main()
