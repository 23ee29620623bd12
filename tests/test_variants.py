"""The family's trainers: each part by hand, whole trainings on a world that can be enumerated."""

import copy
import dataclasses
import inspect
import math
import random

import pytest
import torch

import data
import dpo
import model as gpt
import train_dpo
from experiments import compare, frontier
from lab import runs, village
from responses import response_logps, response_logps_no_grad, sample_responses
from variants import (
    kto,
    reward_model,
    train_grpo,
    train_online,
    train_rlhf,
    train_selfplay,
    train_variant,
)

# --- A world that can be enumerated -------------------------------------------------------------


class Letters:
    """A tokenizer of five letters; the sixth token ends a text."""

    eot_token, n_vocab = 5, 6

    def encode_ordinary(self, text):
        return ["abcde".index(letter) for letter in text]

    def decode(self, ids):
        return "".join("abcde"[i] for i in ids)


PROMPTS = ["a", "b"]
TEXTS = ["", *"abcde"]  # all that ends within two tokens
REPLIES = [[5], *([i, 5] for i in range(5)), *([i, j] for i in range(5) for j in range(5))]
# What "a" is answered matters little (a small std), what "b" is answered matters much.
WORTH = {"a": [0, 0.1, 0.2, 0.3, 0.4, 0.8], "b": [0, 0.5, 1, 1.5, 2, 3]}


def worth(prompts, texts):
    """Texts that were cut off are worth −1."""
    return torch.tensor(
        [-1 if t is None else WORTH[p][TEXTS.index(t)] for p, t in zip(prompts, texts)]
    ).float()


def enumerate_logps(model):
    """log π of all 31 replies to each prompt, (2, 31)."""
    tokens = Letters()
    rows = []
    for prompt in PROMPTS:
        examples = [data.join_ids(tokens.encode_ordinary(prompt), reply) for reply in REPLIES]
        rows.append(response_logps_no_grad(model, examples))
    return torch.stack(rows).double()


@pytest.fixture(scope="module")
def world():
    """(policy, reference, tokenizer) at the start, and Eq. 4's optimum by enumeration."""
    torch.manual_seed(1)
    reference = gpt.GPT(gpt.GPTConfig(6, 8, n_layer=1, n_head=2, n_embd=32)).eval()
    reference.requires_grad_(False)
    logps = enumerate_logps(reference)
    assert logps.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)
    rewards = [WORTH[p] + [-1] * 25 for p in PROMPTS]
    best, _ = dpo.optimal_logps(logps, torch.tensor(rewards).double(), beta=0.5)
    return reference, best.exp()


TRAIN = {train_grpo: train_grpo.train_on_groups, train_rlhf: train_rlhf.train_ppo}
TOY = {"max_new_tokens": 2, "kl_beta": 0.5, "steps": 150, "minibatches": 1}


def fit(world, module, config):
    """A training to its end -> distances (total variation) from π*, policy (2, 31), metrics."""
    reference, best = world
    policy = copy.deepcopy(reference).requires_grad_(True)
    models = policy, reference, Letters()
    extra = {"true_reward": worth} if module is train_rlhf else {}
    metrics = list(TRAIN[module](models, config, PROMPTS, worth, **extra))
    p = enumerate_logps(policy).exp()
    return (p - best).abs().sum(1) / 2, p, metrics


def test_grpo_without_std_arrives_at_the_optimum_and_with_std_beta_is_another_one_by_question(
    world,
):
    config = train_grpo.Config(no_std=True, questions=64, group=8, lr=1e-2, **TOY)
    distance, p, _ = fit(world, train_grpo, config)
    assert distance.max() < 0.05
    # Published: rewards are divided by the std, 0.5 or so for "a" and 1.2 for "b" in the reference.
    # Where that is small the question is pushed beyond its optimum, where it is large not so far.
    distance, p, _ = fit(world, train_grpo, dataclasses.replace(config, no_std=False))
    _, best = world
    assert distance[0] > 0.1
    assert p[0, 5] > best[0, 5] + 0.1  # the best reply to "a"
    assert p[0, 5] / p[0, 1:5].sum() > best[0, 5] / best[0, 1:5].sum()
    assert p[1, 5] < best[1, 5] - 0.03  # the best reply to "b"


def test_published_grpo_is_blind_to_the_rewards_scale_and_the_policy_gradient_is_not(world):
    """Ten times the rewards have ten times the std. At the first step there is no KL yet."""
    reference, _ = world
    for no_std, factor in ((False, 1), (True, 10)):
        config = train_grpo.Config(no_std=no_std, questions=8, group=8, **TOY | {"steps": 1})
        norms = []
        for scale in (1, 10):
            models = copy.deepcopy(reference).requires_grad_(True), reference, Letters()
            reward = lambda prompts, texts, scale=scale: scale * worth(prompts, texts)  # noqa: E731
            (metrics,) = train_grpo.train_on_groups(models, config, PROMPTS, reward)
            norms.append(metrics["grad_norm"])
        assert norms[1] / norms[0] == pytest.approx(factor, rel=1e-2)  # 1e-4 is added to the std


