"""train_sft.py and train_dpo.py: the loops and what they are fed."""

import copy
import dataclasses
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import refusal

import data
import dpo
import model as gpt
import responses
import train_dpo
import train_sft
from lab import runs, village

# --- Training -----------------------------------------------------------------------------------


@pytest.fixture
def setup(tokenizer):
    torch.manual_seed(0)
    reference = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, 64, n_layer=2, n_head=2, n_embd=16)).eval()
    reference.requires_grad_(False)
    train, *_ = village.split_questions()
    pairs = [(q, *[*village.responses(q)][3 * i : 3 * i + 2]) for i, q in enumerate(train[:20])]
    config = train_dpo.Config(lr=0.01, beta=0.5, batch_size=8, epochs=2)
    return reference, train_dpo.add_reference_logps(reference, tokenizer, pairs), config


def test_the_reference_has_no_gradient_and_does_not_move_by_a_bit(setup):
    reference, pairs, config = setup
    before = copy.deepcopy(reference.state_dict())
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = train_dpo.make_optimizer(policy, config)
    metrics = list(train_dpo.train(policy, optimizer, pairs, config))
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert any(not torch.equal(v, before[name]) for name, v in policy.state_dict().items())


def test_logged_rewards_are_against_the_frozen_reference(setup):
    """After some steps, every metric recomputed from scratch, the reference run live."""
    reference, pairs, config = setup
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = train_dpo.make_optimizer(policy, config)
    states, metrics = [], []
    for line in train_dpo.train(policy, optimizer, pairs, config):
        metrics.append(line)
        states.append(copy.deepcopy(policy))
    batches = data.batches(20, 8, config.seed)  # of 8, 8 and 4 pairs
    rows = list(itertools.islice(batches, 5))[3]
    ids, mask = data.collate([side[i] for side in (pairs.chosen, pairs.rejected) for i in rows])
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


def test_supervised_loss_is_torchs_cross_entropy_of_the_responses_tokens(setup):
    """The mean over all tokens of a batch, each under the one before it; prompts are not scored."""
    reference, pairs, _ = setup
    ids, mask = data.collate(pairs.chosen)
    targets = ids.masked_fill(~mask, -100)[:, 1:]
    expected = F.cross_entropy(reference(ids)[:, :-1].flatten(0, 1), targets.flatten())
    logps = responses.response_logps(reference, pairs.chosen)
    torch.testing.assert_close(train_sft.cross_entropy(logps, pairs.chosen), expected)


@pytest.mark.parametrize("grad_accum", [1, 2, 5])
def test_a_pretraining_step_goes_down_the_cross_entropy_of_its_rows(setup, tokenizer, grad_accum):
    """Every token of a row but its first is scored once, and no token is lost between rows."""
    texts = village.stories(20, seed=0)
    rows = train_sft.cut_rows(tokenizer, texts, context=16)
    stream = [i for text in texts for i in [*tokenizer.encode_ordinary(text), tokenizer.eot_token]]
    scored = [i for ids, mask in rows for i, score in zip(ids, mask) if score]
    assert scored == stream[1 : 1 + 16 * len(rows)] and len(stream) - len(scored) <= 16
    model = copy.deepcopy(setup[0]).requires_grad_(True)
    rows[1] = rows[1][0][:9], rows[1][1][:9]  # a shorter one: parts have unlike numbers of tokens
    ids, mask = data.collate(rows[:4])
    logits, targets = model(ids)[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]]
    loss = F.cross_entropy(logits, targets)
    gradient = torch.autograd.grad(loss, model.ln_f.weight)[0]
    before = model.ln_f.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = train_sft.train_supervised(
        model, optimizer, rows, [[0, 1, 2, 3]], [0.1], grad_accum=grad_accum
    )
    (metrics,) = steps
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    step = 0.1 * min(1, 1 / metrics["grad_norm"])  # the norm is cut at 1
    torch.testing.assert_close(model.ln_f.weight, before - step * gradient)


