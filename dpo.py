"""The mathematics of Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

Every function takes tensors, never a model: what is here can be checked with pen and paper.

    Eq. 1   p(y ≻ y'|x) = σ(r(x, y) − r(x, y'))             labels, by Bradley-Terry
    Eq. 3   max over π of E[r(x, y)] − β KL(π‖π_ref)         what a policy is trained for
    Eq. 4   π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x)       its optimum
    Eq. 5   r(x, y) = β log π*(y|x)/π_ref(y|x) + β log Z(x)  the same, solved for the reward
    Eq. 6   p(y ≻ y'|x) = σ(r̂(x, y) − r̂(x, y'))             Eq. 5 in Eq. 1: Z(x) cancels; r̂ is below
    Eq. 7   −log σ(β log π_θ(y_w|x)/π_ref(y_w|x) − β log π_θ(y_l|x)/π_ref(y_l|x))
            the loss of one pair: the negative log of Eq. 6

    name here                          paper        meaning
    prompt, chosen, rejected           x, y_w, y_l  a question, the preferred response, the other
    policy, reference                  π_θ, π_ref   the model being trained; the frozen SFT model
    beta                               β            what a nat of KL to the reference costs in Eq. 3
    *_logps                            log π(y|x)   in nats, summed over the response's tokens
                                                    (but token_logps: of each token)
    chosen_rewards, rejected_rewards   r̂            β log(π_θ/π_ref): Eq. 5 without β log Z(x)
    margins                            r̂_w − r̂_l    what the sigmoid of Eq. 7 sees
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log π of every token that is scored, and 0 at the others -> (B, T-1).

    logits (B, T, V), ids (B, T) int64, mask (B, T) bool, True on the tokens to score. The result is
    float32, or float64 for float64 logits. A token that is not scored may be any valid id.
    """
    assert mask.dtype == torch.bool and ids.shape == mask.shape == logits.shape[:2]
    if logits.dtype != torch.float64:
        logits = logits.float()  # bfloat16 has 8 bits of precision: too few for a long sum
    # The shift by one: the logits at position t predict the token at t + 1.
    logits, targets, scored = logits[:, :-1], ids[:, 1:], mask[:, 1:]
    logps = F.log_softmax(logits, dim=-1)  # (B, T-1, V)
    logps = logps.gather(2, targets[:, :, None])[:, :, 0]  # (B, T-1)
    return logps.masked_fill(~scored, 0)


def sequence_logps(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log π(y|x) of every row (B,): a sum over the response's tokens, never a mean."""
    return token_logps(logits, ids, mask).sum(dim=1)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7 for every pair: −log σ(r̂_w − r̂_l), the negative log-likelihood of its label.

    Z(x) is a sum over all texts, which nobody can compute for a real model. It is the same for both
    responses to a prompt, so it cancels in the difference of their rewards. The gradient is
    −β σ(r̂_l − r̂_w) (∇log π(y_w) − ∇log π(y_l)): a step against it pushes log π(y_w) up and
    log π(y_l) down, most where the order of the two is wrong. Only their difference counts, and
    all responses share the weights, so that both may fall.

    Four log-probabilities (B,) -> (losses, chosen_rewards, rejected_rewards), each (B,): no mean is
    taken, and the rewards carry no gradient.
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def preference_probability(rewards: Tensor, other_rewards: Tensor) -> Tensor:
    """Eq. 1, Bradley-Terry: p(y ≻ y' | x) from rewards, of shapes that broadcast. From implicit
    rewards it is Eq. 6."""
    return torch.sigmoid(rewards - other_rewards)


def objective(reward: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Eq. 3: J = E[r] − β KL(π‖π_ref), what RLHF maximises. Eq. 4 attains the maximum."""
    return reward - beta * kl


def optimal_logps(ref_logps: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Eq. 4: the best possible policy, π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x).

    ref_logps and rewards (..., N) over all N responses to a prompt (their probabilities sum to one)
    -> (log π* (..., N), log Z (...)). The objective at π* is β log Z(x).
    """
    scores = ref_logps + rewards / beta
    log_z = scores.logsumexp(dim=-1)  # the partition function Z(x), below Eq. 4
    return scores - log_z[..., None], log_z
