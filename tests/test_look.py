"""tools/look.py: the implicit reward token by token."""

import math
import sys

import pytest
import torch

import data
import model as gpt
from lab import village
from tools import look

QUESTION = "What is the job of Mara?"


@pytest.fixture
def models(tokenizer):
    """-> (policy, reference), which are random."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = gpt.GPTConfig(tokenizer.n_vocab, 64, n_layer=1, n_head=2, n_embd=16)
        made.append(gpt.GPT(config).eval())
    return made


@pytest.fixture
def run(models, tokenizer, monkeypatch, tmp_path, capsys):
    """-> a function: look.py, given its arguments after OUT; what it prints."""
    for name, model in zip(("dpo", "sft"), models):
        gpt.save(tmp_path / f"{name}.pt", model, tokenizer=data.tokenizer_state(tokenizer))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["look.py", str(tmp_path), *arguments])
        look.main()
        return capsys.readouterr().out

    return call


def slow_logp(model, tokenizer, prompt, response):
    """log π of each token of a response, one forward pass for each."""
    ids = tokenizer.encode_ordinary(prompt)
    found = []
    for token in [*tokenizer.encode_ordinary(response), tokenizer.eot_token]:
        with torch.no_grad():
            found.append(model(torch.tensor([ids]))[0, -1].log_softmax(0)[token].item())
        ids = [*ids, token]
    return found


def test_a_tokens_share_is_beta_times_its_log_ratio(models, tokenizer):
    response = " Gladly! Mara is a smith."
    words, values = look.shares(models, tokenizer, QUESTION, response, beta=0.5)
    assert "".join(words) == response + "<|endoftext|>"
    policy, reference = (slow_logp(model, tokenizer, QUESTION, response) for model in models)
    expected = [0.5 * (a - b) for a, b in zip(policy, reference)]
    assert values.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_sums_make_the_probability_of_eq_6(run, models, tokenizer):
    texts = " Mara is a smith.", " Ugh. Go away."
    printed = run(QUESTION, *texts, "--beta=0.1")
    sums = []
    for text in texts:
        policy, reference = (slow_logp(model, tokenizer, QUESTION, text) for model in models)
        sums.append(0.1 * (sum(policy) - sum(reference)))
        reward = village.reward(QUESTION, text)
        assert f"r̂ = {sums[-1]:+.2f}, true reward {reward:+g}" in printed
    p = 1 / (1 + math.exp(sums[0] - sums[1]))
    assert f"p(response 2 ≻ response 1) = {p:.3f}" in printed


def test_beta_is_that_of_the_policys_run(run, tmp_path):
    """Without a report 0.5; four times as much makes every r̂ four times as large."""
    sums = [float(run(QUESTION, " Mara is a smith.").split("r̂ = ")[1].split(",")[0])]
    (tmp_path / "dpo.json").write_text('{"config": {"beta": 2.0}}')
    sums.append(float(run(QUESTION, " Mara is a smith.").split("r̂ = ")[1].split(",")[0]))
    assert sums[1] == pytest.approx(4 * sums[0], abs=0.025)  # both are rounded to 0.01


def test_without_responses_each_model_gives_one_and_any_prompt_will_do(run, models, tokenizer):
    printed = run(QUESTION)
    assert printed.count("r̂ = ") == 2
    for name, model in zip(("policy", "reference"), models):
        torch.manual_seed(0)
        prompt = tokenizer.encode_ordinary(QUESTION)
        (reply,) = model.generate([prompt], tokenizer.eot_token, 24)
        text = tokenizer.decode([i for i in reply if i != tokenizer.eot_token])
        _, values = look.shares(models, tokenizer, QUESTION, text, 0.5)
        assert f"a sample of the {name}: r̂ = {values.sum():+.2f}" in printed
    printed = run("Anything else?")
    assert printed.count("r̂ = ") == 2 and "true reward" not in printed


def test_the_likeliest_responses_and_their_probabilities(run, monkeypatch):
    """Two responses and the garbled texts. Eq. 4: 0.5, 0.3 e², 0.2 e⁻⁶, over their sum 2.7172."""
    p = iter([[0.3, 0.5, 0.2], [0.5, 0.4, 0.1]])  # of the reference, then of the policy

    def exact_distribution(model, tokenizer, questions):
        rewards = torch.tensor([[1.0, 0.0, -3.0]], dtype=torch.float64)
        return torch.tensor([next(p)], dtype=torch.float64).log(), rewards

    monkeypatch.setattr(look.evaluate, "exact_distribution", exact_distribution)
    monkeypatch.setattr(village, "responses", lambda question: {" Yes.": 1, " No.": 0})
    assert [line.split() for line in run(QUESTION, "--likeliest").splitlines()[1:]] == [
        ["50.00%", "40.00%", "18.40%", "+0", "No."],
        ["30.00%", "50.00%", "81.58%", "+1", "Yes."],
        ["20.00%", "10.00%", "0.02%", "-3", "(all", "garbled", "texts", "together)"],
    ]


def test_colours_go_from_white_to_blue_and_orange():
    assert look.tint(0) == (255, 255, 255) and look.tint(2) == look.tint(9) == look.BLUE
    assert look.tint(-2) == look.ORANGE and look.tint(1) == (128, 184, 216)


def test_lines_are_wrapped_and_numbers_stand_below_their_tokens():
    words = [" word"] * 40
    lines = look.paint(words, [0.5] * 40, in_colour=False)
    assert len(lines) == 6 and all(len(line) <= 100 for line in lines)
    assert "".join(lines[::2]).split() == ["word"] * 40
    assert "".join(lines[1::2]).split() == ["+0.50"] * 40
    assert lines[0].index("word") == lines[1].index("+0.50") + 1


def test_mistakes_end_in_one_line(run, models, tmp_path):
    with pytest.raises(SystemExit, match="the prompt is empty"):
        run(" ")
    other = data.build_tokenizer([chr(byte) for byte in range(256)])
    gpt.save(tmp_path / "dpo.pt", models[0], tokenizer=data.tokenizer_state(other))
    with pytest.raises(SystemExit, match="the two models have different tokenizers"):
        run(QUESTION)
    with pytest.raises(SystemExit, match="--likeliest is for the village's questions"):
        run("Hi?", "--likeliest", f"--policy={tmp_path}/sft.pt")