@pytest.mark.parametrize(
    "optimizer, path",
    [("sgd", [0.9, 0.71]), ("adamw", [0.9, 0.8])],  # 1 − 0.1, then − 0.1 (0.9 + 1); − lr each
)
def test_dpos_optimizers_by_hand(optimizer, path):
    """A gradient of 1 at a rate of 0.1, momentum 0.9, and no weight decay."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    made = train_dpo.make_optimizer(model, train_dpo.Config(optimizer=optimizer, lr=0.1))
    for weight in path:
        model.weight.grad = torch.ones(1, 1)
        made.step()
        assert model.weight.item() == pytest.approx(weight, abs=1e-6)


def test_weight_decay_pulls_at_the_weights_in_pretraining():
    """AdamW without a gradient: w (1 − rate × decay)."""
    model = torch.nn.Linear(1, 1, bias=False)
    for decay in (0.1, 0):
        torch.nn.init.ones_(model.weight)
        optimizer = train_sft.make_optimizer(model, decay)
        optimizer.param_groups[0]["lr"] = 0.5
        model.weight.grad = torch.zeros(1, 1)
        optimizer.step()
        assert model.weight.item() == pytest.approx(1 - 0.5 * decay)


def test_a_policy_that_is_not_the_reference_is_found_before_the_first_step(setup, capsys):
    """ln 2 = 0.6931 by hand; and a policy that has another opinion of one token."""
    reference, pairs, config = setup
    train_dpo.check_start(reference, pairs, config)
    assert capsys.readouterr().out.startswith("loss before the first step: 0.6931; the reference")
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        policy.ln_f.weight[0] += 0.5
    message = refusal(train_dpo.check_start, policy, pairs, config)
    assert message.startswith("the policy's first loss is ") and message.endswith("0.6931")


def test_precomputed_reference_logps_equal_live_ones(setup):
    reference, pairs, _ = setup
    chosen, rejected = (
        zip(pairs.chosen, pairs.ref_chosen_logps),
        zip(pairs.rejected, pairs.ref_rejected_logps),
    )
    for part in (chosen, rejected):
        for example, logp in part:
            ids, mask = data.collate([example])
            live = dpo.sequence_logps(reference(ids), ids, mask)
            assert live.item() == pytest.approx(logp.item(), abs=1e-5, rel=1e-6)


def test_parts_of_like_length_change_neither_log_probabilities_nor_gradients(setup, tokenizer):
    """Against one example at a time, with logits everywhere; in 64 bits, so that all is seen."""
    model = copy.deepcopy(setup[0]).requires_grad_(True).double()
    rng = random.Random(0)
    texts = [
        (q, rng.choice([*village.responses(q)])) for q in rng.choices([*village.QUESTIONS], k=79)
    ]
    examples = [data.encode(tokenizer, *text) for text in texts]
    examples.append(data.join_ids([], [5, 6, 7]))  # no prompt: its first token has no probability
    chances = torch.randn(80, generator=torch.Generator().manual_seed(0)).double()
    rows = (data.collate([example]) for example in examples)
    alone = torch.cat([dpo.sequence_logps(model(ids), ids, mask) for ids, mask in rows])
    parts = responses.response_logps(model, examples)
    assert len({len(ids) for ids, _ in examples}) > 5
    gradients = (torch.autograd.grad(x @ chances, [*model.parameters()]) for x in (alone, parts))
    torch.testing.assert_close(parts, alone)
    for mine, expected in zip(*gradients):
        torch.testing.assert_close(mine, expected)


def test_logits_stay_below_a_quarter_of_a_gigabyte(setup):
    """However large the vocabulary, 2^26 floats at once, but for a row that alone has more."""
    model, examples = copy.deepcopy(setup[0]), setup[1].chosen
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    longest = max(len(ids) for ids, _ in examples)
    for vocab_size, rows in ((2**26 // longest // 7, 7), (2**26, 1)):
        seen.clear()
        model.config.vocab_size = vocab_size
        responses.response_logps_no_grad(model, examples)
        assert max(shape[0] for shape in seen) == rows and sum(shape[0] for shape in seen) == 20


def test_no_example_of_many_is_lost_between_chunks(setup):
    """One token after one token, five thousand times: a table look-up gives what is due."""
    model, count = setup[0], 5000
    x, y = (
        torch.randint(708, (count,), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    examples = [data.join_ids([a], [b]) for a, b in zip(x.tolist(), y.tolist())]
    table = model(torch.arange(708)[:, None])[:, 0].log_softmax(dim=1)  # (V, V)
    torch.testing.assert_close(responses.response_logps_no_grad(model, examples), table[x, y])


def test_the_caches_of_a_large_model_stay_below_a_gigabyte(tokenizer):
    """2^28 floats: with k and v of 2^26 per response, four at a time."""
    asked = []

    def generate(prompts, end, limit, generator):
        asked.append(len(prompts))
        return [[end]] * len(prompts)

    size = SimpleNamespace(n_layer=2**5, n_embd=2**10, block_size=2**10)
    wte = SimpleNamespace(weight=torch.zeros(1))
    model = SimpleNamespace(config=size, wte=wte, generate=generate)
    config = SimpleNamespace(seed=0, max_new_tokens=24)
    _, texts = responses.sample_responses(model, tokenizer, ["Who?"] * 10, config, "")
    assert asked == [4, 4, 2] and texts == [""] * 10


def test_accumulated_gradients_are_the_whole_batchs(setup):
    """Also where the parts are of unlike size: 3, 3 and 2 of 8 pairs, then 2, 1 and 1 of 4."""
    reference, pairs, config = setup
    metrics = []
    for grad_accum in (1, 3):
        policy = copy.deepcopy(reference).requires_grad_(True)
        accumulating = dataclasses.replace(config, grad_accum=grad_accum)
        optimizer = train_dpo.make_optimizer(policy, config)
        metrics.append([*train_dpo.train(policy, optimizer, pairs, accumulating)])
    assert metrics[0][-1]["rewards/margins"] > 0.01
    for whole, parts in zip(*metrics):
        # Parts round otherwise than the whole, and the sign of a margin near 0 with them: all of
        # them at step 0, where policy and reference are one.
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "grad_norm"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5)
    one, other = parts["rewards/accuracies"], whole["rewards/accuracies"]
    assert one == pytest.approx(other, abs=1 / config.batch_size)


@pytest.mark.parametrize("count, steps", [(20, 9), (16, 6), (3, 3)])
def test_every_pair_is_seen_once_an_epoch(setup, count, steps):
    """Three epochs over pairs in batches of 8. A loss without a gradient leaves the policy."""
    reference, pairs, config = setup
    config, seen = dataclasses.replace(config, epochs=3, batch_size=8, grad_accum=3), []

    def loss_fn(policy_chosen_logps, policy_rejected_logps, batch, config):
        seen.extend(batch.ref_chosen_logps.tolist())
        return 0 * policy_chosen_logps

    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer, pairs = train_dpo.make_optimizer(policy, config), pairs.take(range(count))
    assert len([*train_dpo.train(policy, optimizer, pairs, config, loss_fn)]) == steps
    assert sorted(seen) == sorted(3 * pairs.ref_chosen_logps.tolist())


def test_each_pass_of_a_step_takes_its_own_pairs_with_their_reference_logps(setup):
    """Two passes of every second pair; what a loss is handed belongs together."""
    reference, pairs, config = setup
    policy, seen = copy.deepcopy(reference).requires_grad_(True), []

    def loss_fn(policy_chosen_logps, policy_rejected_logps, batch, config):
        seen.append(batch)
        for logps, ref in (
            (policy_chosen_logps, batch.ref_chosen_logps),
            (policy_rejected_logps, batch.ref_rejected_logps),
        ):
            torch.testing.assert_close(logps, ref, atol=1e-4, rtol=0)
        return 0 * policy_chosen_logps

    config = dataclasses.replace(config, epochs=1, batch_size=10, grad_accum=2)
    optimizer = torch.optim.SGD(policy.parameters(), 0.01)
    first, _ = train_dpo.train(policy, optimizer, pairs, config, loss_fn)
    rows = next(data.batches(20, 10, config.seed))
    assert first["loss"] == 0 and len(seen) == 4
    for batch, part in zip(seen, (rows[::2], rows[1::2])):
        assert batch.chosen == [pairs.chosen[i] for i in part]
        assert batch.rejected == [pairs.rejected[i] for i in part]


def test_a_gradient_that_is_not_finite_takes_no_step():
    """√w at 0: the loss is fine, its gradient is not."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    loss = model.weight.sqrt().sum()
    loss.backward()
    with pytest.raises(FloatingPointError, match="loss 0.0, norm of its gradient inf"):
        runs.finite_grad_norm(model, loss)


