"""Where preference pairs come from: the village, or a file of somebody's own.

Both have three methods: pairs(), the texts to train on and those held out; probe(), what fresh
samples show on the way; report(), what they show in the end, in the village beside the optimum.
"""

import json
import math
import os
import random

import torch

import dpo
from lab import evaluate, metrics, runs, village
from lab.own import OwnFile
from responses import sample_responses

# By trial on the sets of experiments/own_data.py, one seed each.
RATE_TIMES_TOKENS, OWN_STEPS = 7.5e-4, 200


class Village:
    """Pairs sampled from the reference on the village's questions, labelled by its true reward."""

    def __init__(self, policy, reference, tokenizer, config):
        check_village_fits(tokenizer, reference.config.block_size, config)
        self.models = policy, reference, tokenizer
        self.config, self.limits = config, {}
        self.train, held_out, never = village.split_questions()
        some = slice(config.eval_questions)
        self.held_out, self.never = held_out[some], never[some]

    def pairs(self):
        """-> (prompt, chosen, rejected) texts to train on, and [], since none is held out here:
        what is held out are questions, which probe() and report() ask."""
        _, reference, tokenizer = self.models
        pairs = sample_pairs(reference, tokenizer, self.config, self.train)
        if not self.config.resume:  # with it they are there, or resume() will refuse the run
            write_pairs(f"{self.config.out}/pairs.jsonl", pairs)
        limits = noise_limits(pairs)
        print("the best possible on these noisy labels:", runs.average([limits], limits))
        self.limits = {"pairs": limits}
        return pairs, []

    def probe(self):
        """What loss and accuracy do not show, from four fresh samples per held-out question."""
        prompts = 4 * self.held_out
        texts, log_ratios = evaluate.fresh_samples(*self.models, prompts, self.config)
        garbled = [text not in village.responses(p) for p, text in zip(prompts, texts)]
        return {
            "fresh/reward": evaluate.true_rewards(prompts, texts).mean().item(),
            "fresh/kl": log_ratios.mean().item(),
            "fresh/garbled": sum(garbled) / len(garbled),
        }

    def report(self):
        """Reward, KL, objective and optimality of reference, policy and optimum."""
        evaluate.print_answers(*self.models, self.held_out[:8], self.config)
        held_out = self.measure("held-out questions", self.held_out)
        never = self.measure("facts never asked", self.never)
        return held_out | {"never_asked": never} | self.limits

    def measure(self, title, questions):
        _, reference, tokenizer = self.models
        exact = evaluate.exact_distribution(reference, tokenizer, questions)
        rows, shift = evaluate.measure(*self.models, questions, exact, self.config)
        summary = evaluate.summarise(rows, self.config.beta)
        evaluate.print_table(title, summary, shift)
        return summary


class OwnData:
    """Somebody's own file: no true reward, but held-out pairs, KL, and answers to look at."""

    def __init__(self, policy, reference, tokenizer, config):
        self.models, self.config = (policy, reference, tokenizer), config
        file = OwnFile(config.pairs, "pairs", config, config.held_out)
        self.are_thumbs = file.kind == "thumbs"
        if self.are_thumbs and getattr(config, "loss", "dpo") != "kto":
            raise SystemExit(
                f"{config.pairs} has labels of single responses, which make no pairs: train on it "
                "with python variants/train_variant.py --loss kto"
            )
        block_size = reference.config.block_size
        self.texts = file.split(tokenizer, block_size)
        self.file = file.report
        if file.learnt["conversations"] != policy.learnt.get("conversations", False):
            what = "no conversations" if file.learnt["conversations"] else "conversations"
            print(f"the model has learnt {what}, but {config.pairs} has {file.form}")
        policy.learnt = file.learnt
        if (held_out := len(self.texts[1])) < 30:
            print(f"only {held_out} rows are held out: too few for their figures to show anything")
        self.settle(file)
        prompts = list(dict.fromkeys(prompt for prompt, *_ in self.texts[1]))
        longest = block_size - config.max_new_tokens
        short = [prompt for prompt in prompts if len(tokenizer.encode_ordinary(prompt)) <= longest]
        print(f"{len(short)} of {len(prompts)} held-out prompts leave room for such a response")
        if not short:
            raise SystemExit("no held-out prompt has room for a response: lower --max-new-tokens")
        self.prompts = short[:480]  # as many samples as the village's probe() draws
        self.sampled = self.prompts * math.ceil(100 / len(self.prompts))  # of few, several each
        if not self.are_thumbs:
            self.file["longer_wins"] = share = longer_wins(self.texts[0])
            print(f"the longer response is the chosen one in {share:.0%} of the pairs to train on")

    def settle(self, file):
        """Compute the settings that no flag gave from the file, and print them."""
        config, count, tokens = self.config, len(self.texts[0]), file.mean_tokens
        config.lr = config.lr or own_rate(config, tokens)
        config.epochs = config.epochs or own_epochs(config, count)
        config.max_new_tokens = config.max_new_tokens or file.answer_tokens
        chosen = f"--lr {config.lr:g}, --epochs {config.epochs}"
        chosen += f", --max-new-tokens {config.max_new_tokens}"
        print(f"{count} rows, responses of {tokens:.0f} tokens on average: {chosen}")

    def pairs(self):
        """-> (rows to train on, rows held out): (prompt, chosen, rejected), or thumbs for KTO.

        Pairs are also written to OUT/used_pairs/train.jsonl and test.jsonl, as texts, for TRL.
        """
        if self.are_thumbs:
            return self.texts
        folder, given = f"{self.config.out}/used_pairs", (self.config.pairs, self.config.held_out)
        if os.path.realpath(folder) in (os.path.dirname(os.path.realpath(path)) for path in given):
            raise SystemExit(f"{folder} is written by the run itself: give another --out")
        os.makedirs(folder, exist_ok=True)
        for name, texts in zip(("train", "test"), self.texts):
            write_pairs(f"{folder}/{name}.jsonl", texts)
        return self.texts

    def probe(self):
        """How far the policy has gone, whether it still ends its answers, and how long they are."""
        _, _, tokenizer = self.models
        texts, log_ratios = evaluate.fresh_samples(*self.models, self.sampled, self.config)
        cut_off = torch.tensor([text is None for text in texts])
        limit = self.config.max_new_tokens
        lengths = [limit if t is None else len(tokenizer.encode_ordinary(t)) + 1 for t in texts]
        found = {"kl": log_ratios, "cut-off": cut_off, "tokens": torch.tensor(lengths)}  # (N,) each
        return {k: v for n, x in found.items() for k, v in metrics.means(f"fresh/{n}", x).items()}

    def report(self):
        evaluate.print_answers(*self.models, self.prompts[:8], self.config)
        return self.probe() | {"fresh/n": len(self.sampled), "file": self.file}


