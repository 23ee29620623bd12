"""experiments/bench.py: what it counts. How fast anything is, no test can know."""

import re

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from experiments import bench


def test_flops_are_what_torch_counts():
    """But for half of the attention, which is causal, and the projection of the last token, which
    predicts nothing: torch counts what is computed, the formula what is needed."""
    setting = bench.Setting(n_layer=3, n_embd=64, pairs=1)
    model, tokenizer, [(prompt, chosen, _)] = bench.start(setting)
    example = data.encode(tokenizer, prompt, chosen)
    ids, mask = data.collate([example])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, mask[0].tolist().index(True) - 1)
    c, t = 64, ids.shape[1]
    needless = 3 * 2 * c * t**2 + 2 * c * tokenizer.n_vocab
    assert bench.flops([example], model.config) == counter.get_total_flops() - needless


def test_sequences_have_the_length_asked_for():
    _, tokenizer, pairs = bench.start(bench.Setting(length=256, pairs=20))
    for prompt, *responses in pairs:
        assert {len(data.encode(tokenizer, prompt, r)[0]) for r in responses} == {256}


def test_the_figures_fit_each_other(monkeypatch, capsys):
    """In this process: one for each figure is what keeps their memory apart, and takes long."""
    run = lambda functions, setting: {k: v for f in functions for k, v in f(setting).items()}  # noqa: E731
    monkeypatch.setattr(bench, "measure", run)
    bench.compare(bench.Setting(pairs=64), bench.Config(rounds=1))
    printed = capsys.readouterr().out
    figures = dict(re.findall(r"([a-z/ ]+?) ([\d,]+)(?=[,\n])", printed))
    figures = {name.strip(): float(value.replace(",", "")) for name, value in figures.items()}
    _, tokenizer, pairs = bench.start(bench.Setting(pairs=64))
    tokens = sum(len(data.encode(tokenizer, p, r)[0]) for p, *both in pairs for r in both)
    low, high = (  # both are printed without decimals
        (figures["tokens/s"] + half) / (figures["pairs/s"] - half) for half in (-0.5, 0.5)
    )
    assert low <= tokens / 64 <= high
    assert figures["pairs/s in the loop"] > figures["pairs/s"]
