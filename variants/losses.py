"""DPO's family, side by side: what changes when one thing about Eq. 7 changes.

    s = log π_θ − log π_ref of a response     Δ = s_w − s_l, so that Eq. 7 is −log σ(βΔ)

All take log-probabilities (B,) and return losses (B,), without reduction. The losses of pairs share
dpo_loss's arguments. `python variants/train_variant.py --loss NAME` trains with any of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo import dpo_loss


def both_ways(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Eq. 7 of each pair as it is labelled, and as if its label were flipped."""
    labelled, _, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    flipped, _, _ = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta)
    return labelled, flipped


def cdpo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
    label_smoothing,
):  # fmt: skip
    """cDPO: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO", Eq. 3.

    A label is believed to be right only with probability 1 − ε, so that the best margin is finite.
    """
    labelled, flipped = both_ways(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    return (1 - label_smoothing) * labelled + label_smoothing * flipped


def robust_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
    label_smoothing,
):  # fmt: skip
    """Robust DPO: Chowdhury et al. 2024, arXiv:2403.00409.

    If labels were flipped with probability ε, this is DPO's loss of the clean ones on average. The
    price: the flipped label's loss enters with a minus, so that there is no lower bound.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    labelled, flipped = both_ways(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    mixed = (1 - label_smoothing) * labelled - label_smoothing * flipped
    return mixed / (1 - 2 * label_smoothing)


def ipo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
    average=False, *, chosen_lengths=None, rejected_lengths=None
):  # fmt: skip
    """IPO: Azar et al. 2023, arXiv:2310.12036, Eq. 17.

    A finite target for the log-ratio in place of a sigmoid that always asks for more.
    The paper's Δ is a sum over tokens; TRL divides by length (average=True). β, the paper's τ,
    means something else in each, and neither is the β of Eq. 3 under Bradley-Terry.
    """
    chosen = policy_chosen_logps - ref_chosen_logps
    rejected = policy_rejected_logps - ref_rejected_logps
    if average:
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
):  # fmt: skip
    """Hinge: Liu et al. 2023 (RSO), arXiv:2309.06657, "hinge-norm".

    Once a pair is told apart by a margin of 1, it is left alone. SLiC-HF (arXiv:2305.10425), where
    the hinge comes from, has no reference, a margin of its own, and a cross-entropy term.
    """
    chosen = policy_chosen_logps - ref_chosen_logps
    rejected = policy_rejected_logps - ref_rejected_logps
    return F.relu(1 - beta * (chosen - rejected))


def rpo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
    alpha, *, chosen_lengths, rejected_lengths=None
):  # fmt: skip
    """RPO: Pang et al. 2024 (iterative reasoning preference optimization), arXiv:2404.19733, Eq. 1.

    DPO plus the chosen response's SFT loss, by length: chosen must stay likely, not only likelier.
    The length is each response's own, as in the paper; TRL takes one mean over the batch's tokens.
    """
    losses, _, _ = dpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    return losses - alpha * policy_chosen_logps / chosen_lengths


def dpop_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, lambda_
):  # fmt: skip
    """DPOP (DPO-Positive): Pal et al. 2024, arXiv:2402.13228, Eq. 3.

    DPO that takes λ from the margin for every nat by which the chosen response is less likely than
    under the reference: there the gradient raises it 1 + λ times as hard as it lowers the rejected.
    """
    fallen = F.relu(ref_chosen_logps - policy_chosen_logps)
    losses, _, _ = dpo_loss(
        policy_chosen_logps - lambda_ * fallen, policy_rejected_logps, ref_chosen_logps,
        ref_rejected_logps, beta,
    )  # fmt: skip
    return losses


def simpo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
    gamma, *, chosen_lengths, rejected_lengths
):  # fmt: skip
    """SimPO: Meng et al. 2024, arXiv:2405.14734, Eq. 6.

    The reward is the mean log-probability of a token itself, which is what decoding follows; no
    reference (those arguments are unused), so nothing bounds the KL. The margin asked for is γ, as
    in the paper; trainers that take γ/β ("gamma_beta_ratio") mean another number.
    """
    difference = policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * difference - gamma)


def orpo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
    lambda_, *, chosen_lengths, rejected_lengths
):  # fmt: skip
    """ORPO: Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7.

    SFT on the chosen response and a preference for its odds in one pass, from the pretrained model.
    No reference and no β: those arguments are unused (what TRL calls beta is λ). The SFT term is
    the response's mean over tokens, as in the odds; TRL's scores the prompt too.
    """
    chosen = policy_chosen_logps / chosen_lengths
    rejected = policy_rejected_logps / rejected_lengths
    # log odds = log p − log(1 − p); expm1 keeps 1 − exp(−1e-8) from rounding to zero.
    log_odds_chosen, log_odds_rejected = (
        mean - torch.log(-torch.expm1(mean.clamp(max=-1e-12))) for mean in (chosen, rejected)
    )
    return -chosen - lambda_ * F.logsigmoid(log_odds_chosen - log_odds_rejected)


def kto_reference_point(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """z: an estimate of KL(π_θ‖π_ref) from prompts with other prompts' responses (B,) -> ().

    No gradient passes. An epoch's last batch may have one row; z is then that row's.
    """
    return (policy_logps - ref_logps).mean().clamp(min=0).detach()


def kto_loss(policy_logps, ref_logps, desirable, z_ref, beta, lambda_d=1.0, lambda_u=1.0):
    """KTO: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8 (7 in an early version, as in TRL).

    Binary feedback, desirable (B,) bool, on single responses in place of pairs. A response's value
    grows as its s exceeds the policy's usual one, z_ref () from kto_reference_point().
    """
    above = beta * (policy_logps - ref_logps - z_ref.detach())
    value_desirable = lambda_d - lambda_d * torch.sigmoid(above)
    value_undesirable = lambda_u - lambda_u * torch.sigmoid(-above)
    return torch.where(desirable, value_desirable, value_undesirable)


def sppo_loss(policy_logps: Tensor, ref_logps: Tensor, win_probs: Tensor, beta: float) -> Tensor:
    """SPPO: Wu et al. 2024, arXiv:2405.00675.

    Regression on a response's own win probability P against the policy that wrote it: both
    log-probabilities are pinned, where Eq. 7 pins their difference only. β is the paper's 1/η. The
    authors' trainer halves the sum over a pair, TRL's does not and takes P = 1 and 0.
    """
    return (policy_logps - ref_logps - (win_probs - 0.5) / beta) ** 2


def sppo_pair_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
):  # fmt: skip
    """SPPO: Wu et al. 2024, arXiv:2405.00675, on pairs: the mean of both responses' losses.

    There is one label, so the chosen response has won all its comparisons, and the rejected none.
    """
    won = torch.ones_like(policy_chosen_logps)
    chosen_losses = sppo_loss(policy_chosen_logps, ref_chosen_logps, won, beta)
    return (chosen_losses + sppo_loss(policy_rejected_logps, ref_rejected_logps, 1 - won, beta)) / 2


def clipped_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's and GRPO's clipped objective of a token: Schulman et al. 2017, arXiv:1707.06347, Eq. 7.

    Log-probabilities of single tokens, all of one shape -> losses of that shape. This is no
    preference loss: responses are the policy's own, and an advantage says how good each token was.
    The clip ends the gain from moving far, within a batch, from the policy that wrote it.
    """
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
