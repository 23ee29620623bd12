"""What a policy is worth: fresh samples, their true reward and KL, and the optimum beside them.

Loss and accuracy are computed on pairs that the reference wrote. They do not show what the policy
itself writes, and these measures do.
"""

from dataclasses import dataclass

import torch

import data
import dpo
from lab import flags, village
from lab.flags import flag
from responses import response_logps_no_grad, sample_responses


@dataclass
class Config(flags.Config):
    """The settings of all trainings that start from the fine-tuned model."""

    init: str = flag("", "checkpoint to start from, and to stay close to: OUT/sft.pt")
    beta: float = flag(0.5, "β of Eq. 3, by which all methods are judged", name="--eval-beta")
    max_new_tokens: int = flag(
        24, "longest sample, in tokens; with your own data 95 in 100 responses fit", own=0
    )
    eval_questions: int = flag(
        120, "questions to measure on from each held-out set, which may have fewer"
    )
    eval_samples: int = flag(20, "samples of the report for each of these questions")


def fresh_samples(policy, reference, tokenizer, prompts, config):
    """One new sample per prompt -> texts, and log π_θ/π_ref (N,), whose mean is the KL."""
    examples, texts = sample_responses(policy, tokenizer, prompts, config, "fresh samples")
    logps = [response_logps_no_grad(model, examples) for model in (policy, reference)]
    return texts, (logps[0] - logps[1]).cpu()


def true_rewards(prompts, texts):
    """The village's reward of each response (B,), a cut-off one (None) being unparsed."""
    return torch.tensor(
        [village.UNPARSED if t is None else village.reward(p, t) for p, t in zip(prompts, texts)]
    )


def exact_distribution(model, tokenizer, questions):
    """A column for each of the village's responses, and a last one for all garbled texts, at −3.

    -> log π(y|x) and true rewards, each (Q, N + 1) float64; a row's probabilities sum to one.
    """
    examples = [data.encode(tokenizer, q, r) for q in questions for r in village.responses(q)]
    logps = response_logps_no_grad(model, examples, "every response").cpu().double()
    logps = logps.view(len(questions), -1)  # (Q, N)
    rest = 1 - logps.exp().sum(dim=1, keepdim=True)  # (Q, 1)
    logps = torch.cat([logps, rest.clamp(min=1e-12).log()], dim=1)  # (Q, N + 1)
    rewards = [[*village.responses(q).values(), village.UNPARSED] for q in questions]
    return logps, torch.tensor(rewards, dtype=torch.float64)


NO_PARTS = (0,) * len(village.PARTS)  # of a garbled text, whose reward is not made of parts


def reward_parts(questions):
    """Each part of the reward of every response, (Q, N + 1) each, as in exact_distribution()."""
    tables = [[*village.reward_parts(q).values(), NO_PARTS] for q in questions]
    return torch.tensor(tables, dtype=torch.float64).unbind(dim=2)


def measure(policy, reference, tokenizer, questions, exact, config):
    """-> (rows, shift). rows has "reference", "policy" and "optimum", each with columns (Q,): true
    reward; KL; how often a Bradley-Terry judge prefers a response to one of the reference's; share
    of garbled texts; their part of the KL; parts of the reward. shift is how far the optimum's
    objective moves if garbled texts are left out of Z(x).

    The reference's and the optimum's are sums over all responses (Eq. 4), of which exact is the
    reference's exact_distribution(). The policy's are means of config.eval_samples fresh samples
    per question.
    """
    ref_logps, rewards = exact
    best_logps, log_z = dpo.optimal_logps(ref_logps, rewards, config.beta)
    _, log_z_listed = dpo.optimal_logps(ref_logps[:, :-1], rewards[:, :-1], config.beta)
    p_win, parts = win_probabilities(ref_logps.exp(), rewards), reward_parts(questions)

    def sums(logps):
        p, is_garbled = logps.exp(), torch.arange(logps.shape[1]) == logps.shape[1] - 1
        log_ratios = logps - ref_logps  # (Q, N + 1), as all terms
        terms = rewards, log_ratios, p_win(rewards), is_garbled, is_garbled * log_ratios, *parts
        return [(p * term).sum(dim=1) for term in terms]

    prompts = [question for question in questions for _ in range(config.eval_samples)]
    texts, log_ratios = fresh_samples(policy, reference, tokenizer, prompts, config)
    garbled = torch.tensor([text not in village.responses(p) for p, text in zip(prompts, texts)])
    said = [village.reward_parts(p).get(t, NO_PARTS) for p, t in zip(prompts, texts)]
    others = garbled, garbled * log_ratios, *torch.tensor(said).T  # (Q * S,) each
    found = true_rewards(prompts, texts), log_ratios, *others
    scores, log_ratios, *others = (x.double().view(len(questions), -1) for x in found)  # (Q, S)
    means = [x.mean(dim=1) for x in (scores, log_ratios, p_win(scores), *others)]
    rows = {"reference": sums(ref_logps), "policy": means, "optimum": sums(best_logps)}
    return rows, config.beta * (log_z - log_z_listed).mean().item()


