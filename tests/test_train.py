"""The pipeline: labels, training, measurement, and the command lines at toy size."""

import copy
import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOY_SFT, command, needs_unix, refusal, run_main

import data
import dpo
import evaluate
import model as gpt
import train_dpo
import train_sft

TOY_DPO = ["--num-pairs=48", "--batch-size=8", "--eval-questions=2", "--eval-samples=3"]


# --- A reference that is known exactly ----------------------------------------------------------


class KnownReference:
    """A stand-in for a model: it gives each response of the grammar the probability 0.9 x (a share
    that grows with its place in the list), and says " Good!" one time in ten."""

    config = SimpleNamespace(vocab_size=708, block_size=64, n_layer=1, n_embd=1)
    wte = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, tokenizer, questions, power=1):
        self.end, self.replies, self.weights = tokenizer.eot_token, {}, {}
        self.next = defaultdict(lambda: torch.full((tokenizer.n_vocab,), 1e-30).double())
        for question in questions:
            texts = [*data.responses(question), " Good!"]
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
    train, held_out, _ = data.split_questions()
    return KnownReference(tokenizer, [train[0], held_out[0]])


def test_brute_force_agrees_with_the_known_reference_and_with_sampling(known, tokenizer):
    beta, question = 2.0, data.split_questions()[1][0]
    logps, rewards = evaluate.exact_distribution(known, tokenizer, [question])
    (weights,) = (
        w for p, w in known.weights.items() if p == tuple(tokenizer.encode_ordinary(question))
    )
    assert logps[0].exp().tolist() == pytest.approx(weights.tolist(), rel=1e-4, abs=1e-8)
    assert rewards[0, -1] == -3 and rewards[0, :-1].tolist() == [*data.responses(question).values()]
    # Z(x) = E_ref[exp(r/β)]: with β = 2 no single response dominates, and sampling works too.
    config = SimpleNamespace(seed=0, max_new_tokens=24)
    _, texts = evaluate.sample_responses(known, tokenizer, [question] * 4000, config, "")
    terms = torch.tensor(
        [math.exp(evaluate.true_rewards([question], [t]).item() / beta) for t in texts]
    )
    _, log_z = dpo.optimal_logps(logps, rewards, beta)
    error = terms.std() / math.sqrt(len(terms))
    assert abs(terms.mean() - log_z.exp()) < 4 * error and error < 0.02 * terms.mean()


def test_measure_gives_a_policy_that_is_the_reference_its_exact_reward_and_no_kl(known, tokenizer):
    question = data.split_questions()[1][0]
    config = SimpleNamespace(seed=1, max_new_tokens=24, eval_samples=4000, beta=0.5)
    exact = evaluate.exact_distribution(known, tokenizer, [question])
    rows, bracket = evaluate.measure(known, known, tokenizer, [question], exact, config)
    weights = known.weights[tuple(tokenizer.encode_ordinary(question))]
    rewards = torch.tensor([*data.responses(question).values(), -3.0], dtype=torch.float64)
    exact = (weights * rewards).sum()
    assert rows["reference"][0].item() == pytest.approx(exact.item(), abs=1e-5)
    assert rows["policy"][1].item() == rows["reference"][1].item() == 0
    spread = (weights * (rewards - exact) ** 2).sum().sqrt() / math.sqrt(4000)
    assert abs(rows["policy"][0] - exact) < 4 * spread
    best = weights * (rewards / 0.5).exp()
    assert rows["optimum"][0].item() == pytest.approx(
        (best / best.sum() * rewards).sum().item(), abs=1e-5
    )
    assert 0 < bracket < 1e-3