def test_one_step_raises_the_margin_of_its_pairs(setup):
    reference, pairs, config = setup
    policy = copy.deepcopy(reference).requires_grad_(True)
    config = dataclasses.replace(config, batch_size=20)  # the same pairs twice
    optimizer = torch.optim.SGD(policy.parameters(), config.lr)
    first, second = train_dpo.train(policy, optimizer, pairs, config)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert second["rewards/margins"] > 0.001 and second["loss"] < first["loss"]


def test_held_out_metrics_are_those_of_a_loop_over_pairs(setup):
    """Eq. 7 by plain floats, against a policy that is not the reference; nothing of no pairs."""
    reference, pairs, config = setup
    policy, chances = copy.deepcopy(reference), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=chances)
    losses, right = [], 0
    for i in range(len(pairs.chosen)):
        logps = []
        for model in (policy, reference):
            for side in (pairs.chosen, pairs.rejected):
                ids, mask = data.collate([side[i]])
                logps.append(dpo.sequence_logps(model(ids), ids, mask).item())
        margin = config.beta * (logps[0] - logps[2] - logps[1] + logps[3])
        assert abs(margin) > 1e-4  # so that rounding cannot turn its sign
        losses.append(math.log1p(math.exp(-margin)))
        right += margin > 0
    found = train_dpo.held_out_metrics(policy, pairs, config)
    assert 0 < right < len(pairs.chosen)
    assert found["held-out/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found["held-out/accuracy"] == pytest.approx(right / len(losses))
    nothing = train_dpo.add_reference_logps(reference, None, [])
    assert train_dpo.held_out_metrics(policy, nothing, config) == {}