# optimality: 0 is the reference's, 1 the optimum's.
METRICS = ["reward", "kl", "objective", "optimality", "win_rate", "garbled", "kl/garbled"]
METRICS += [f"reward/{part}" for part in village.PARTS]


def level_masses(p, rewards):
    """How probable each reward is: p and rewards (Q, N) -> the L rewards, lowest first, (Q, L)."""
    levels = rewards.unique()  # (L,)
    return levels, torch.stack([(p * (rewards == v)).sum(dim=1) for v in levels], dim=1)


def win_probabilities(p, rewards):
    """-> a function from scores (Q, S) to the probabilities (Q, S) that Eq. 1 prefers them to a
    response drawn with the probabilities p (Q, N), whose rewards are (Q, N)."""
    levels, masses = level_masses(p, rewards)

    def p_win(scores):
        against = dpo.preference_probability(scores[:, :, None], levels)  # (Q, S, L)
        return (against * masses[:, None]).sum(2)

    return p_win


def summarise(rows, beta, resamples=1000):
    """rows of measure() -> {row: {metric: mean, metric_se: error}}, bootstrapped over questions."""
    columns = [torch.stack(column) for column in zip(*rows.values())]  # (3, Q) each

    def table(index):  # which questions, (..., Q) -> metric by row (M, 3, ...)
        reward, kl, *others = (column[:, index].mean(-1) for column in columns)
        j = dpo.objective(reward, kl, beta)
        return torch.stack([reward, kl, j, (j - j[0]) / (j[2] - j[0]), *others])

    count = columns[0].shape[1]
    draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(0))
    means, errors = table(torch.arange(count)), table(draws).std(-1)
    summary = {row: {} for row in rows}
    for i, metric in enumerate(METRICS[: len(means)]):
        for j, row in enumerate(rows):
            summary[row] |= {metric: means[i, j].item(), f"{metric}_se": errors[i, j].item()}
    return summary


def print_table(title, summary, shift):
    print(f"\n{title:<20}E[reward]      KL(π‖π_ref)     J = E[r] − βKL     optimality")
    names = {"reference": "reference", "policy": "policy", "optimum": "optimum, Eq. 4"}
    for row, v in summary.items():
        print(
            f"{names[row]:<16}{v['reward']:6.3f} ± {v['reward_se']:.3f}  {v['kl']:6.3f} ± "
            f"{v['kl_se']:.3f}   {v['objective']:6.3f} ± {v['objective_se']:.3f}   "
            f"{v['optimality']:7.1%} ± {v['optimality_se']:.1%}"
        )
    print(f"± one standard error. Garbled texts move the optimum's J by {shift:.0e}.")
    for row, v in summary.items():
        shares = ", ".join(f"{part} {v[f'reward/{part}']:+.2f}" for part in village.PARTS)
        lost = village.UNPARSED * v["garbled"]
        print(f"{names[row]:<16}E[reward] is the sum of {shares}, garbled {lost:+.2f}")


def print_answers(policy, reference, tokenizer, prompts, config):
    """A sample before and one after, from the same seed; in the village with true rewards."""
    true = prompts[0] in village.QUESTIONS
    print("\nBefore and after" + ", true rewards in front" * true)
    sampling = tokenizer, prompts, config, "answers"
    texts = [sample_responses(model, *sampling)[1] for model in (reference, policy)]
    for prompt, *answers in zip(prompts, *texts):
        print("  " + " ".join(prompt.split()))
        for label, text in zip(("before", "after "), answers):
            score = f"{true_rewards([prompt], [text]).item():+g}" if true else ""
            print(f"    {label} {score} {'(cut off)' if text is None else text}".replace("\n", " "))


@torch.no_grad()
def share_true(model, tokenizer, questions):
    """The share of village questions whose likeliest answer is true, kind or not."""
    prompts = [tokenizer.encode_ordinary(question) for question in questions]
    replies = model.generate(prompts, tokenizer.eot_token, 24, temperature=0)
    texts = [tokenizer.decode(reply[:-1]) for reply in replies]
    truths = [next(a for a, side in village.answers(q).items() if side == 1) for q in questions]
    return sum(truth in text for truth, text in zip(truths, texts)) / len(questions)