def test_ppo_on_the_true_reward_arrives_at_the_optimum(world):
    config = train_rlhf.Config(true_reward=True, samples=512, lr=1e-2, **TOY)
    distance, _, metrics = fit(world, train_rlhf, config)
    assert distance.max() < 0.05
    # On the first step the policy is the one that wrote the samples, and is the reference.
    assert metrics[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert metrics[-1]["kl"] > 0.1
    two = dataclasses.replace(config, steps=1, minibatches=2)
    assert fit(world, train_rlhf, two)[2][0]["ratio"] != pytest.approx(1, abs=1e-5)


def test_ppos_value_head_learns_the_return_and_leaves_no_advantage(world):
    """Every text is worth 2 and KL costs next to nothing: V is 2, and the loss without gain 0."""
    reference, _ = world
    models = copy.deepcopy(reference).requires_grad_(True), reference, Letters()
    config = train_rlhf.Config(steps=60, samples=64, max_new_tokens=2, kl_beta=1e-6, value_lr=0.1)

    def two(prompts, texts):
        return torch.full((len(texts),), 2.0)

    metrics = list(train_rlhf.train_ppo(models, config, PROMPTS, two, true_reward=two))
    assert abs(metrics[0]["loss"]) > 2 and abs(metrics[-1]["loss"]) < 0.1


# --- What is logged, by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("module", [train_grpo, train_rlhf])
def test_logged_rewards_and_kl_are_those_of_the_samples(world, module):
    """The same chances drawn again: the first step's texts, what they are worth, and their KL as a
    mean over responses of sums over tokens, by a policy that is not the reference."""
    reference, _ = world
    policy, tokens = copy.deepcopy(reference).requires_grad_(True), Letters()
    with torch.no_grad():
        policy.ln_f.weight += 0.5 * torch.randn(32, generator=torch.Generator().manual_seed(5))
    before = copy.deepcopy(policy)
    sizes = {"questions": 32, "group": 2} if module is train_grpo else {"samples": 64}
    config = module.Config(steps=1, minibatches=1, max_new_tokens=2, **sizes)
    extra = {"true_reward": lambda p, t: 10 * worth(p, t)} if module is train_rlhf else {}
    (metrics,) = TRAIN[module]((policy, reference, tokens), config, PROMPTS, worth, **extra)
    prompts = random.Random(config.seed).choices(PROMPTS, k=32 if module is train_grpo else 64)
    prompts = [p for p in prompts for _ in range(64 // len(prompts))]
    examples, texts = sample_responses(before, tokens, prompts, config, "")
    ratios = [response_logps_no_grad(model, examples) for model in (before, reference)]
    kl = sum(a - b for a, b in zip(*(x.tolist() for x in ratios))) / 64
    assert metrics["kl"] == pytest.approx(kl, abs=1e-5) and abs(kl) > 0.05
    mean = worth(prompts, texts).mean().item()
    assert metrics["reward"] == pytest.approx(mean, abs=1e-6)
    assert module is train_grpo or metrics["true_reward"] == pytest.approx(10 * mean, abs=1e-5)
    assert metrics["lr"] == config.lr  # one step, and no time to warm up


def test_ppos_first_loss_and_value_error_by_hand(world):
    """Policy and reference are one and V is 0: a token that is k before the last one has the
    advantage and the return λᵏ r, at the ratio 1."""
    reference, _ = world
    policy, tokens = copy.deepcopy(reference).requires_grad_(True), Letters()
    config = train_rlhf.Config(steps=1, minibatches=1, max_new_tokens=2, samples=64, gae_lambda=0.7)
    models = policy, reference, tokens
    (metrics,) = train_rlhf.train_ppo(models, config, PROMPTS, worth, true_reward=worth)
    prompts = random.Random(config.seed).choices(PROMPTS, k=64)
    examples, texts = sample_responses(reference, tokens, prompts, config, "")
    advantages = [
        [0.7**k * r for k in range(sum(mask))]
        for (_, mask), r in zip(examples, worth(prompts, texts).tolist())
    ]
    count = sum(map(len, advantages))
    assert metrics["loss"] == pytest.approx(-sum(map(sum, advantages)) / 64, abs=1e-5)
    squares = sum(a * a for row in advantages for a in row)
    assert metrics["value_error"] == pytest.approx(squares / count, rel=1e-4)


def test_sppos_metrics_by_hand():
    """s = 1, ½, −1, −3, and of one that won as often as it lost, 9, which counts for neither."""
    policy, ref = torch.tensor([-1.0, -2, -3, -4, 1]), torch.tensor([-2.0, -2.5, -2, -1, -8])
    wins = torch.tensor([1, 2 / 3, 1 / 3, 0, 0.5])
    metrics = train_selfplay.sppo_metrics(policy, ref, wins)
    assert {name: value.item() for name, value in metrics.items()} == {
        "log_ratio/won": pytest.approx(0.75), "log_ratio/lost": pytest.approx(-2),
    }  # fmt: skip


def test_ktos_metrics_by_hand():
    """z = 1; s − z = 1 of the liked one, ½, −2 and 0.4 of the others; β is the evaluation's."""
    policy, ref = torch.tensor([-1.0, -1.5, -4, -1.6]), torch.tensor([-3.0, -3, -3, -3])
    liked = torch.tensor([True, False, False, False])
    batch = kto.Thumbs([], [], liked, ref, torch.tensor([-5.0, -6]))
    _, metrics = kto.losses_and_metrics(
        policy, torch.tensor([-4.0, -5]), batch, train_variant.config_of("kto")(loss_beta=0.3)
    )
    assert {name: value.item() for name, value in metrics.items()} == {
        "rewards/chosen": pytest.approx(0.5),
        "rewards/rejected": pytest.approx(0.5 * (0.5 - 2 + 0.4) / 3),
        "rewards/accuracies": pytest.approx(0.5),
        "kto/z_ref": pytest.approx(1),
        "rewards/margins": pytest.approx(0.5 + 0.5 * 1.1 / 3),
    }


def test_grpos_labels_are_all_its_samples():
    assert train_grpo.count_labels(train_grpo.Config(steps=3, questions=5, group=4)) == 60


# --- GRPO and PPO, by hand ----------------------------------------------------------------------


def test_group_advantages_by_hand():
    """1, 2, 3 has mean 2 and standard deviation 1; equal rewards have nothing to tell."""
    rewards = torch.tensor([[1.0, 2, 3], [0.1, 0.1, 0.1]])
    centred = train_grpo.group_advantages(rewards, divide_by_std=False)
    torch.testing.assert_close(centred, torch.tensor([[-1.0, 0, 1], [0, 0, 0]]))
    scaled = train_grpo.group_advantages(3 * rewards, divide_by_std=True)
    torch.testing.assert_close(scaled, centred, atol=1e-3, rtol=0)


def random_tokens(rows=3, length=5):
    generator = torch.Generator().manual_seed(0)
    logps, old, ref = (
        -torch.rand(rows, length, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    return logps, old, ref, mask, torch.tensor([1.5, -0.5, 2.0]).double()


def test_grpo_losses_equal_loops():
    logps, old, ref, mask, advantages = random_tokens()
    published = train_grpo.grpo_loss(logps, old, ref, mask, advantages, 0.2, 0.3)
    plain = train_grpo.policy_gradient_loss(logps, old, mask, advantages, 0.2)
    for i in range(3):
        terms, sums = [], []
        for t in range(5):
            if not mask[i, t]:
                continue
            ratio = math.exp(logps[i, t] - old[i, t])
            a = advantages[i].item()
            gain = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            q = math.exp(ref[i, t] - logps[i, t])
            terms.append(gain - 0.3 * (q - math.log(q) - 1))
            sums.append(gain)
        assert published[i].item() == pytest.approx(-sum(terms) / len(terms))
        assert plain[i].item() == pytest.approx(-sum(sums))


def test_gae_equals_a_loop_over_its_definition():
    """Eq. 16: Σ_k λ^k δ_{t+k}; with λ = 1 it is the return minus the value."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(2, 6, dtype=torch.float64, generator=generator) for _ in "rv")
    for lam in (0.0, 0.7, 1.0):
        advantages = train_rlhf.gae(rewards, values, lam)
        for row in range(2):
            v = [*values[row].tolist(), 0.0]
            r = rewards[row].tolist()
            for t in range(6):
                deltas = [r[k] + v[k + 1] - v[k] for k in range(t, 6)]
                expected = sum(lam**k * delta for k, delta in enumerate(deltas))
                assert advantages[row, t].item() == pytest.approx(expected)
    torch.testing.assert_close(advantages[:, 0], rewards.sum(1) - values[:, 0])


def test_token_rewards_by_hand():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    ratios = torch.tensor([[0.0, 0.2, -0.4, 0], [1, 0, 0, 1]])
    rewards = train_rlhf.token_rewards(torch.tensor([3.0, -1]), ratios, mask, 0.5)
    expected = torch.tensor([[0, -0.1, 3.2, 0], [-0.5, 0, 0, -1.5]])
    torch.testing.assert_close(rewards, expected)


# --- The reward model ---------------------------------------------------------------------------


def test_the_reward_models_loss_is_eq_2():
    """−log of Eq. 1's probability exp(a) / (exp(a) + exp(b)), and its gradient −(1 − p), 1 − p."""
    chosen = torch.tensor([0.3, -1, 4]).double().requires_grad_()
    rejected = torch.tensor([0.1, 2, 4]).double().requires_grad_()
    loss = reward_model.reward_model_loss(chosen, rejected)
    p = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in ((0.3, 0.1), (-1, 2), (4, 4))]
    assert loss.tolist() == pytest.approx([-math.log(x) for x in p])
    gradients = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert gradients[0].tolist() == pytest.approx([x - 1 for x in p])
    assert gradients[1].tolist() == pytest.approx([1 - x for x in p])


def tiny(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = gpt.GPTConfig(tokenizer.n_vocab, 64, n_layer=1, n_head=2, n_embd=16)
    return gpt.GPT(config).eval().requires_grad_(False)


def test_a_reward_does_not_depend_on_padding_or_on_the_prompts_head(tokenizer):
    model = reward_model.RewardModel(tiny(tokenizer))
    torch.nn.init.normal_(model.head.weight)
    question = village.split_questions()[0][0]
    examples = [
        data.encode(tokenizer, question, t) for t in list(village.responses(question))[::150]
    ]
    alone = [model(*data.collate([example])).item() for example in examples]
    assert model(*data.collate(examples)).tolist() == pytest.approx(alone, abs=1e-5)
    hidden = model.trunk.hidden(torch.tensor([examples[0][0]]))[0]
    scored = [h for h, score in zip(hidden, examples[0][1]) if score]
    expected = sum(model.head(h).item() for h in scored)
    assert alone[0] == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_learns_what_its_pairs_prefer(tokenizer):
    question = village.split_questions()[0][0]
    kind = [t for t, r in village.responses(question).items() if t.startswith(" Gladly!")]
    rude = [t for t, r in village.responses(question).items() if t.startswith(" Ugh.")]
    rng = random.Random(0)
    pairs = [(question, rng.choice(kind), rng.choice(rude)) for _ in range(400)]
    config = train_rlhf.Config(batch_size=20, reward_lr=1e-2)
    reward = reward_model.learned_reward(
        reward_model.train_reward_model(tiny(tokenizer), tokenizer, pairs, config), tokenizer
    )
    assert reward_model.accuracy(reward, pairs) > 0.95
    flipped = [(prompt, rejected, chosen) for prompt, chosen, rejected in pairs]
    assert reward_model.accuracy(reward, flipped) < 0.05
    assert reward([question], [None]).item() == -3


# --- Self-play ----------------------------------------------------------------------------------


def test_comparisons_by_hand_and_by_frequency():
    """Rewards 100 apart leave no doubt; of rewards one apart the better one wins σ(1) of times."""
    generator = torch.Generator().manual_seed(0)
    wins = train_selfplay.compare(torch.tensor([[0.0, 200, 100]]), generator)
    assert wins[0].tolist() == [[False] * 3, [True, False, True], [True, False, False]]
    wins = train_selfplay.compare(torch.tensor([[1.0, 0]] * 4000), generator)
    assert torch.equal(wins[:, 0, 1], ~wins[:, 1, 0]) and not wins.diagonal(dim1=1, dim2=2).any()
    p = 1 / (1 + math.exp(-1))
    error = math.sqrt(p * (1 - p) / 4000)
    assert abs(wins[:, 0, 1].float().mean().item() - p) < 4 * error


def test_labels_are_counted_one_for_each_comparison():
    config = train_selfplay.Config(rounds=3, questions=10, group=4)
    assert train_selfplay.count_labels(config) == 3 * 10 * 6
    assert train_selfplay.count_labels(dataclasses.replace(config, judge="model")) == 10 * 6
    assert train_selfplay.count_labels(dataclasses.replace(config, spin=True)) == 0


@pytest.mark.parametrize("spin", [False, True])
def test_the_second_rounds_reference_is_the_first_rounds_policy(tokenizer, monkeypatch, spin):
    """And the first round's is the SFT model: recorded where a round hands it to the loop."""
    reference, seen = tiny(tokenizer), []
    policy = copy.deepcopy(reference).requires_grad_(True)
    module, name = (train_dpo, "train") if spin else (train_selfplay, "train_sppo")
    original = getattr(module, name)

    def spy(policy, optimizer, *rest):
        examples, ref_logps = (rest[0].chosen, rest[0].ref_chosen_logps) if spin else rest[:2]
        live = [response_logps_no_grad(model, examples) for model in (reference, policy)]
        seen.append([torch.allclose(ref_logps, logps, atol=1e-4) for logps in live])
        return original(policy, optimizer, *rest)

    monkeypatch.setattr(module, name, spy)
    config = train_selfplay.Config(
        spin=spin, rounds=2, questions=8, group=3, batch_size=4, lr=0.05, spin_lr=0.5
    )
    questions = village.split_questions()[0]
    steps = list(train_selfplay.train_rounds((policy, reference, tokenizer), config, questions))
    assert [line["round"] for line in steps] == sorted(line["round"] for line in steps)
    assert seen == [[True, True], [False, True]]


def test_spin_demonstrations_are_kind_and_true(tokenizer):
    questions, rng = village.split_questions()[0][:60], random.Random(0)
    own = [([1], [True])] * len(questions)
    pairs = train_selfplay.spin_pairs(tiny(tokenizer), tokenizer, questions, own, rng)
    assert pairs.rejected == own
    for question, (ids, mask) in zip(questions, pairs.chosen):
        text = tokenizer.decode([i for i, scored in zip(ids, mask) if scored][:-1])
        assert village.reward(question, text) == max(village.responses(question).values())


def test_labelled_pairs_by_hand(tokenizer):
    """Two questions of three responses; one was cut off, two are equal: no pairs of those."""
    texts = [" a", " b", None, " c", " c", " d"]
    wins = torch.zeros(2, 3, 3, dtype=torch.bool)
    for p, i, j in ((0, 1, 0), (0, 0, 2), (0, 1, 2), (1, 0, 1), (1, 2, 0), (1, 1, 2)):
        wins[p, i, j] = True
    pairs = train_selfplay.labelled_pairs(["p"] * 3 + ["q"] * 3, texts, wins)
    assert pairs == [("p", " b", " a"), ("q", " c", " d"), ("q", " d", " c")]


@pytest.mark.parametrize("judge, times", [("village", 3), ("model", 1)])
def test_the_village_is_asked_in_every_round_or_only_in_the_first(toy_sft, judge, times):
    asked = []

    def reward(prompts, texts):
        asked.append(len(texts))
        return torch.arange(len(texts)).float() * 50

    reference, tokenizer = runs.load_checkpoint(toy_sft / "sft.pt")
    models = copy.deepcopy(reference), reference, tokenizer
    config = train_selfplay.Config(judge=judge, rounds=3, questions=4, group=3, batch_size=12)
    list(train_selfplay.train_rounds(models, config, village.split_questions()[0], reward))
    assert asked == [12] * times


# --- What the loop hands to the losses ----------------------------------------------------------

FOUR = "policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"
COMMON = {field.name for field in dataclasses.fields(train_dpo.Config)}


def own_numbers(name):
    return [flag for flag in train_variant.LOSSES[name][2] if flag not in COMMON | {"loss_beta"}]


@pytest.mark.parametrize("name", [name for name in train_variant.LOSSES if name != "kto"])
def test_a_loss_reads_every_flag_of_its_row_and_no_other(name):
    function, _, row = train_variant.LOSSES[name]
    parameters = [*inspect.signature(function).parameters]
    assert parameters[:5] == [*FOUR, "beta"]
    lengths = {"chosen_lengths", "rejected_lengths"}
    assert [p for p in parameters[5:] if p not in lengths] == own_numbers(name)
    assert {*own_numbers(name)} <= {*train_variant.HELP}, "a line of HELP is missing"
    logps = torch.tensor([[-3.0], [-5], [-4], [-4.5]])
    sizes = {p: torch.tensor([4]) for p in parameters if p in lengths}
    one, other = (
        function(*logps, beta, *[row[own] for own in own_numbers(name)], **sizes)
        for beta in (0.4, 0.5)
    )
    assert ("loss_beta" in row) == (one != other).item()


@pytest.mark.parametrize("name", [name for name in train_variant.LOSSES if name != "kto"])
def test_every_loss_gets_its_own_arguments_in_their_places(name):
    four = [torch.tensor([-3.0, -5]) - 1.3 * i for i in range(4)]
    examples = [[data.join_ids([7] * 6, [8] * n) for n in side] for side in ((3, 4), (5, 2))]
    lengths = {"chosen_lengths": torch.tensor([3, 4]), "rejected_lengths": torch.tensor([5, 2])}
    batch = train_dpo.Pairs(*examples, *four[2:])
    own = {flag: 0.1 * i for i, flag in enumerate(own_numbers(name), 2)}  # no two alike
    if "average" in own:
        own["average"] = True
    beta = {"loss_beta": 0.4} if name != "orpo" else {}
    found = train_variant.variant_losses(
        *four[:2], batch, train_variant.config_of(name)(**own, **beta)
    )
    function = train_variant.LOSSES[name][0]
    takes = inspect.signature(function).parameters
    by_length = {key: value for key, value in lengths.items() if key in takes}
    torch.testing.assert_close(found, function(*four, 0.4, *own.values(), **by_length))


@pytest.mark.parametrize("name", train_variant.LOSSES)
def test_every_loss_starts_as_it_must_and_falls_on_the_pairs_that_it_is_shown(tokenizer, name):
    """All of the table: eight pairs, ten times over. ORPO alone starts from another model."""
    reference = tiny(tokenizer)
    policy = copy.deepcopy(reference).requires_grad_(True)
    questions = village.split_questions()[0][:8]
    texts = [(q, *[*village.responses(q)][3 * i : 3 * i + 2]) for i, q in enumerate(questions)]
    config = train_variant.config_of(name)(epochs=10, batch_size=16, lr=1e-3)
    add_reference_logps, train, held_out_metrics, check_start = train_variant.steps_of(config)
    dataset = add_reference_logps(reference, tokenizer, texts)
    check_start(policy, dataset, config)
    before = held_out_metrics(policy, dataset, config)["held-out/loss"]
    optimizer, rates = torch.optim.AdamW(policy.parameters(), weight_decay=0), []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    metrics = list(train(policy, optimizer, dataset, config))
    assert rates == [line["lr"] for line in metrics] == data.learning_rates(1e-3, 10)
    assert all(line["grad_norm"] > 0 for line in metrics)
    after = held_out_metrics(policy, dataset, config)["held-out/loss"]
    assert len(metrics) == 10 and metrics[0]["loss"] == pytest.approx(before, abs=1e-3)
    assert after < before - 1e-3
    if name != "kto":  # and it is this loss that was trained with
        ref_logps = dataset.ref_chosen_logps, dataset.ref_rejected_logps
        own = train_variant.variant_losses(*ref_logps, dataset, config).mean().item()
        assert metrics[0]["loss"] == pytest.approx(own, abs=1e-3)


def test_a_variants_metrics_are_in_units_of_the_evaluations_beta():
    """s = 2.6, 2.6, 0 of the chosen, 1.3, 3.9, 0 of the rejected; β = 0.5, the loss's is 0.4. A
    margin of 0 is not right."""
    policy = torch.tensor([-3.0, -5, -4]), torch.tensor([-4.0, -6, -5])
    ref = torch.tensor([-5.6, -7.6, -4]), torch.tensor([-5.3, -9.9, -5])
    batch = train_dpo.Pairs([], [], *ref)
    config = train_variant.config_of("ipo")(loss_beta=0.4)
    metrics = train_dpo.pair_metrics(*policy, batch, config)
    expected = {
        "rewards/chosen": [1.3, 1.3, 0],
        "rewards/rejected": [0.65, 1.95, 0],
        "rewards/margins": [0.65, -0.65, 0],
        "rewards/accuracies": [1, 0, 0],
        "logps/chosen": [-3, -5, -4],
        "logps/rejected": [-4, -6, -5],
    }
    for name, values in expected.items():
        assert metrics[name].tolist() == pytest.approx(values, abs=1e-6)


def test_kto_gets_z_from_the_mismatched_half():
    batch = kto.Thumbs(
        [], [], torch.tensor([True, False]), torch.tensor([-3.5, -3.8]), torch.tensor([-7.0, -7.4])
    )
    config = train_variant.config_of("kto")(loss_beta=0.4)
    policy_logps, policy_mismatched_logps = torch.tensor([-3.0, -4]), torch.tensor([-6.0, -7])
    found, metrics = kto.losses_and_metrics(policy_logps, policy_mismatched_logps, batch, config)
    z = (1.0 + 0.4) / 2
    assert metrics["kto/z_ref"].item() == pytest.approx(z)
    up, down = 0.4 * (0.5 - z), 0.4 * (z + 0.2)
    expected = [1 - 1 / (1 + math.exp(-up)), 1 - 1 / (1 + math.exp(-down))]
    assert found.tolist() == pytest.approx(expected)


def test_kto_resumed_takes_the_rest_of_its_steps(world):
    """At a rate of 0 the policy stays, so the batches alone tell one step from another."""
    (reference, _), config = world, train_variant.config_of("kto")(lr=0.0, batch_size=4)
    letters = [(p, text, text in "ace") for p in PROMPTS for text in TEXTS[1:]]
    thumbs = kto.add_reference_logps(reference, Letters(), letters)

    def steps(start):
        policy = copy.deepcopy(reference).requires_grad_(True)
        optimizer = torch.optim.SGD(policy.parameters(), 0.0)
        return list(kto.train_kto(policy, optimizer, thumbs, config, start))

    whole = steps(0)
    assert len(whole) == 3 and len({step["grad_norm"] for step in whole}) == 3
    assert steps(1) == whole[1:]


# --- Thumbs -------------------------------------------------------------------------------------


def test_mismatched_examples_by_hand():
    examples = [([1, 2, 3], [False, False, True]), ([4, 5, 6], [False, True, True])]
    assert kto.mismatch(examples) == [
        ([1, 2, 5, 6], [False, False, True, True]),
        ([4, 3], [False, True]),
    ]
    # A neighbour of the same prompt is passed over.
    same = [([1, 7], [False, True]), ([1, 8], [False, True]), ([2, 9], [False, True])]
    assert [ids for ids, _ in kto.mismatch(same)] == [[1, 9], [1, 9], [2, 7]]
    with pytest.raises(SystemExit, match="KTO needs two different prompts"):
        kto.mismatch(same[:2])


def test_mismatched_examples_by_a_slow_search():
    """The next response to another prompt, also where one prompt fills many rows."""
    rng = random.Random(0)
    for size in (2, 3, 10, 60):
        prompts = [0, 1, *(rng.randrange(2) for _ in range(size - 2)), size % 3 > 0]
        size += 1
        examples = [([prompt, i], [False, True]) for i, prompt in enumerate(prompts, 10)]
        expected = []
        for i, prompt in enumerate(prompts):
            others = [j % size for j in range(i + 1, i + size) if prompts[j % size] != prompt]
            expected.append([prompt, 10 + others[0]])
        assert [ids for ids, _ in kto.mismatch(examples)] == expected


def test_a_pair_is_a_thumb_up_and_a_thumb_down(tokenizer):
    reference, (question, other) = tiny(tokenizer), village.split_questions()[0][:2]
    pairs = [(question, " Gladly!", " Ugh."), (other, " Of course!", " Not again.")]
    thumbs = [(question, " Gladly!", True), (other, " Of course!", True)]
    thumbs += [(question, " Ugh.", False), (other, " Not again.", False)]
    for rows in (pairs, thumbs):
        found = kto.add_reference_logps(reference, tokenizer, rows)
        assert found.examples == [
            data.encode(tokenizer, prompt, text) for prompt, text, _ in thumbs
        ]
        assert found.mismatched[0] == data.encode(tokenizer, question, " Of course!")
        assert found.mismatched[3] == data.encode(tokenizer, other, " Gladly!")
        assert found.liked.tolist() == [True, True, False, False]


# --- The experiments ----------------------------------------------------------------------------


def test_best_of_n_equals_enumeration_of_draws():
    """Three responses, two of them worth −3, the last garbled; best of two, ties by a coin."""
    p, rewards = [0.3, 0.5, 0.2], [-3.0, 1, -3]
    exact = torch.tensor([p], dtype=torch.float64).log(), torch.tensor([rewards]).double()
    rows = compare.best_of_n(exact, 2, beta=0.5)
    best = [0.0] * 3
    for i in range(3):
        for j in range(3):
            winners = [k for k in (i, j) if rewards[k] == max(rewards[i], rewards[j])]
            for k in winners:
                best[k] += p[i] * p[j] / len(winners)
    reward, kl, win, garbled = (column.item() for column in rows["policy"])
    assert reward == pytest.approx(sum(b * r for b, r in zip(best, rewards)))
    assert kl == pytest.approx(sum(b * math.log(b / q) for b, q in zip(best, p)))
    beats = 1 / (1 + math.exp(-4))
    assert win == pytest.approx(
        best[1] * (0.5 * 0.5 + 0.5 * beats) + (1 - best[1]) * (0.5 * 0.5 + 0.5 * (1 - beats))
    )
    assert garbled == pytest.approx(best[2])


def test_the_frontier_is_touched_by_the_optimum_and_a_policy_beyond_it_is_caught():
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(40, 6, dtype=torch.float64, generator=generator).log_softmax(1)
    rewards = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    best, _ = dpo.optimal_logps(logps, rewards, 0.5)
    kl, reward = (best.exp() * (best - logps)).sum(1), (best.exp() * rewards).sum(1)
    betas = [0.2, 0.5, 1.0]
    (_, point, _) = frontier.frontier((logps, rewards), betas)
    assert point == pytest.approx((kl.mean().item(), reward.mean().item()))
    bounds = frontier.bounds((logps, rewards), betas)
    assert frontier.excess(reward - 1e-9, kl, bounds) <= 0
    assert frontier.excess(reward + 0.1, kl, bounds) > 4


def test_flipped_labels_exchange_the_responses_of_their_share():
    texts = [("q", f"w{i}", f"l{i}") for i in range(400)]
    found = compare.flip(texts, 0.25, seed=0)
    flipped = [chosen.startswith("l") for _, chosen, _ in found]
    assert 70 < sum(flipped) < 130 and compare.flip(texts, 0.0, seed=0) == texts
    for (_, chosen, rejected), before, flip in zip(found, texts, flipped):
        assert (chosen, rejected) == (before[2:0:-1] if flip else before[1:])


# --- Online DPO and AI feedback -----------------------------------------------------------------


def worth_judge(prompts, firsts, seconds):
    """Eq. 1 of WORTH; texts that were cut off never reach a judge."""
    assert None not in firsts + seconds
    return torch.sigmoid(worth(prompts, firsts) - worth(prompts, seconds))


@pytest.fixture(scope="module")
def one_letter():
    """A reference that has learnt to answer with one letter, of the world above."""
    torch.manual_seed(2)
    model = gpt.GPT(gpt.GPTConfig(6, 8, n_layer=1, n_head=2, n_embd=32)).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    letters = Letters()
    liked = {"a": "aaaabcde", "b": "abcdeeee"}  # so that it tells the prompts apart
    examples = [data.encode(letters, prompt, text) for prompt in PROMPTS for text in liked[prompt]]
    for _ in range(60):
        (-response_logps(model, examples).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def test_online_dpo_arrives_at_the_optimum(one_letter):
    """Of the texts that are whole; others make no pair."""
    reference, rewards = one_letter, torch.tensor([WORTH[p][1:] for p in PROMPTS]).double()
    best = dpo.optimal_logps(enumerate_logps(reference)[:, 1:6], rewards, beta=1.0)[0].exp()

    def distances(model):  # of the five texts' proportions from the optimum's, in total variation
        p = enumerate_logps(model).exp()[:, 1:6]
        return (p / p.sum(1, keepdim=True) - best).abs().sum(1) / 2

    policy = copy.deepcopy(reference).requires_grad_(True)
    sizes = {"num_pairs": 16384, "rounds": 8, "batch_size": 128, "max_new_tokens": 2}
    config = train_online.Config(beta=1.0, lr=0.01, **sizes)
    optimizer = torch.optim.SGD(policy.parameters(), config.lr, momentum=0.9)
    models = policy, reference, Letters()
    steps = [*train_online.train_rounds(models, optimizer, config, PROMPTS, worth_judge)]
    assert [step["round"] for step in steps] == sorted([*range(1, 9)] * 16)
    # The labels are noisy: over four seeds it ended at 0.02 to 0.09.
    assert distances(policy).sum() < 0.15 < 0.4 < distances(reference).sum()


def test_each_rounds_pairs_are_the_policys_own_and_the_reference_stays(one_letter, monkeypatch):
    reference = one_letter
    policy = copy.deepcopy(reference).requires_grad_(True)
    config = train_online.Config(num_pairs=96, rounds=3, lr=0.1, batch_size=16, max_new_tokens=2)
    optimizer = torch.optim.SGD(policy.parameters(), config.lr, momentum=0.9)
    wrote, read, rates = [], [], []

    def sample_pairs(model, *others):
        assert model is policy
        wrote.append(weights_of(model))
        return runs_sample_pairs(model, *others)

    def add_reference_logps(model, *others):
        assert model is reference
        read.append(weights_of(model))
        return train_dpo.add_reference_logps(model, *others)

    runs_sample_pairs = train_online.sample_pairs
    monkeypatch.setattr(train_online, "sample_pairs", sample_pairs)
    monkeypatch.setattr(train_online, "add_reference_logps", add_reference_logps)
    models = policy, reference, Letters()
    for step in train_online.train_rounds(models, optimizer, config, PROMPTS, worth_judge):
        rates.append(step["lr"])
    assert len({*wrote}) == 3 and len({*read}) == 1
    assert rates == data.learning_rates(0.1, 6)  # one schedule over all rounds


def test_a_long_gradient_is_cut_to_the_norm_asked_for(one_letter):
    """SGD's first step has no momentum yet: it is the rate times the gradient."""
    policy = copy.deepcopy(one_letter).requires_grad_(True)
    sizes = {"num_pairs": 64, "rounds": 1, "max_new_tokens": 2}
    config = train_online.Config(lr=0.1, max_grad_norm=0.01, **sizes)
    optimizer = torch.optim.SGD(policy.parameters(), config.lr, momentum=0.9)
    models = policy, one_letter, Letters()
    (step,) = train_online.train_rounds(models, optimizer, config, PROMPTS, worth_judge)
    assert step["grad_norm"] > 0.01  # what is logged is the norm before
    before = dict(one_letter.named_parameters())
    moved = [(w - before[name]).square().sum().item() for name, w in policy.named_parameters()]
    assert math.sqrt(sum(moved)) == pytest.approx(0.1 * 0.01, rel=1e-3)


def weights_of(model):
    return sum(weights.double().sum().item() for weights in model.state_dict().values())


@pytest.mark.parametrize(
    "text, parts",
    [
        (" Gladly! Ada is a smith. Have fun!", ("Gladly!", "Ada is a smith.", "Have fun!")),
        (" Ada is a smith.", ("", "Ada is a smith.", "")),
        (" Well, Ada is a smith. I think.", ("Well,", "Ada is a smith.", "I think.")),
        (" Ugh. Ugh. Ada", ("Ugh.", "Ugh. Ada", "")),
        (" Gladly!", ("Gladly!", "", "")),
    ],
)
def test_the_parts_of_a_response(text, parts):
    assert train_online.parts_of(text) == parts


def test_the_constitution_by_hand(tokenizer):
    """Manners by their points, truth by a slow sum over tokens, in a random model's eyes."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, 64, n_layer=1, n_head=2, n_embd=16)).eval()
    smith, baker = "Ada is a smith.", "Ada is a baker."

    def likelihood(sentence):
        ids, total = [tokenizer.eot_token, *tokenizer.encode_ordinary(" " + sentence)], 0.0
        for k in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:k]]))[0, -1]
            total += logits.log_softmax(0)[ids[k]].item()
        return total

    truer = 2 if likelihood(smith) > likelihood(baker) else -2
    cases = [
        (f" Gladly! {smith} Take care!", f" Ugh. {smith} Go away.", 4),
        (f" Gladly! {smith}", f" {smith} Who cares?", 2),
        (f" {smith}", f" {baker}", truer),
        (f" Hmm, {baker} Have fun!", f" Of course! {smith} Stop asking.", -truer + 1),
    ]
    _, firsts, seconds = zip(*((None, a, b) for a, b, _ in cases))
    p = train_online.constitution(model, tokenizer)([""] * 4, firsts, seconds)
    assert p.tolist() == pytest.approx([1 / (1 + math.exp(-s)) for *_, s in cases])


def test_what_a_judge_knows():
    """One that reads the village's truth knows all; one that prefers long answers does not."""
    assert train_online.knowledge(train_online.true_preference) == 1
    facts = {fact: question for question, fact in village.QUESTIONS.items()}
    longest = []
    for question in facts.values():
        truth = next(a for a, side in village.answers(question).items() if side == 1)
        others = [len(a) for a in village.answers(question) if a != truth]
        longest.append(len(truth) > max(others))

    def long(prompts, firsts, seconds):
        return torch.tensor([len(a) > len(b) for a, b in zip(firsts, seconds)]).float()

    assert train_online.knowledge(long) == pytest.approx(sum(longest) / len(facts))


def test_ai_feedback_reaches_facts_that_nobody_asked_but_no_question_of_the_evaluation():
    train, held_out, never = village.split_questions()
    assert train_online.questions_of("village") == train
    questions = train_online.questions_of("pretrained")
    assert not {*questions} & {*held_out, *never}
    assert {village.QUESTIONS[q] for q in questions} == {*village.QUESTIONS.values()}
