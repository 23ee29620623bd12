"""Measurement and labels, on a reference whose probabilities are known exactly."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import data
import dpo
import responses
from lab import evaluate, village
from lab.own import OwnFile
from lab.pairs import noise_limits, sample_pairs, write_pairs


class KnownReference:
    """A stand-in for a model: it gives each response of the grammar the probability 0.9 x (a share
    that grows with its place in the list), and says " Good!" one time in ten."""

    config = SimpleNamespace(vocab_size=708, block_size=64, n_layer=1, n_embd=1)
    wte = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, tokenizer, questions, power=1):
        self.end, self.replies, self.weights = tokenizer.eot_token, {}, {}
        self.next = defaultdict(lambda: torch.full((tokenizer.n_vocab,), 1e-30).double())
        for question in questions:
            texts = [*village.responses(question), " Good!"]
            share = torch.arange(1, len(texts), dtype=torch.float64) ** power
            weights = torch.cat([0.9 * share / share.sum(), torch.tensor([0.1])])
            prompt = tuple(tokenizer.encode_ordinary(question))
            replies = [data.encode(tokenizer, "", text)[0] for text in texts]
            self.replies[prompt], self.weights[prompt] = replies, weights
            for reply, weight in zip(replies, weights):
                for i, token in enumerate(reply):
                    self.next[prompt + tuple(reply[:i])][token] += weight

    def __call__(self, ids, first):
        prefixes = [[tuple(row[: t + 1]) for t in range(first, len(row))] for row in ids.tolist()]
        p = torch.stack([torch.stack([self.next[prefix] for prefix in row]) for row in prefixes])
        return p.log().float()

    def generate(self, prompts, end, limit, generator=None):
        return [
            self.replies[tuple(p)][
                torch.multinomial(self.weights[tuple(p)], 1, generator=generator)
            ]
            for p in prompts
        ]


@pytest.fixture(scope="module")
def known(tokenizer):
    train, held_out, _ = village.split_questions()
    return KnownReference(tokenizer, [train[0], held_out[0]])


def test_brute_force_agrees_with_the_known_reference_and_with_sampling(known, tokenizer):
    beta, question = 2.0, village.split_questions()[1][0]
    logps, rewards = evaluate.exact_distribution(known, tokenizer, [question])
    (weights,) = (
        w for p, w in known.weights.items() if p == tuple(tokenizer.encode_ordinary(question))
    )
    assert logps[0].exp().tolist() == pytest.approx(weights.tolist(), rel=1e-4, abs=1e-8)
    assert rewards[0, -1] == -3 and rewards[0, :-1].tolist() == [
        *village.responses(question).values()
    ]
    # Z(x) = E_ref[exp(r/β)]: with β = 2 no single response dominates, and sampling works too.
    config = SimpleNamespace(seed=0, max_new_tokens=24)
    _, texts = responses.sample_responses(known, tokenizer, [question] * 4000, config, "")
    terms = torch.tensor(
        [math.exp(evaluate.true_rewards([question], [t]).item() / beta) for t in texts]
    )
    _, log_z = dpo.optimal_logps(logps, rewards, beta)
    error = terms.std() / math.sqrt(len(terms))
    assert abs(terms.mean() - log_z.exp()) < 4 * error and error < 0.02 * terms.mean()


def test_measure_gives_a_policy_that_is_the_reference_its_exact_reward_and_no_kl(known, tokenizer):
    question = village.split_questions()[1][0]
    config = SimpleNamespace(seed=1, max_new_tokens=24, eval_samples=4000, beta=0.5)
    exact = evaluate.exact_distribution(known, tokenizer, [question])
    rows, shift = evaluate.measure(known, known, tokenizer, [question], exact, config)
    weights = known.weights[tuple(tokenizer.encode_ordinary(question))]
    rewards = torch.tensor([*village.responses(question).values(), -3.0], dtype=torch.float64)
    exact = (weights * rewards).sum()
    assert rows["reference"][0].item() == pytest.approx(exact.item(), abs=1e-5)
    assert rows["policy"][1].item() == rows["reference"][1].item() == 0
    spread = (weights * (rewards - exact) ** 2).sum().sqrt() / math.sqrt(4000)
    assert abs(rows["policy"][0] - exact) < 4 * spread
    best = weights * (rewards / 0.5).exp()
    assert rows["optimum"][0].item() == pytest.approx(
        (best / best.sum() * rewards).sum().item(), abs=1e-5
    )
    # Without garbled texts Z(x) has the 648 listed responses alone.
    log_z = [(best[:k].sum() / weights.sum()).log().item() for k in (649, 648)]
    assert shift == pytest.approx(0.5 * (log_z[0] - log_z[1]), rel=1e-3) and shift > 0


def test_measure_knows_another_policys_reward_and_kl(known, tokenizer):
    """Another policy than the reference: KL = Σ p log p/q, E[r] = Σ p r, and J* = β log Z."""
    question = village.split_questions()[1][0]
    policy = KnownReference(tokenizer, [question], power=3)
    config = SimpleNamespace(seed=1, max_new_tokens=24, eval_samples=4000, beta=0.5)
    exact = evaluate.exact_distribution(known, tokenizer, [question])
    rows, _ = evaluate.measure(policy, known, tokenizer, [question], exact, config)
    prompt = tuple(tokenizer.encode_ordinary(question))
    p, q = policy.weights[prompt], known.weights[prompt]
    rewards = torch.tensor([*village.responses(question).values(), -3.0], dtype=torch.float64)
    for found, values in zip(rows["policy"], (rewards, (p / q).log())):
        mean = (p * values).sum()
        spread = (p * (values - mean) ** 2).sum().sqrt() / math.sqrt(4000)
        assert abs(found - mean) < 4 * spread and spread < 0.03
    assert rows["policy"][1] > 0.1
    # The reward is the sum of its parts, and of −3 for garbled texts: in sums and in samples.
    assert all(part.abs() > 0.01 for part in rows["policy"][5:])
    for reward, _, _, garbled, _, *parts in rows.values():
        assert (sum(parts) - 3 * garbled).item() == pytest.approx(reward.item(), abs=1e-9)
    reward, kl, *_ = rows["optimum"]
    log_z = (q * (rewards / 0.5).exp()).sum().log()
    assert (reward - 0.5 * kl).item() == pytest.approx(0.5 * log_z.item(), abs=1e-5)
    # Garbled texts are as likely to this policy as to the reference, and less so to the optimum.
    log_ratio = -3 / 0.5 - log_z
    garbled_kl = (q[-1] * log_ratio.exp() * log_ratio).item()
    assert rows["optimum"][4].item() == pytest.approx(garbled_kl, rel=1e-4) and garbled_kl < -1e-6
    assert rows["policy"][4].item() == pytest.approx(0, abs=1e-6)


def test_labels_follow_bradley_terry(known, tokenizer):
    """Of pairs whose rewards differ by d, the better one is chosen a share σ(d) of the time."""
    question = village.split_questions()[0][0]
    config = SimpleNamespace(seed=0, max_new_tokens=24, num_pairs=6000)
    wins = defaultdict(list)
    for prompt, chosen, rejected in sample_pairs(known, tokenizer, config, [question]):
        gap = village.reward(prompt, chosen) - village.reward(prompt, rejected)
        wins[abs(gap)].append(gap > 0)
    for gap in (1, 2, 3):
        p, n = 1 / (1 + math.exp(-gap)), len(wins[gap])
        assert n > 300 and abs(sum(wins[gap]) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_a_pair_is_two_samples_of_one_prompt(monkeypatch):
    """Every sample names its prompt and its place; the judge always prefers the first."""
    numbered = lambda *args: (None, [f"{prompt} {i}" for i, prompt in enumerate(args[2])])  # noqa: E731
    monkeypatch.setattr("lab.pairs.sample_responses", numbered)
    config = SimpleNamespace(seed=0, num_pairs=20)
    judge = lambda prompts, firsts, seconds: torch.ones(len(prompts))  # noqa: E731
    pairs = sample_pairs(None, None, config, ["a", "b", "c"], judge)
    assert {prompt for prompt, _, _ in pairs} == {"a", "b", "c"} and len(pairs) == 20
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        assert (chosen, rejected) == (f"{prompt} {2 * i}", f"{prompt} {2 * i + 1}")


def test_noise_limits_by_hand():
    """One pair with equal rewards (a coin: ln 2, ½), one two apart (p = σ(2) = 0.88080)."""
    prompt, truth = "What does Mara do for work?", f" Mara is a {village.TRUTH['Mara', 'job']}."
    good, same, bad = f" Gladly!{truth}", f"{truth} Have fun!", f" Ugh.{truth}"
    limits = noise_limits([(prompt, good, same), (prompt, bad, good)])
    p = 0.8807970780
    assert limits["best_accuracy"] == pytest.approx((0.5 + p) / 2)
    entropy = (math.log(2) - p * math.log(p) - (1 - p) * math.log(1 - p)) / 2
    assert limits["best_loss"] == pytest.approx(entropy)


def test_pairs_are_written_as_they_are_read(tokenizer, tmp_path):
    pairs = [("Which pet?", " Good!", " Bad “é”\n."), ("Whose?", " Yes.", " No.")]
    write_pairs(f"{tmp_path}/pairs.jsonl", pairs)
    file = OwnFile(f"{tmp_path}/pairs.jsonl", "pairs", SimpleNamespace(skip_bad=False, max_bad=0.1))
    assert [row for _, row in file.rows] == pairs
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_summary_by_hand():
    """Two questions, β = 0.5: optimality is a ratio of means, (1.25 − 0.5)/(2 − 0.5) = ½."""
    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    rows = {
        "reference": (torch.tensor([0.0, 1.0]).double(), zero, one / 2, zero),
        "policy": (torch.tensor([2.0, 1.5]).double(), one, torch.tensor([0.9, 0.6]).double(), one),
        "optimum": (torch.tensor([3.0, 2.0]).double(), one, one, zero),
    }
    summary = evaluate.summarise(rows, beta=0.5, resamples=4000)
    policy = summary["policy"]
    assert (policy["reward"], policy["kl"], policy["objective"]) == (1.75, 1.0, 1.25)
    assert policy["optimality"] == pytest.approx(0.5) and policy["win_rate"] == pytest.approx(0.75)
    assert summary["reference"]["optimality"] == 0 and summary["optimum"]["optimality"] == 1
    # The mean of two draws from {2, 1.5} has the standard deviation 0.25/√2.
    assert policy["reward_se"] == pytest.approx(0.25 / math.sqrt(2), rel=0.05)


def test_win_probabilities_by_hand():
    """Against rewards 1 (70 %) and −1 (30 %): a reward of 1 wins 0.7·½ + 0.3·σ(2)."""
    p, rewards = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[1.0, -1, 1]])
    p_win = evaluate.win_probabilities(p, rewards)
    two = 1 / (1 + math.exp(-2))
    assert p_win(torch.tensor([[1.0, -1]]))[0].tolist() == pytest.approx(
        [0.7 * 0.5 + 0.3 * two, 0.7 * (1 - two) + 0.3 * 0.5]
    )