def test_measure_knows_another_policys_reward_and_kl(known, tokenizer):
    """Another policy than the reference: KL = Σ p log p/q, E[r] = Σ p r, and J* = β log Z."""
    question = data.split_questions()[1][0]
    policy = KnownReference(tokenizer, [question], power=3)
    config = SimpleNamespace(seed=1, max_new_tokens=24, eval_samples=4000, beta=0.5)
    exact = evaluate.exact_distribution(known, tokenizer, [question])
    rows, _ = evaluate.measure(policy, known, tokenizer, [question], exact, config)
    prompt = tuple(tokenizer.encode_ordinary(question))
    p, q = policy.weights[prompt], known.weights[prompt]
    rewards = torch.tensor([*data.responses(question).values(), -3.0], dtype=torch.float64)
    for found, values in zip(rows["policy"], (rewards, (p / q).log())):
        mean = (p * values).sum()
        spread = (p * (values - mean) ** 2).sum().sqrt() / math.sqrt(4000)
        assert abs(found - mean) < 4 * spread and spread < 0.03
    assert rows["policy"][1] > 0.1
    reward, kl, *_ = rows["optimum"]
    log_z = (q * (rewards / 0.5).exp()).sum().log()
    assert (reward - 0.5 * kl).item() == pytest.approx(0.5 * log_z.item(), abs=1e-5)


def test_labels_follow_bradley_terry(known, tokenizer):
    """Of pairs whose rewards differ by d, the better one is chosen a share σ(d) of the time."""
    question = data.split_questions()[0][0]
    config = SimpleNamespace(seed=0, max_new_tokens=24, num_pairs=6000)
    wins = defaultdict(list)
    for prompt, chosen, rejected in train_dpo.sample_pairs(known, tokenizer, config, [question]):
        gap = data.reward(prompt, chosen) - data.reward(prompt, rejected)
        wins[abs(gap)].append(gap > 0)
    for gap in (1, 2, 3):
        p, n = 1 / (1 + math.exp(-gap)), len(wins[gap])
        assert n > 300 and abs(sum(wins[gap]) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_noise_limits_by_hand():
    """One pair with equal rewards (a coin: ln 2, ½), one two apart (p = σ(2) = 0.88080)."""
    prompt, truth = "What does Mara do for work?", f" Mara is a {data.TRUTH['Mara', 'job']}."
    good, same, bad = f" Gladly!{truth}", f"{truth} Have fun!", f" Ugh.{truth}"
    limits = train_dpo.noise_limits([(prompt, good, same), (prompt, bad, good)])
    p = 0.8807970780
    assert limits["best_accuracy"] == pytest.approx((0.5 + p) / 2)
    entropy = (math.log(2) - p * math.log(p) - (1 - p) * math.log(1 - p)) / 2
    assert limits["best_loss"] == pytest.approx(entropy)


def test_pairs_are_written_as_they_are_read(tokenizer, tmp_path):
    pairs = [("Which pet?", " Good!", " Bad “é”\n."), ("Whose?", " Yes.", " No.")]
    train_dpo.write_pairs(f"{tmp_path}/pairs.jsonl", pairs)
    fields = ("prompt", "chosen", "rejected")
    assert data.read_jsonl(f"{tmp_path}/pairs.jsonl", fields, tokenizer, 64) == pairs
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


# --- Training -----------------------------------------------------------------------------------


@pytest.fixture
def setup(tokenizer):
    torch.manual_seed(0)
    reference = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, 64, n_layer=2, n_head=2, n_embd=16)).eval()
    reference.requires_grad_(False)
    train, *_ = data.split_questions()
    pairs = [(q, *[*data.responses(q)][3 * i : 3 * i + 2]) for i, q in enumerate(train[:20])]
    config = train_dpo.Config(lr=0.01, beta=0.5, batch_size=8, epochs=2)
    return reference, train_dpo.prepare_pairs(reference, tokenizer, pairs), config


def test_the_reference_has_no_gradient_and_does_not_move_by_a_bit(setup, tokenizer):
    reference, pairs, config = setup
    before = copy.deepcopy(reference.state_dict())
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = train_dpo.make_optimizer(policy, config)
    metrics = list(train_dpo.train(policy, optimizer, pairs, config, tokenizer.eot_token))
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert any(not torch.equal(v, before[name]) for name, v in policy.state_dict().items())


