"""The losses of variants/losses.py against scalar loops in plain Python, hand-worked numbers and
derivatives worked out on paper. Each oracle below returns three floats: the loss of one pair p, its
derivative by log π_θ(y_w) and its derivative by log π_θ(y_l). Of p it may read s_w and s_l, the
log-ratios to the reference; delta, their difference; n_w and n_l, the lengths in tokens; bar_w and
bar_l, the mean log π_θ of a token, so that log π_θ(y_w) is p.n_w * p.bar_w."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import dpo
from variants import losses, train_variant


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def surprise(x):
    """−log σ(x), stable; its derivative is −σ(−x)."""
    return max(-x, 0) + math.log1p(math.exp(-abs(x)))


def log_odds(x):
    """log p/(1−p) of p = eˣ; its derivative is 1/(1−p) = −1/expm1(x)."""
    return x - math.log(-math.expm1(x))


def cdpo(p, beta, eps):
    m = beta * p.delta
    slope = beta * (-(1 - eps) * sigmoid(-m) + eps * sigmoid(m))
    return (1 - eps) * surprise(m) + eps * surprise(-m), slope, -slope


def robust(p, beta, eps):
    m = beta * p.delta
    slope = beta * (-(1 - eps) * sigmoid(-m) - eps * sigmoid(m)) / (1 - 2 * eps)
    return ((1 - eps) * surprise(m) - eps * surprise(-m)) / (1 - 2 * eps), slope, -slope


def ipo(p, beta, average):
    n_w, n_l = (p.n_w, p.n_l) if average else (1, 1)
    distance = p.s_w / n_w - p.s_l / n_l - 1 / (2 * beta)
    return distance**2, 2 * distance / n_w, -2 * distance / n_l


def hinge(p, beta):
    m = beta * p.delta
    return (1 - m, -beta, beta) if m < 1 else (0, 0, 0)


def rpo(p, beta, alpha):
    m = beta * p.delta
    pull = beta * sigmoid(-m)
    return surprise(m) - alpha * p.bar_w, -pull - alpha / p.n_w, pull


def dpop(p, beta, lambda_):
    fallen = max(0, -p.s_w)
    m = beta * (p.delta - lambda_ * fallen)
    pull = beta * sigmoid(-m)
    return surprise(m), -pull * (1 + lambda_ * (p.s_w < 0)), pull


def simpo(p, beta, gamma):
    x = beta * (p.bar_w - p.bar_l) - gamma
    pull = beta * sigmoid(-x)
    return surprise(x), -pull / p.n_w, pull / p.n_l


def orpo(p, beta, lambda_):
    x = log_odds(p.bar_w) - log_odds(p.bar_l)
    by_w = -1 + lambda_ * sigmoid(-x) / math.expm1(p.bar_w)
    by_l = -lambda_ * sigmoid(-x) / math.expm1(p.bar_l)
    return -p.bar_w + lambda_ * surprise(x), by_w / p.n_w, by_l / p.n_l


def kto(p, beta, z, lambda_d, lambda_u):
    """The chosen response desirable, the rejected one not. λ − λσ(x) = λσ(−x)."""
    x, y = beta * (p.s_w - z), beta * (z - p.s_l)
    slope_w, slope_l = (sigmoid(t) * sigmoid(-t) for t in (x, y))
    loss = lambda_d * sigmoid(-x) + lambda_u * sigmoid(-y)
    return loss, -lambda_d * beta * slope_w, lambda_u * beta * slope_l


def sppo(p, beta, win_prob):
    """The chosen response beats its like with probability P, the rejected one with 1 − P."""
    off_w, off_l = p.s_w - (win_prob - 0.5) / beta, p.s_l - (0.5 - win_prob) / beta
    return off_w**2 + off_l**2, 2 * off_w, 2 * off_l


def sppo_mean(p, beta):
    """The same at P = 1, divided by the two responses."""
    return [x / 2 for x in sppo(p, beta, 1)]


def kto_pair(w, r, ref_w, ref_r, beta, z, lambda_d, lambda_u):
    desirable = torch.arange(2 * len(w)) < len(w)
    z = torch.tensor(z, dtype=w.dtype)
    policy, ref = torch.cat([w, r]), torch.cat([ref_w, ref_r])
    return sum(losses.kto_loss(policy, ref, desirable, z, beta, lambda_d, lambda_u).chunk(2))


def sppo_pair(w, r, ref_w, ref_r, beta, win_prob):
    p = torch.full_like(w, win_prob)
    return losses.sppo_loss(w, ref_w, p, beta) + losses.sppo_loss(r, ref_r, 1 - p, beta)


E = math.e
# name: loss, oracle, arguments after beta, whether it takes lengths, and two values by hand, for
# β = ½ and responses of 4 and 3 tokens with log π_θ = −4 and −6: at π_ref = π_θ, and where the
# policy lost a nat on the chosen response and won one on the rejected, so that βΔ = −1.
CASES = {
    "cdpo": (losses.cdpo_loss, cdpo, (0.1,), False, math.log(2), math.log(1 + E) - 0.1),
    "robust": (losses.robust_loss, robust, (0.1,), False, math.log(2), math.log(1 + E) + 1 / 8),
    "ipo": (losses.ipo_loss, ipo, (False,), False, 1, 9),
    "ipo of means": (losses.ipo_loss, ipo, (True,), True, 1, (1 / 4 + 1 / 3 + 1) ** 2),
    "hinge": (losses.hinge_loss, hinge, (), False, 1, 2),
    "rpo": (losses.rpo_loss, rpo, (0.7,), True, math.log(2) + 0.7, math.log(1 + E) + 0.7),
    "dpop": (losses.dpop_loss, dpop, (3.0,), False, math.log(2), math.log(1 + E**2.5)),
    "simpo": (losses.simpo_loss, simpo, (1.5,), True, math.log(1 + E), math.log(1 + E)),
    "orpo": (losses.orpo_loss, orpo, (0.7,), True, *[1 + 0.7 * math.log((E + 2) / (E + 1))] * 2),
    "kto": (
        *(kto_pair, kto, (2.0, 1.5, 0.5), False),
        *(1.5 * sigmoid(1) + 0.5 * sigmoid(-1), 1.5 * sigmoid(1.5) + 0.5 * sigmoid(-0.5)),
    ),
    "sppo": (sppo_pair, sppo, (0.9,), False, 2 * 0.8**2, 2 * 1.8**2),
    "sppo of pairs": (losses.sppo_pair_loss, sppo_mean, (), False, 1, 4),
}
WITHOUT_REFERENCE = losses.simpo_loss, losses.orpo_loss
each_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def call(case, logps, lengths, beta):
    """logps (4, B) in the order of the signatures, lengths (2, B) -> losses (B,)."""
    loss, _, extra, takes_lengths, *_ = case
    lengths = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    return loss(*logps, beta, *extra, **lengths if takes_lengths else {})


def pairs(batch=64, seed=0):
    """Negative log-probabilities of responses of 1 to 30 tokens; Δ is some 6 nats either way."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (2, batch), generator=generator)
    policy = -lengths * (0.1 + 3 * torch.rand(2, batch, generator=generator, dtype=torch.float64))
    moved = 4 * torch.randn(2, batch, generator=generator, dtype=torch.float64)
    return torch.cat([policy, policy - moved]), lengths