def longer_wins(pairs):
    """The share of (prompt, chosen, rejected) texts in which the longer response is the chosen one;
    equal lengths count half. Labels often follow length, although nobody meant them to."""
    return sum((len(c) > len(r)) + (len(c) == len(r)) / 2 for _, c, r in pairs) / len(pairs)


def own_rate(config, mean_tokens):
    """The learning rate where none is given: AdamW's, by the mean length of the responses.

    log π(y|x) is a sum over tokens. Whatever the gradient, a step of AdamW moves each token's
    log-probability by about as much, so it moves the sum, and the KL, in proportion to the length.
    """
    if config.optimizer != "adamw":
        raise SystemExit("--optimizer sgd has no default for your own data: give --lr, too")
    return float(f"{RATE_TIMES_TOKENS / mean_tokens:.2g}")


def own_epochs(config, count):
    """As many passes as make 200 steps, but 20 at most, since a handful of rows is soon learnt."""
    return min(20, max(1, round(OWN_STEPS * config.batch_size / count)))


def true_preference(prompts, firsts, seconds):
    """Eq. 1 of the true rewards: the probability (N,) that a label prefers the first of two."""
    rewards = [evaluate.true_rewards(prompts, texts).double() for texts in (firsts, seconds)]
    return dpo.preference_probability(*rewards)


def sample_pairs(model, tokenizer, config, questions, judge=true_preference):
    """Two responses of the model to each of num_pairs prompts, labelled once -> (prompt, chosen,
    rejected) texts. Equal responses, and those cut off or empty, make no pair.

    judge(prompts, firsts, seconds) -> the probabilities (N,) that the first is preferred.
    """
    rng = random.Random(config.seed)
    prompts = [q for q in rng.choices(questions, k=config.num_pairs) for _ in range(2)]
    _, texts = sample_responses(model, tokenizer, prompts, config, "sampling pairs")
    drawn = [
        (prompt, first, second)
        for prompt, first, second in zip(prompts[::2], texts[::2], texts[1::2])
        if first != second and all(text and text.strip() for text in (first, second))
    ]
    pairs = []
    for (prompt, first, second), p in zip(drawn, judge(*zip(*drawn)).tolist() if drawn else []):
        first_wins = rng.random() < p
        pairs.append((prompt, first, second) if first_wins else (prompt, second, first))
    left_out = config.num_pairs - len(pairs)
    print(f"{config.num_pairs} pairs sampled; {left_out} left out, being equal, empty or cut off")
    if not pairs:
        raise SystemExit("no pair is left: fine-tune longer, until the model ends its responses")
    return pairs


def write_pairs(path, pairs):
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        for pair in pairs:
            line = dict(zip(("prompt", "chosen", "rejected"), pair))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(f"{path}.tmp", path)


def noise_limits(pairs, judge=true_preference):
    """The best accuracy and the least loss on labels drawn with the judge's probabilities."""
    p = judge(*zip(*pairs))  # (N,)
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    accuracy = torch.maximum(p, 1 - p).mean().item()
    return {"best_loss": entropy.mean().item(), "best_accuracy": accuracy}


def check_village_fits(tokenizer, block_size, config):
    """Refuse a model, somebody's own perhaps, that cannot take the village's texts."""

    def longest(texts):
        return max(len(tokenizer.encode_ordinary(text)) for text in texts)

    prompt = longest(village.QUESTIONS)
    answers = {answer for question in village.QUESTIONS for answer in village.answers(question)}
    # No token crosses the space before a part, so the longest response has the longest parts.
    parts = village.OPENINGS, answers, village.CLOSINGS
    response = 1 + sum(longest(f" {text}" for text in part) for part in parts)
    need = prompt + max(response, config.max_new_tokens)
    if response > config.max_new_tokens or need > block_size:
        raise SystemExit(
            f"the village's responses take {response} tokens and prompts {prompt}: the model's "
            f"block size of {block_size} or --max-new-tokens is too small, or did you mean --pairs?"
        )