def test_logged_rewards_are_against_the_frozen_reference(setup, tokenizer):
    """After some steps, every metric recomputed from scratch, the reference run live."""
    reference, pairs, config = setup
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = train_dpo.make_optimizer(policy, config)
    states, metrics = [], []
    for line in train_dpo.train(policy, optimizer, pairs, config, tokenizer.eot_token):
        metrics.append(line)
        states.append(copy.deepcopy(policy))
    rows = list(data.batches(20, 8, 5, config.seed))[3]
    ids, mask = data.collate([side[i] for side in pairs[0] for i in rows], 0)
    logps = dpo.sequence_logps(states[2](ids), ids, mask)
    gain = 0.5 * (logps - dpo.sequence_logps(reference(ids), ids, mask))
    margins = gain[:8] - gain[8:]
    assert metrics[3]["rewards/chosen"] == pytest.approx(gain[:8].mean().item(), abs=1e-5)
    assert metrics[3]["rewards/rejected"] == pytest.approx(gain[8:].mean().item(), abs=1e-5)
    assert metrics[3]["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-5)
    # The sign of a margin is known where rounding, 1e-5 here, cannot turn it.
    right, wrong = ((sign * margins > 1e-5).float().mean().item() for sign in (1, -1))
    assert right - 1e-6 <= metrics[3]["rewards/accuracies"] <= 1 - wrong + 1e-6
    assert right + wrong > 0.8
    assert metrics[3]["logps/chosen"] == pytest.approx(logps[:8].mean().item(), abs=1e-4)
    assert metrics[3]["loss"] == pytest.approx((1 + (-margins).exp()).log().mean().item(), abs=1e-5)
    assert margins.mean() > 0.01


def test_supervised_loss_is_minus_the_response_logp(setup):
    """Fine-tuning scores the response only, each token under the one before it."""
    reference, ((chosen, _), _), _ = setup
    ids, mask = data.collate(chosen, 0)
    losses = train_sft.token_losses(reference, ids, mask)
    assert len(losses) == mask.sum()
    expected = -dpo.sequence_logps(reference(ids), ids, mask).sum()
    torch.testing.assert_close(losses.sum(), expected)


def test_schedule_by_hand():
    """40 steps: two of warm-up (⅓, ⅔), the top at 2, half-way down at 21, and on to 0."""
    assert [train_sft.schedule(step, 40) for step in (0, 1, 2, 21)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5]
    )
    assert 0 < train_sft.schedule(39, 40) < 0.01


def test_a_policy_that_is_not_the_reference_is_found_at_step_0(capsys):
    config = train_dpo.Config(beta=0.5)
    train_dpo.check_first_loss(math.log(2), train_dpo.LN2, config)
    assert "0.6931 (ln 2)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not ln 2"):
        train_dpo.check_first_loss(0.6951, train_dpo.LN2, config)


def test_precomputed_reference_logps_equal_live_ones(setup):
    reference, ((chosen, rejected), (ref_chosen, ref_rejected)), _ = setup
    for examples, logps in ((chosen, ref_chosen), (rejected, ref_rejected)):
        for example, logp in zip(examples, logps):
            ids, mask = data.collate([example], 0)
            live = dpo.sequence_logps(reference(ids), ids, mask)
            assert live.item() == pytest.approx(logp.item(), abs=1e-5, rel=1e-6)


def test_parts_of_like_length_change_neither_log_probabilities_nor_gradients(setup, tokenizer):
    """Against one example at a time, with logits everywhere; in 64 bits, so that all is seen."""
    model = copy.deepcopy(setup[0]).requires_grad_(True).double()
    rng = random.Random(0)
    texts = [(q, rng.choice([*data.responses(q)])) for q in rng.choices([*data.QUESTIONS], k=79)]
    examples = [data.encode(tokenizer, *text) for text in texts]
    examples.append(data.join_ids([], [5, 6, 7]))  # no prompt: its first token has no probability
    chances = torch.randn(80, generator=torch.Generator().manual_seed(0)).double()
    rows = (data.collate([example], 0) for example in examples)
    alone = torch.cat([dpo.sequence_logps(model(ids), ids, mask) for ids, mask in rows])
    parts = evaluate.response_logps(model, examples, 0)
    assert len({len(ids) for ids, _ in examples}) > 5
    gradients = (torch.autograd.grad(x @ chances, [*model.parameters()]) for x in (alone, parts))
    torch.testing.assert_close(parts, alone)
    for mine, expected in zip(*gradients):
        torch.testing.assert_close(mine, expected)