def assert_equals_oracle(case, logps, lengths, beta, rel):
    logps = logps.clone().requires_grad_()
    got = call(case, logps, lengths, beta)
    (grad,) = torch.autograd.grad(got.sum(), logps)
    expected = []
    for w, r, ref_w, ref_r, n_w, n_l in zip(*logps.tolist(), *lengths.tolist()):
        p = SimpleNamespace(s_w=w - ref_w, s_l=r - ref_r, n_w=n_w, n_l=n_l)
        p.delta, p.bar_w, p.bar_l = p.s_w - p.s_l, w / n_w, r / n_l
        expected.append(case[1](p, beta, *case[2]))
    assert got.dtype == logps.dtype
    for ours, oracles in zip([got, grad[0], grad[1]], zip(*expected)):
        assert ours.tolist() == pytest.approx(oracles, rel=rel, abs=1e-12)


@each_loss
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_value_and_gradient_equal_a_scalar_loop(case, beta):
    assert_equals_oracle(case, *pairs(), beta, rel=1e-9)


@each_loss
def test_values_at_the_reference_and_off_it_are_those_by_hand(case):
    logps = torch.tensor([[-4.0, -4], [-6, -6], [-4, -3], [-6, -7]], dtype=torch.float64)
    values = call(case, logps, torch.tensor([[4, 4], [3, 3]]), 0.5)
    assert values.tolist() == pytest.approx(case[4:], rel=1e-12)


@each_loss
def test_float32_is_right_at_margins_of_ten_thousand_nats(case):
    logps = torch.tensor([[-1.0, -1e4], [-1e4, -1], [-1, -1], [-1, -1]])
    values = call(case, logps, torch.tensor([[2, 2], [1, 1]]), 1.0)
    assert values.isfinite().all()
    assert_equals_oracle(case, logps, torch.tensor([[2, 2], [1, 1]]), 1.0, rel=1e-5)


