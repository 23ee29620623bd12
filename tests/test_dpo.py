"""The mathematics of dpo.py against hand-worked numbers, enumeration, loops and autograd.

In the order of the work: who empties token_logps, sequence_logps and dpo_loss and writes them again
turns these tests green from top to bottom.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import dpo
from data import collate
from model import GPT, GPTConfig


def random_logits(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- sequence_logps -----------------------------------------------------------------------------


def loop_logps(logits, ids, mask):
    """The definition, token by token: log p of each scored one under the position before it."""
    totals = []
    for row_logits, row_ids, row_mask in zip(logits, ids.tolist(), mask.tolist()):
        total = 0.0
        for t in range(1, len(row_ids)):
            if row_mask[t]:
                p = [math.exp(x) for x in row_logits[t - 1].tolist()]
                total += math.log(p[row_ids[t]] / sum(p))
        totals.append(total)
    return totals


def example_batch():
    ids = torch.tensor([[1, 2, 3, 4, 0], [4, 3, 0, 9, 9], [2, 1, 1, 0, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
    return random_logits(3, 5, 10), ids, mask


def test_sequence_logps_by_hand():
    """Uniform logits over 10 tokens: a sum of three tokens is −3 ln 10, not a mean of −ln 10."""
    logps = dpo.sequence_logps(torch.zeros(3, 5, 10), *example_batch()[1:])
    assert logps.tolist() == pytest.approx(
        [-3 * math.log(10), -2 * math.log(10), -3 * math.log(10)]
    )


def test_sequence_logps_equals_a_loop_over_tokens():
    logits, ids, mask = example_batch()
    assert dpo.sequence_logps(logits, ids, mask).tolist() == pytest.approx(
        loop_logps(logits, ids, mask)
    )


def test_padding_its_id_and_companions_change_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, block_size=16, n_layer=2, n_head=2, n_embd=8)).double()
    short, long = (
        ([1, 2, 3, 0], [False, False, True, True]),
        ([5, 6, 7, 8, 4, 0], [False] + [True] * 5),
    )

    def logps(examples, pad):
        ids, mask = collate(examples)
        last = torch.tensor([[len(row)] for row, _ in examples])
        ids = torch.where(torch.arange(ids.shape[1]) < last, ids, pad)
        return dpo.sequence_logps(model(ids), ids, mask)

    alone = logps([short], 0)
    for pad in (0, 3, 9):
        torch.testing.assert_close(logps([long, short], pad)[1:], alone)


def test_the_prompt_is_never_scored_and_end_of_text_once():
    logits, ids, mask = example_batch()
    moved = logits.clone()
    moved[0, 0] += torch.arange(10)  # what predicts the prompt's second token
    moved[0, 4] += torch.arange(10)  # what would come after end-of-text
    moved[1, 2:] += torch.arange(10)
    torch.testing.assert_close(
        dpo.sequence_logps(moved, ids, mask), dpo.sequence_logps(logits, ids, mask)
    )
    moved[0, 3] += torch.arange(10) / 10  # what predicts end-of-text, id 0
    before, after = (dpo.sequence_logps(x, ids, mask)[0] for x in (logits, moved))
    change = (F.log_softmax(moved[0, 3], -1) - F.log_softmax(logits[0, 3], -1))[0]
    torch.testing.assert_close(after - before, change)


def test_bfloat16_logits_are_summed_in_float32():
    logits, ids, mask = example_batch()
    logits = logits.bfloat16()
    logps = dpo.sequence_logps(logits, ids, mask)
    assert logps.dtype == torch.float32
    assert logps.tolist() == pytest.approx(loop_logps(logits.double(), ids, mask), rel=1e-6)


def test_probabilities_of_all_completions_sum_to_one():
    """With a causal model of three tokens: every text ended by end-of-text within four tokens, and
    every one cut off there. A missing shift, a mean or an unscored end would not sum to one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=3, block_size=8, n_layer=1, n_head=1, n_embd=8)).double()
    end, limit, prompt = 0, 4, [1, 2]
    completions = [
        [*words, end] for n in range(limit) for words in itertools.product((1, 2), repeat=n)
    ] + [[*words] for words in itertools.product((1, 2), repeat=limit)]
    examples = [(prompt + c, [False, False] + [True] * len(c)) for c in completions]
    ids, mask = collate(examples)
    total = dpo.sequence_logps(model(ids), ids, mask).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool)])
def test_a_mask_that_is_not_bool_or_of_another_shape_is_refused(mask):
    with pytest.raises(AssertionError):
        dpo.token_logps(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), mask)