def test_logits_stay_below_a_quarter_of_a_gigabyte(setup):
    """However large the vocabulary, 2^26 floats at once, but for a row that alone has more."""
    model, ((examples, _), _), _ = setup
    model = copy.deepcopy(model)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    longest = max(len(ids) for ids, _ in examples)
    for vocab_size, rows in ((2**26 // longest // 7, 7), (2**26, 1)):
        seen.clear()
        model.config.vocab_size = vocab_size
        evaluate.known_logps(model, examples, 0)
        assert max(shape[0] for shape in seen) == rows and sum(shape[0] for shape in seen) == 20


def test_no_example_of_many_is_lost_between_chunks(setup):
    """One token after one token, five thousand times: a table look-up gives what is due."""
    model, count = setup[0], 5000
    x, y = (
        torch.randint(708, (count,), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    examples = [data.join_ids([a], [b]) for a, b in zip(x.tolist(), y.tolist())]
    table = model(torch.arange(708)[:, None])[:, 0].log_softmax(dim=1)  # (V, V)
    torch.testing.assert_close(evaluate.known_logps(model, examples, 0), table[x, y])


def test_the_caches_of_a_large_model_stay_below_a_gigabyte(tokenizer):
    """2^28 floats: with k and v of 2^26 a response, four at a time."""
    asked = []

    def generate(prompts, end, limit, generator):
        asked.append(len(prompts))
        return [[end]] * len(prompts)

    size = SimpleNamespace(n_layer=2**5, n_embd=2**10, block_size=2**10)
    model = SimpleNamespace(config=size, wte=KnownReference.wte, generate=generate)
    config = SimpleNamespace(seed=0, max_new_tokens=24)
    _, texts = evaluate.sample_responses(model, tokenizer, ["Who?"] * 10, config, "")
    assert asked == [4, 4, 2] and texts == [""] * 10


def test_accumulated_gradients_are_the_whole_batchs(setup, tokenizer):
    reference, pairs, config = setup
    runs = []
    for grad_accum in (1, 4):
        policy = copy.deepcopy(reference).requires_grad_(True)
        accumulating = dataclasses.replace(config, grad_accum=grad_accum)
        optimizer = train_dpo.make_optimizer(policy, config)
        runs.append([*train_dpo.train(policy, optimizer, pairs, accumulating, tokenizer.eot_token)])
    assert runs[0][-1]["rewards/margins"] > 0.01
    for whole, parts in zip(*runs):
        # Parts round otherwise than the whole, and the sign of a margin near 0 with them: all of
        # them at step 0, where policy and reference are one.
        one, other = whole.pop("rewards/accuracies"), parts.pop("rewards/accuracies")
        assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert one == pytest.approx(other, abs=1 / config.batch_size)
    with pytest.raises(SystemExit, match="--grad-accum 3 does not divide a step's 8"):
        train_dpo.count_steps(dataclasses.replace(config, grad_accum=3), 20)


def test_a_loss_is_handed_the_lengths_of_the_responses(setup):
    """In tokens, prompts not counted, the chosen ones first; two passes of every second pair."""
    model, seen = copy.deepcopy(setup[0]).requires_grad_(True), []
    chosen = [data.join_ids([5] * 3, [6] * length) for length in (2, 9, 4, 1)]
    rejected = [data.join_ids([5] * 8, [7] * length) for length in (3, 5, 8, 6)]

    def loss_fn(policy_logps, lengths, beta):
        seen.append(lengths.tolist())
        return -policy_logps, {}

    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    train_dpo.train_step(model, optimizer, (chosen, rejected), (), 0, 0.5, loss_fn, grad_accum=2)
    assert seen == [[2, 4, 3, 8], [9, 1, 5, 6]]


def test_a_gradient_that_is_not_finite_takes_no_step():
    """√w at 0: the loss is fine, its gradient is not."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    loss = model.weight.sqrt().sum()
    loss.backward()
    with pytest.raises(FloatingPointError, match="loss 0.0, norm of its gradient inf"):
        train_dpo.take_step(loss, model, torch.optim.SGD(model.parameters(), 0.1))
    assert model.weight.item() == 0


def test_one_step_raises_the_margin_of_its_pairs(setup):
    reference, ((chosen, rejected), (ref_chosen, ref_rejected)), config = setup
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.SGD(policy.parameters(), config.lr)
    batch = (chosen, rejected), (ref_chosen, ref_rejected), 0, config.beta
    first = train_dpo.train_step(policy, optimizer, *batch)
    second = train_dpo.train_step(policy, optimizer, *batch)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert second["rewards/margins"] > 0.001 and second["loss"] < first["loss"]


# --- The command lines --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    out = tmp_path_factory.mktemp("village")
    sft = command("train_sft.py", "--out", str(out), *TOY_SFT)
    return out, sft, command("train_dpo.py", "--out", str(out), *TOY_DPO)


def test_the_pipeline_on_the_village(village):
    out, sft, run = village
    assert {"pretrained.pt", "sft.pt", "pairs.jsonl", "dpo.pt", "dpo.jsonl", "dpo.json"} == {
        path.name for path in out.iterdir()
    }
    assert "held out" in sft.stdout and "never asked" in sft.stdout
    assert "loss at step 0: 0.6931 (ln 2)" in run.stdout and "optimum, Eq. 4" in run.stdout
    assert not run.stderr  # bars are quiet when the output is no terminal
    report = json.loads((out / "dpo.json").read_text())
    for part in (report, report["never_asked"]):
        for row in ("reference", "policy", "optimum"):
            for name in ("reward", "kl", "objective", "optimality"):
                assert math.isfinite(part[row][name]) and part[row][f"{name}_se"] >= 0
    assert report["policy"]["kl"] != 0
    sft, dpo_policy = (gpt.load(out / name)[0].wte.weight for name in ("sft.pt", "dpo.pt"))
    assert not torch.equal(sft, dpo_policy)
    reference, _ = train_dpo.load_checkpoint(train_dpo.Config(out=str(out)), "cpu")
    assert not any(p.requires_grad for p in reference.parameters())
    assert report["seed"] == report["config"]["seed"] == 0 and report["seconds"]["training"] > 0
    lines = [json.loads(line) for line in (out / "dpo.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    assert "fresh/garbled" in lines[-1] and "fresh/kl" in lines[-1] and "lr" in lines[0]


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(village, tmp_path):
    out, *_ = village
    for seed, same in (("0", True), ("1", False)):
        flags = ["--init", str(out / "sft.pt"), "--out", str(tmp_path), "--seed", seed, *TOY_DPO]
        command("train_dpo.py", *flags)
        again = (tmp_path / "dpo.jsonl").read_bytes() == (out / "dpo.jsonl").read_bytes()
        assert again == same


def test_the_pipeline_on_somebodys_own_text_and_pairs(tmp_path):
    words = "the cat sat on a mat and the dog ran to an old red barn with two hens".split()
    (tmp_path / "my.txt").write_text(" ".join(words * 40))
    (tmp_path / "my.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"the {w}?", "response": " a cat"}) for w in words)
    )
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"the {w}?", "chosen": " a cat", "rejected": " a dog ran"})
            for w in words
        )
    )
    corpus, sft, pairs, out = (
        str(tmp_path / n) for n in ("my.txt", "my.jsonl", "pairs.jsonl", "out")
    )
    command(
        "train_sft.py", "--corpus", corpus, "--sft", sft, "--out", out, "--vocab-size=270", *TOY_SFT
    )
    other = ["--dtype=bfloat16", "--optimizer=adamw", "--lr=1e-4"]
    run = command("train_dpo.py", "--pairs", pairs, "--out", out, *TOY_DPO, *other)
    assert (
        "Before and after" in run.stdout
        and "held-out/accuracy" in run.stdout
        and "E[reward]" not in run.stdout
    )
    report = json.loads((tmp_path / "out" / "dpo.json").read_text())
    assert {"held-out/loss", "held-out/accuracy", "fresh/kl", "fresh/cut-off"} <= {*report}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--beat=1"], "unrecognized arguments: --beat=1"),
        (["--be=1"], "unrecognized arguments"),
        (["--beta=x"], "invalid float value: 'x'"),
        (["--beta=0"], "--beta must be positive, not 0.0"),
        (["--beta=-1"], "--beta must be positive"),
        (["--beta=nan"], "--beta must be positive, not nan"),
        (["--lr=inf"], "--lr must be positive"),
        (["--batch-size=0"], "--batch-size must be positive, not 0"),
        (["--seed=100000000000000000000"], "--seed must be positive and below"),
        (["--momentum=1"], "--momentum must be positive and below 1, not 1.0"),
        (["--epochs=0"], "--epochs must be positive"),
        (["--optimizer=adam"], "--optimizer must be sgd or adamw, not adam"),
        (["--dtype=int8"], "--dtype must be float32 or bfloat16, not int8"),
        (["--device=tpu9"], "--device tpu9 is not available here"),
        (["--out=README.md/x"], "cannot write to --out README.md/x"),
        (["--init=nowhere.pt"], "there is no nowhere.pt: run `python train_sft.py` first"),
        (["--init=README.md"], "README.md is not a whole checkpoint"),
    ],
)
def test_a_mistake_ends_the_run_in_one_line(monkeypatch, tmp_path, flags, message):
    flags = [f"--out={tmp_path}", *flags]
    assert message in refusal(run_main, monkeypatch, train_dpo, *flags)


def test_own_text_without_own_answers_is_refused(monkeypatch, tmp_path):
    flags = ["--corpus=my.txt", f"--out={tmp_path}"]
    assert "go together" in refusal(run_main, monkeypatch, train_sft, *flags)


def test_a_bad_pairs_file_stops_before_any_work(village, monkeypatch, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a"}\n')
    flags = [f"--init={village[0] / 'sft.pt'}", f"--out={tmp_path}", f"--pairs={pairs}"]
    message = refusal(run_main, monkeypatch, train_dpo, *flags)
    assert f'{pairs}, line 1: no "chosen"' in message
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    flags[-1] = "--pairs=nowhere.jsonl"
    assert "nowhere.jsonl" in refusal(run_main, monkeypatch, train_dpo, *flags)


def test_a_bad_pairs_file_leaves_the_last_report(village, monkeypatch, tmp_path):
    for name, text in (("dpo.json", "{}"), ("pairs.jsonl", "{")):
        (tmp_path / name).write_text(text)
    flags = [f"--init={village[0] / 'sft.pt'}", f"--out={tmp_path}"]
    flags.append(f"--pairs={tmp_path}/pairs.jsonl")
    assert "not JSON" in refusal(run_main, monkeypatch, train_dpo, *flags)
    assert (tmp_path / "dpo.json").read_text() == "{}"


def test_a_model_too_small_for_the_village_is_refused(tokenizer):
    prompt = max(len(tokenizer.encode_ordinary(q)) for q in data.QUESTIONS)
    texts = (text for question in data.QUESTIONS for text in data.responses(question))
    response = max(len(data.encode(tokenizer, "", text)[0]) for text in texts)
    config = train_dpo.Config(max_new_tokens=response)
    train_dpo.check_village_fits(tokenizer, prompt + response, config)
    with pytest.raises(SystemExit, match=f"responses take {response} tokens and prompts {prompt}"):
        train_dpo.check_village_fits(tokenizer, prompt + response - 1, config)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(village, tmp_path):
    good = (village[0] / "dpo.pt").read_bytes()
    (tmp_path / "dpo.pt").write_bytes(good)
    flags = ["--init", str(village[0] / "sft.pt"), "--out", str(tmp_path), "--lr=1e30", *TOY_DPO]
    run = command("train_dpo.py", *flags, check=False)
    assert run.returncode == 1 and run.stderr.startswith("after step 1: ")
    assert run.stderr.count("\n") == 1
    assert (tmp_path / "dpo.pt").read_bytes() == good


@needs_unix
def test_ctrl_c_leaves_whole_files_and_one_line(village, tmp_path):
    flags = [
        "--init",
        str(village[0] / "sft.pt"),
        "--out",
        str(tmp_path),
        "--epochs=10000",
        *TOY_DPO,
    ]
    # A test run in the background may ignore Ctrl-C, and a child would inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-u", "train_dpo.py", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, handler)
    while "step 0" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.strip() == "interrupted; --resume goes on from the last saved state"
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) > 40
