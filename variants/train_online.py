"""Online DPO: Eq. 7 against the same frozen reference, on pairs that the policy has just written.

    python variants/train_online.py                     labelled by the village's true reward
    python variants/train_online.py --judge pretrained  labelled by a constitution: AI feedback

Each round samples two responses to a prompt from the policy as it is, has them labelled, and takes
one pass over these pairs: a garbled text that it has begun to write turns up in them and loses.
This is iterative DPO (Xiong et al. 2023, arXiv:2312.11456), and with one step per round online DPO
(Guo et al. 2024, arXiv:2402.04792). One schedule of the learning rate spans all rounds.

--judge pretrained reads no true reward: it prefers the response that keeps two principles better,
as in the second half of Constitutional AI (Bai et al. 2022, arXiv:2212.08073). Its labels cost
nothing, so it also asks, in other words than the evaluation, about facts that nobody asked for.
Writes out/online.pt, .jsonl and .json (ai_feedback.* with --judge pretrained).
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import dpo
from lab import evaluate, flags, runs, village
from lab.flags import flag
from lab.metrics import weight_sums
from lab.pairs import Village, noise_limits, sample_pairs, true_preference
from responses import response_logps, response_logps_no_grad
from train_dpo import add_reference_logps, check_start, pair_losses, pair_metrics


@dataclass
class Config(evaluate.Config):
    judge: str = flag("village", "who labels the pairs", ("village", "pretrained"))
    beta: float = flag(0.5, "β of Eq. 7, and of Eq. 3, by which the report judges the policy")
    rounds: int = flag(8, "rounds; at the beginning of each the policy writes new pairs")
    num_pairs: int = flag(24_000, "pairs to sample in all rounds together")
    batch_size: int = flag(64, "pairs in each step")
    lr: float = flag(1.2e-2, "highest rate, of SGD")
    max_grad_norm: float = flag(1.0, "longer gradients are cut to this norm")
    resume: bool = flag(False, "go on from the end of the last finished round")


def parts_of(text):
    """A response -> its opening, the sentence between, and its closing."""
    text = text.strip()
    opening = max(filter(text.startswith, village.OPENINGS), key=len)
    closing = max(filter(text.endswith, village.CLOSINGS), key=len)
    return opening, text[len(opening) : len(text) - len(closing)].strip(), closing


def constitution(pretrained, tokenizer):
    """-> a judge: prompts, first and second responses (N each) -> p(the first is better) (N,)."""

    def kindness(text):
        """Be kind: a kind opening or closing is worth a point, a rude one costs a point."""
        opening, _, closing = parts_of(text)
        return village.OPENINGS[opening] + village.CLOSINGS[closing]

    def truth(texts):
        """Be true: the likelier a sentence is in a story, to the model that has read the stories,
        the truer it is -> log-probabilities (N,)."""
        sentences = [tokenizer.encode_ordinary(" " + parts_of(text)[1]) for text in texts]
        start = [tokenizer.eot_token]
        return response_logps_no_grad(pretrained, [data.join_ids(start, s) for s in sentences])

    def judge(prompts, firsts, seconds):
        kinder = torch.tensor([kindness(a) - kindness(b) for a, b in zip(firsts, seconds)])
        truer = (truth(firsts) - truth(seconds)).cpu().sign()
        return dpo.preference_probability(kinder + 2 * truer, torch.zeros(()))  # (N,)

    return judge


def knowledge(judge):
    """For how many of the facts a judge prefers the true answer to all others -> their share."""
    right = []
    for question in {fact: question for question, fact in village.QUESTIONS.items()}.values():
        sides = {f" {answer}": side for answer, side in village.answers(question).items()}
        true, *wrong = sorted(sides, key=sides.get, reverse=True)
        p = judge([question] * len(wrong), [true] * len(wrong), wrong)
        right.append(bool((p > 0.5).all()))
    return sum(right) / len(right)


def count_steps(config):
    return math.ceil(config.num_pairs / config.rounds / config.batch_size)


def train_rounds(models, optimizer, config, questions, judge, start=0):
    """Take all rounds but those of the first `start` steps. Yields the metrics of each step, with
    the noise_limits() of its round's pairs."""
    policy, reference, tokenizer = models
    steps = count_steps(config)
    rates = data.learning_rates(config.lr, config.rounds * steps)
    for number in range(start // steps, config.rounds):
        seed, count = config.seed + 1000 * number, config.num_pairs // config.rounds
        sampling = replace(config, seed=seed, num_pairs=count)
        texts = sample_pairs(policy, tokenizer, sampling, questions, judge)
        limits = noise_limits(texts, judge)
        pairs = add_reference_logps(reference, tokenizer, texts)
        if not number:
            check_start(policy, pairs, config)
        # Equal responses make no pair. To fill the round's steps some other pairs are seen twice.
        batches = data.batches(len(pairs), config.batch_size, seed)
        for lr, rows in zip(rates[number * steps : (number + 1) * steps], batches):
            optimizer.param_groups[0]["lr"] = lr
            batch = pairs.take(rows)  # B pairs
            logps = response_logps(policy, batch.chosen + batch.rejected).chunk(2)  # (B,) each
            loss = pair_losses(*logps, batch, config).mean()
            loss.backward()
            found = {"loss": loss.detach()} | pair_metrics(*logps, batch, config)
            found["grad_norm"] = runs.finite_grad_norm(policy, loss)
            # Without it a single batch can throw the policy far off, and its own pairs with it.
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            means = {name: value.mean().item() for name, value in found.items()}
            yield means | {"lr": lr, "round": number + 1} | limits


def questions_of(judge):
    """An annotator's questions; a judge whose labels cost nothing also gets, twice as often, those
    on the facts that no annotator asked for, but not the very questions of the evaluation."""
    train, _, never = village.split_questions()
    facts = {village.QUESTIONS[question] for question in never}
    others = [q for q, fact in village.QUESTIONS.items() if fact in facts and q not in never]
    return train + 2 * others * (judge == "pretrained")


def main():
    config = flags.read_config(Config, "train_online.py")
    if config.rounds > config.num_pairs:
        raise SystemExit(f"--rounds {config.rounds} are more than --num-pairs {config.num_pairs}")
    run = runs.Run("online" if config.judge == "village" else "ai_feedback", config)
    policy, tokenizer = runs.load_policy(config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    source, judge = Village(policy, reference, tokenizer, config), true_preference
    if config.judge == "pretrained":
        beside = Path(config.init or f"{config.out}/sft.pt").with_name("pretrained.pt")
        judge = constitution(runs.load_checkpoint(beside, policy.wte.weight.device)[0], tokenizer)
        print(f"the judge knows {knowledge(judge):.0%} of the facts")
    optimizer = torch.optim.SGD(policy.parameters(), config.lr, momentum=0.9)
    parts = {"num_pairs": config.num_pairs, "reference": weight_sums(reference)}
    run.attach(policy, tokenizer, optimizer, **parts)
    runs.resume(run)
    models, asked = (policy, reference, tokenizer), questions_of(config.judge)
    training = train_rounds(models, optimizer, config, asked, judge, run.step)
    for metrics in run.track(training, config.rounds * count_steps(config), config.rounds):
        run.log(metrics, source.probe)  # measures, and saves the policy, at the end of each round
    run.finish(source.report())


if __name__ == "__main__":
    flags.command(main, "--resume goes on from the end of the last finished round")
