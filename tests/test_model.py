"""model.py: causality, generation with and without a cache, sampling, checkpoints."""

import pytest
import torch
import torch.nn.functional as F

import model as gpt

END = 0


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = gpt.GPTConfig(vocab_size=7, block_size=24, n_layer=2, n_head=2, n_embd=16)
    return gpt.GPT(config).double().eval()


def slow_generate(model, prompts, limit, generator):
    """The same sampling, written again: no cache, no padding, every row by itself."""
    texts, rows = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    for _ in range(limit):
        logits = torch.cat([model(torch.tensor([texts[i]]))[:, -1] for i in rows])
        tokens = []
        for p, chance in zip(logits.softmax(-1), 1 - torch.rand(len(rows), generator=generator)):
            token, passed = 0, p[0]
            while passed < chance:
                token += 1
                passed = passed + p[token]
            tokens.append(token)
        for i, token in zip(rows, tokens):
            texts[i].append(token)
        rows = [i for i, token in zip(rows, tokens) if token != END]
        if not rows:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts)]


def test_cached_and_uncached_generation_agree_token_for_token(model):
    prompts = [[1], [2, 3, 4, 5, 6, 1, 2], [3, 3], [4, 5, 6], [6, 5, 4, 3, 2]] * 4
    fast = model.generate(prompts, END, 12, generator=torch.Generator().manual_seed(3))
    slow = slow_generate(model, prompts, 12, torch.Generator().manual_seed(3))
    assert fast == slow
    lengths = {len(reply) for reply in fast}
    assert len(lengths) > 3 and max(lengths) == 12  # both ends were met: end-of-text and the limit


def test_the_future_does_not_change_the_past(model):
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = torch.tensor([[1, 2, 3, 6, 1, 1]])
    torch.testing.assert_close(model(ids)[:, :3], model(changed)[:, :3])
    assert not torch.allclose(model(ids)[:, 3], model(changed)[:, 3])


def test_sampled_frequencies_match_the_models_probabilities(model):
    prompt, count = [1, 2, 3], 20_000
    replies = model.generate([prompt] * count, END, 1, 0.7, torch.Generator().manual_seed(0))
    p = F.softmax(model(torch.tensor([prompt]))[0, -1] / 0.7, -1)
    seen = torch.bincount(torch.tensor(replies)[:, 0], minlength=7) / count
    # Five standard deviations of a binomial share.
    assert ((seen - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all()


@pytest.mark.parametrize("number, token", [(1 - 2**-24, 20), (0.0, 40)])
def test_no_chance_takes_a_token_without_probability(monkeypatch, number, token):
    """torch.rand's smallest and largest numbers; of 64 tokens three have a probability, whose sum
    is a little less than one. Where rounding makes it so depends on the CPU: here it is given."""
    p = torch.zeros(1, 64)
    p[0, [20, 30, 40]] = torch.tensor([0.5, 0.25, 0.2499])
    monkeypatch.setattr(gpt.F, "softmax", lambda *_, **__: p)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, number))
    assert gpt.sample(torch.zeros(1, 64), 1.0).item() == token


def test_temperature_zero_takes_the_likeliest(model):
    prompts = [[1, 2], [3, 4, 5], [6]]
    for text, reply in zip(prompts, model.generate(prompts, END, 5, temperature=0)):
        for token in reply:
            assert token == model(torch.tensor([text]))[0, -1].argmax()
            text = [*text, token]


def test_too_long_is_refused_not_cut(model):
    with pytest.raises(ValueError, match="block size of 24"):
        model(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="block size of 24"):
        model.generate([[1], [1] * 20], END, 5)


def test_weights_are_tied_and_gpt2_sized():
    """GPT-2's smallest has 124,439,808 parameters (its released weights)."""
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(50257, 1024, n_layer=12, n_head=12, n_embd=768))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.lm_head.weight is model.wte.weight


def test_checkpoints_round_trip_with_weights_only(model, tmp_path):
    model, path = model.float(), tmp_path / "model.pt"
    model.learnt = {"conversations": True, "answer_tokens": 5}
    gpt.save(path, model, tokens=["a", "\xff"])
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    loaded, state = gpt.load(path)
    assert state["tokens"] == ["a", "\xff"] and not loaded.training
    assert loaded.learnt == model.learnt
    del state["learnt"]  # as in the checkpoints of earlier versions
    torch.save(state, path)
    assert gpt.load(path)[0].learnt == {}
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half", [1, 2]])
def test_a_foreign_or_truncated_checkpoint_is_named(model, tmp_path, content):
    path = tmp_path / "model.pt"
    if content == "half":
        gpt.save(path, model)
        path.write_bytes(path.read_bytes()[:-1000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="model.pt is not a whole checkpoint"):
        gpt.load(path)


def test_what_does_not_fit_in_a_checkpoint_is_named(model, tmp_path):
    path = tmp_path / "model.pt"
    gpt.save(path, model)
    _, good = gpt.load(path)
    for change, message in (
        ({"config": None}, "it has no 'config'"),
        ({"weights": None}, "it has no 'weights'"),
        ({"config": good["config"] | {"dropout": 0.1}}, "unexpected keyword argument 'dropout'"),
        ({"config": good["config"] | {"n_layer": 3}}, 'Missing key.* "blocks.2.ln_1.weight"'),
        ({"config": good["config"] | {"vocab_size": 9}}, "size mismatch for wte.weight"),
    ):
        state = {name: value for name, value in (good | change).items() if value is not None}
        torch.save(state, path)
        with pytest.raises(ValueError, match=f"model.pt .*{message}") as error:
            gpt.load(path)
        assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_never_written(model, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"an earlier run's")
    with torch.no_grad():
        model.ln_f.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        gpt.save(path, model)
    assert path.read_bytes() == b"an earlier run's"


def test_a_sequence_may_fill_the_block_and_not_outgrow_it():
    model = gpt.GPT(gpt.GPTConfig(vocab_size=5, block_size=6, n_layer=1, n_head=1, n_embd=4))
    assert model(torch.zeros(1, 6, dtype=torch.int64)).shape == (1, 6, 5)
    with pytest.raises(ValueError, match="7 tokens do not fit the block size of 6"):
        model(torch.zeros(1, 7, dtype=torch.int64))