@each_loss
def test_only_losses_without_a_reference_do_not_see_it(case):
    logps, lengths = pairs()
    other = torch.cat([logps[:2], logps[2:] + torch.tensor([[1.0], [-2.0]])])
    same = torch.equal(call(case, logps, lengths, 0.5), call(case, other, lengths, 0.5))
    assert same == (case[0] in WITHOUT_REFERENCE)


def test_no_loss_of_the_command_line_is_without_a_case():
    tested = {case[0] for case in CASES.values()} | {losses.kto_loss}  # in kto_pair()
    for name, (function, *_) in train_variant.LOSSES.items():
        assert function in tested, f"{name} has no oracle and no row of CASES"


# --- what is particular to each -----------------------------------------------------------------


def at_margin(margins, beta):
    """Four log-probabilities (B,) with βΔ = margins, the policy's chosen one a leaf."""
    chosen = (torch.tensor(margins, dtype=torch.float64) / beta - 3).requires_grad_()
    return chosen, *torch.tensor([[-5.0], [-2.0], [-4.0]]).double().expand(3, len(margins))


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_cdpo_is_least_at_the_log_odds_of_a_right_label(eps):
    best = math.log((1 - eps) / eps)
    logps = at_margin([best - 0.1, best, best + 0.1], 0.4)
    values = losses.cdpo_loss(*logps, 0.4, eps)
    (slope,) = torch.autograd.grad(values.sum(), logps[0])
    assert slope[0] < 0 < slope[2] and slope[1].item() == pytest.approx(0, abs=1e-12)
    entropy = -eps * math.log(eps) - (1 - eps) * math.log(1 - eps)
    assert values[1].item() == pytest.approx(entropy)


@pytest.mark.parametrize("eps", [0, 0.1, 0.4, 0.49])
def test_robust_averaged_over_flipped_labels_is_dpo(eps):
    (w, r, ref_w, ref_r), _ = pairs()
    right = losses.robust_loss(w, r, ref_w, ref_r, 0.3, eps)
    flipped = losses.robust_loss(r, w, ref_r, ref_w, 0.3, eps)
    expected = dpo.dpo_loss(w, r, ref_w, ref_r, 0.3)[0]
    torch.testing.assert_close((1 - eps) * right + eps * flipped, expected)


def test_robust_is_unbounded_below_where_cdpo_is_not():
    logps = at_margin([100, 1000, 10_000], 0.5)  # the loss tends to −ε βΔ/(1 − 2ε)
    robust_values = losses.robust_loss(*logps, 0.5, 0.1).tolist()
    assert robust_values == pytest.approx([-12.5, -125, -1250])
    assert losses.cdpo_loss(*logps, 0.5, 0.1).tolist() == pytest.approx([10, 100, 1000])


@pytest.mark.parametrize("eps", [0.5, 0.6, 1.0])
def test_robust_refuses_labels_no_better_than_a_coin(eps):
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        losses.robust_loss(*at_margin([1], 0.5), 0.5, eps)


def test_ipo_pulls_back_beyond_its_target_of_one_over_two_beta():
    logps = at_margin([0.4, 0.5, 0.6], 0.2)  # Δ = 2, 2.5 and 3
    values = losses.ipo_loss(*logps, 0.2)
    (slope,) = torch.autograd.grad(values.sum(), logps[0])
    assert values.tolist() == pytest.approx([0.25, 0, 0.25], abs=1e-12)
    assert slope.tolist() == pytest.approx([-1, 0, 1], abs=1e-12)


def test_hinge_has_no_gradient_past_the_margin():
    logps = at_margin([0.99, 1.01, 50], 0.2)
    values = losses.hinge_loss(*logps, 0.2)
    (slope,) = torch.autograd.grad(values.sum(), logps[0])
    assert values.tolist() == pytest.approx([0.01, 0, 0])
    assert slope.tolist() == pytest.approx([-0.2, 0, 0])