# --- Eq. 7 --------------------------------------------------------------------------------------


def test_eq7_at_the_reference_is_ln2_with_zero_rewards():
    chosen, rejected = torch.tensor([-3.0, -40.0]), torch.tensor([-5.0, -2.0])
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(chosen, rejected, chosen, rejected, 0.3)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert not chosen_rewards.any() and not rejected_rewards.any()


@pytest.mark.parametrize(
    "margin, loss",  # −ln σ(m) = ln(1 + e^−m), by hand
    [(0, 0.6931471806), (1, 0.3132616875), (2, 0.1269280110), (-1, 1.3132616875)],
)
def test_eq7_by_hand(margin, loss):
    # β = 0.5: the chosen response gained 1 nat on the reference, the rejected 1 − margin/β.
    policy = torch.tensor([-9.0, -11.0 + 1 - margin / 0.5], dtype=torch.float64)
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(
        policy[:1], policy[1:], torch.tensor([-10.0]), torch.tensor([-11.0]), 0.5
    )
    assert losses.item() == pytest.approx(loss, abs=1e-9)
    assert chosen_rewards.item() == pytest.approx(0.5)
    assert rejected_rewards.item() == pytest.approx(0.5 - margin)


def test_gradient_is_the_papers():
    """∇L = −β σ(r̂_l − r̂_w) (∇log π_w − ∇log π_l), by autograd, with a policy of real parameters."""
    beta, theta = 0.7, random_logits(2, 6).requires_grad_()
    logps = F.log_softmax(theta, -1)
    chosen, rejected = logps[:, 1], logps[:, 4]
    ref_chosen, ref_rejected = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta
    )
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
    (gradient,) = torch.autograd.grad(losses.sum(), theta, retain_graph=True)
    expected = torch.zeros_like(theta)
    for i in range(2):
        (grad_w,) = torch.autograd.grad(chosen[i], theta, retain_graph=True)
        (grad_l,) = torch.autograd.grad(rejected[i], theta, retain_graph=True)
        r_w, r_l = beta * (chosen[i] - ref_chosen[i]), beta * (rejected[i] - ref_rejected[i])
        weight = 1 / (1 + math.exp((r_w - r_l).detach()))  # σ(r̂_l − r̂_w)
        expected += -beta * weight * (grad_w - grad_l)
    torch.testing.assert_close(gradient, expected)


def test_losses_and_gradients_are_finite_at_huge_margins():
    policy = torch.tensor([1e4, -1e4], requires_grad=True)
    losses, *_ = dpo.dpo_loss(policy, torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0)
    losses.sum().backward()
    assert losses.tolist() == [0, 1e4]
    assert policy.grad.tolist() == [0, -1]


def test_losses_and_gradients_are_finite_with_huge_bfloat16_logits():
    """Two sequences of one scored token each, of log-probability 0 and −10⁴, and the other way."""
    ids = torch.tensor([[0, 1], [0, 2]])
    mask = torch.tensor([[False, True], [False, True]])
    for sign in (1, -1):
        logits = torch.zeros(2, 2, 3, dtype=torch.bfloat16)
        logits[:, 0, 1] = sign * 10_000
        logits.requires_grad_()
        chosen, rejected = dpo.sequence_logps(logits, ids, mask).split(1)
        losses, *_ = dpo.dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), 1.0)
        losses.sum().backward()
        assert losses.item() == pytest.approx(0 if sign > 0 else 10_000, rel=1e-2, abs=1e-6)
        assert logits.grad.isfinite().all() and (logits.grad.any() or sign > 0)


# --- Eq. 1, 5, 6 and the lemmas -----------------------------------------------------------------


def test_swapping_a_pair_turns_p_into_one_minus_p():
    """Eq. 6: the loss is −log p, and the two orders of one pair are all that can happen."""
    a, b, ref_a, ref_b = random_logits(4, 50)
    one = dpo.dpo_loss(a, b, ref_a, ref_b, 0.4)[0]
    other = dpo.dpo_loss(b, a, ref_b, ref_a, 0.4)[0]
    torch.testing.assert_close((-one).exp() + (-other).exp(), torch.ones_like(one))
    p = dpo.preference_probability(*dpo.dpo_loss(a, b, ref_a, ref_b, 0.4)[1:])
    torch.testing.assert_close((-one).exp(), p)


def test_bradley_terry_is_the_ratio_of_exponentials():
    """Eq. 1 as the paper writes it: e^r_w / (e^r_w + e^r_l)."""
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([-1.0, 2.0])
    expected = [
        math.exp(2) / (math.exp(2) + math.exp(-1)),
        math.exp(-1) / (math.exp(2) + math.exp(-1)),
    ]
    assert dpo.preference_probability(chosen, rejected).tolist() == pytest.approx(expected)


def test_rewards_that_differ_by_a_function_of_the_prompt_are_one():
    """Lemma 1 and 2: neither preferences nor the optimal policy see it."""
    ref_logps, rewards = F.log_softmax(random_logits(5, 9), -1), random_logits(5, 9, seed=1)
    shifted = rewards + random_logits(5, 1, seed=2)
    torch.testing.assert_close(
        dpo.preference_probability(rewards[:, 0], rewards[:, 1]),
        dpo.preference_probability(shifted[:, 0], shifted[:, 1]),
    )
    torch.testing.assert_close(
        dpo.optimal_logps(ref_logps, rewards, 0.3)[0], dpo.optimal_logps(ref_logps, shifted, 0.3)[0]
    )


def test_eq5_gives_the_reward_back_from_the_optimal_policy():
    ref_logps, rewards = F.log_softmax(random_logits(5, 9), -1), random_logits(5, 9, seed=1)
    logps, log_z = dpo.optimal_logps(ref_logps, rewards, 0.3)
    torch.testing.assert_close(0.3 * (logps - ref_logps) + 0.3 * log_z[:, None], rewards)


# --- Eq. 3 and 4 --------------------------------------------------------------------------------


def loop_optimum(ref_logps, rewards, beta):
    """Eq. 4 for one prompt as a loop over responses."""
    weights = [
        math.exp(lp) * math.exp(r / beta) for lp, r in zip(ref_logps.tolist(), rewards.tolist())
    ]
    return [w / sum(weights) for w in weights], sum(weights)


def kl_and_reward(logps, ref_logps, rewards):
    p = logps.exp()
    return (p * (logps - ref_logps)).sum(-1), (p * rewards).sum(-1)


def test_optimum_equals_a_loop():
    ref_logps, rewards = F.log_softmax(random_logits(7), -1), random_logits(7, seed=1)
    logps, log_z = dpo.optimal_logps(ref_logps, rewards, 0.3)
    expected, z = loop_optimum(ref_logps, rewards, 0.3)
    assert logps.exp().tolist() == pytest.approx(expected)
    assert log_z.item() == pytest.approx(math.log(z))


def test_objective_at_the_optimum_is_beta_log_z_and_nothing_beats_it():
    beta, ref_logps, rewards = 0.3, F.log_softmax(random_logits(9), -1), random_logits(9, seed=1)
    logps, log_z = dpo.optimal_logps(ref_logps, rewards, beta)
    kl, reward = kl_and_reward(logps, ref_logps, rewards)
    best = dpo.objective(reward, kl, beta)
    torch.testing.assert_close(best, beta * log_z)
    for seed in range(200):
        near = F.log_softmax(logps + 0.3 * random_logits(9, seed=seed + 2), -1)
        kl, reward = kl_and_reward(near, ref_logps, rewards)
        assert dpo.objective(reward, kl, beta) < best


def test_kl_of_the_optimum_falls_as_beta_grows():
    ref_logps, rewards = F.log_softmax(random_logits(9), -1), random_logits(9, seed=1)
    kls = [
        kl_and_reward(dpo.optimal_logps(ref_logps, rewards, beta)[0], ref_logps, rewards)[0].item()
        for beta in (0.1, 0.2, 0.5, 1, 2, 5, 1000)
    ]
    assert kls == sorted(kls, reverse=True) and kls[-1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_minimising_the_population_loss_arrives_at_the_optimum(shift):
    """What the paper proves, by descent: on every pair of a tabular policy's responses, weighted
    with the probability of its label under r + f(x), the loss is least at the π* of Eq. 4."""
    beta = 0.5
    ref_logps, rewards = F.log_softmax(random_logits(5), -1), random_logits(5, seed=1)
    pairs = torch.tensor(list(itertools.permutations(range(5), 2)))  # (20, 2): chosen, rejected
    chosen, rejected = pairs.T
    labels = 1 / (1 + torch.exp((rewards + shift)[rejected] - (rewards + shift)[chosen]))  # Eq. 1
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def population_loss():
        optimizer.zero_grad()
        logps = F.log_softmax(theta, -1)
        losses, *_ = dpo.dpo_loss(
            logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected], beta
        )
        loss = (labels * losses).mean()
        loss.backward()
        return loss

    optimizer.step(population_loss)
    expected, _ = loop_optimum(ref_logps, rewards, beta)
    assert F.softmax(theta, -1).tolist() == pytest.approx(expected, abs=1e-6)