def test_rpo_and_sppo_see_both_responses_fall_together_and_dpo_does_not():
    logps, (n_w, n_l) = pairs()
    fallen = torch.cat([logps[:2] - 3, logps[2:]])
    lengths = {"chosen_lengths": n_w, "rejected_lengths": n_l}
    difference = [losses.rpo_loss(*x, 0.3, 0.7, **lengths) for x in (fallen, logps)]
    torch.testing.assert_close(difference[0] - difference[1], 0.7 * 3 / n_w.double())
    torch.testing.assert_close(dpo.dpo_loss(*fallen, 0.3)[0], dpo.dpo_loss(*logps, 0.3)[0])
    logps[:2] = logps[2:] + torch.tensor([[1.0], [-1.0]])  # s = ±1 = (P − ½)/β: the minimum
    for fall, loss in ((0, 0), (3, 2 * 3**2)):
        values = sppo_pair(logps[0] - fall, logps[1] - fall, *logps[2:], 0.4, 0.9)
        assert values.tolist() == pytest.approx([loss] * 64, abs=1e-9)


def test_orpo_does_not_see_beta():
    assert torch.equal(*(call(CASES["orpo"], *pairs(), beta) for beta in (0.1, 5.0)))


def test_orpo_in_float32_is_accurate_from_certainty_to_despair():
    """log(1 − p) of p = exp(l̄) is where float32 would lose everything, at both ends."""
    bars = [-1e-8, -1e-6, -1e-3, -0.1, -0.69, -0.7, -2.0, -15.0, -20.0, -50.0]
    policy = torch.tensor(list(itertools.product(bars, bars))).T
    logps = torch.cat([policy, torch.zeros_like(policy)])
    lengths = torch.ones(2, 100, dtype=torch.int64)
    assert_equals_oracle(CASES["orpo"], logps, lengths, 0.5, rel=1e-5)


def test_orpo_stays_finite_where_a_response_is_certain():
    """Rejected with probability 1, held 1e-12 short of it; chosen ½: ln 2 + softplus(ln 1e12)."""
    rejected = torch.zeros(1, requires_grad=True)
    logps = torch.tensor([-math.log(2)]), rejected, torch.zeros(1), torch.zeros(1)
    one = torch.ones(1, dtype=torch.int64)
    loss = losses.orpo_loss(*logps, 0.5, 1.0, chosen_lengths=one, rejected_lengths=one)
    assert loss.item() == pytest.approx(math.log(2) + math.log(1e12), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, rejected)
    assert gradient.isfinite()


@pytest.mark.parametrize("labels", ["+-+", "+++", "---", "--+"])
def test_kto_takes_any_mix_of_labels_and_leaves_z_alone(labels):
    s = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([label == "+" for label in labels])
    z = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    values = losses.kto_loss(s - 9, torch.full_like(s, -9), desirable, z, 0.5)  # both λ = 1
    signs = [1 if label == "+" else -1 for label in labels]
    x = [sign * 0.5 * (si - 0.8) for sign, si in zip(signs, s.tolist())]
    assert values.tolist() == pytest.approx([1 - sigmoid(xi) for xi in x])
    slope, to_z = torch.autograd.grad(values.sum(), (s, z), allow_unused=True)
    expected = [-sign * 0.5 * sigmoid(xi) * sigmoid(-xi) for sign, xi in zip(signs, x)]
    assert slope.tolist() == pytest.approx(expected)
    assert to_z is None or to_z == 0


def test_kto_at_the_reference_is_half_of_lambda():
    logps, desirable = torch.tensor([-3.0, -40.0]), torch.tensor([True, False])
    values = losses.kto_loss(logps, logps, desirable, torch.tensor(0.0), 0.3, 1.5, 0.5)
    assert values.tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize(
    "s, z",  # the mean is cut at 0, not its terms, and is no sum
    [([3.0], 3), ([3.0, -1.0], 1), ([-5.0, 2.0], 0), ([3.0, -1.0, 4.0], 2), ([0.0, 0.0], 0)],
)
def test_kto_reference_point_is_the_mean_cut_at_zero_and_detached(s, z):
    policy = (torch.tensor(s) - 7).requires_grad_()
    point = losses.kto_reference_point(policy, torch.full_like(policy, -7).requires_grad_())
    assert point.shape == () and point.item() == z and not point.requires_grad


def test_clipped_loss_by_hand():
    """Advantage 2 and −2 at ratios 1, 1.5, 0.5, clip 0.2: gains are clipped."""
    old = torch.full((6,), -1.7, dtype=torch.float64)
    ratios = torch.tensor([1, 1.5, 0.5, 1, 1.5, 0.5]).double()
    new = (old + ratios.log()).requires_grad_()
    advantages = torch.tensor([2.0, 2, 2, -2, -2, -2]).double()
    loss = losses.clipped_loss(new, old, advantages, 0.2)
    assert loss.tolist() == pytest.approx([-2, -2.4, -1, 2, 3, 1.6])
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert gradient.tolist() == pytest.approx([-2, 0, -1, 2, 3, 0])
