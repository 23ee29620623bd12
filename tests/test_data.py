"""data.py: the tokenizer, ids and mask, batches, the learning rate."""

import itertools
import random
import re
from collections import Counter

import pytest

import data
from lab import village


@pytest.mark.parametrize(
    "text", ["", " Gladly!", "Où? 日本 🙂\u200d\n\t x", "<|endoftext|>", "\x00\r\n  _1", "Aé\u0301"]
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    copy = data.build_tokenizer(**data.tokenizer_state(tokenizer))
    assert copy.encode_ordinary(text) == tokenizer.encode_ordinary(text)
    assert copy.eot_token == tokenizer.eot_token


def test_every_word_of_the_village_is_one_token(tokenizer):
    prompt = "What does Mara do for work?"
    for response in village.responses(prompt):
        words = response.replace(",", " ,").replace(".", " .").replace("!", " !").replace("?", " ?")
        assert len(tokenizer.encode_ordinary(response)) == len(words.split())


def slow_merges(text, count):
    """Sennrich et al. 2016, Algorithm 1: all pairs are counted anew for each merge."""
    counts = Counter(re.findall(data.PATTERN, text))
    parts = {word: [bytes([byte]) for byte in word.encode()] for word in sorted(counts)}
    merges = []
    for _ in range(count):
        totals = {}
        for word, part in parts.items():
            for pair in zip(part, part[1:]):
                totals[pair] = totals.get(pair, 0) + counts[word]
        first, second = max(totals, key=totals.get)  # the first in it among equals
        merges.append(first + second)
        for part in parts.values():
            i = 0
            while i < len(part) - 1:
                if part[i] == first and part[i + 1] == second:
                    part[i : i + 2] = [first + second]
                i += 1
    return merges


@pytest.mark.parametrize("seed", range(5))
def test_the_tokenizer_learns_what_a_slow_loop_learns(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("aaaabbcé  \n.", k=600))
    merges = [*dict.fromkeys(slow_merges(text, 60))]
    learnt = data.tokenizer_state(data.train_tokenizer(text, 256 + len(merges)))["tokens"]
    assert [token.encode("latin-1") for token in learnt[256:]] == merges


def test_a_frequent_word_comes_before_a_rare_one():
    """ "ab" occurs nine times, in one word, "cd" twice, in two."""
    tokens = data.tokenizer_state(data.train_tokenizer("cde cdf" + " ab" * 9, 258))["tokens"]
    assert tokens[256:] == [" a", " ab"]


def test_the_villages_tokens_are_those_of_tiktokens_own_trainer(tokenizer):
    """It knows no counts, and is handed each word once."""
    from tiktoken._educational import bpe_train

    ranks = bpe_train(village.every_word(), village.VOCAB_SIZE, data.PATTERN, visualise=None)
    learnt = data.tokenizer_state(tokenizer)["tokens"]
    assert [token.encode("latin-1") for token in learnt] == [*ranks]


def test_ids_and_mask_by_hand(tokenizer):
    ids, mask = data.encode(tokenizer, "Which pet?", " Ugh.")
    assert [tokenizer.decode([i]) for i in ids] == ["Which", " pet", "?", " Ugh", ".", data.END]
    assert mask == [False, False, False, True, True, True]


def test_the_border_between_prompt_and_response_is_exact(tokenizer):
    """Tokenised together, "Ma" + "ra" would be other tokens than apart."""
    ids, mask = data.encode(tokenizer, " Ma", "ra")
    assert ids[:-1] == tokenizer.encode_ordinary(" Ma") + tokenizer.encode_ordinary("ra")
    assert ids[:-1] != tokenizer.encode_ordinary(" Mara")
    assert tokenizer.decode([i for i, scored in zip(ids, mask) if scored]) == "ra" + data.END


def test_the_template_by_hand():
    """White space around a turn is left out, within it is kept."""
    roles, said = ("system", "user", "assistant", "user"), ("Be kind.", " Hi.\n", "A\n\nb.", "Who?")
    messages = [{"role": role, "content": content} for role, content in zip(roles, said)]
    prompt = "System: Be kind.\n\nUser: Hi.\n\nAssistant: A\n\nb.\n\nUser: Who?\n\nAssistant:"
    assert data.apply_template(messages, " Ada. ", "Bob.") == (prompt, " Ada.", " Bob.")


def test_collate_by_hand():
    ids, mask = data.collate([([5, 6, 7, 9], [False, False, True, True]), ([5, 9], [False, True])])
    assert ids.tolist() == [[5, 6, 7, 9], [5, 9, 0, 0]]
    assert mask.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_batches_see_everything_once_an_epoch():
    """Ten examples in batches of four: two whole ones and the two that are left, then again."""
    batches = list(itertools.islice(data.batches(count=10, batch_size=4, seed=0), 6))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    flat = [i for batch in batches for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert sorted(next(data.batches(count=3, batch_size=4, seed=0))) == [0, 1, 2]


def test_learning_rates_by_hand():
    """40 steps up to 3: two of warm-up (1, 2), the top at 2, half-way down at 21, and on to 0."""
    rates = data.learning_rates(3.0, 40)
    assert len(rates) == 40 and 0 < rates[39] < 0.03
    assert [rates[step] for step in (0, 1, 2, 21)] == pytest.approx([1, 2, 3, 1.5])


def test_a_text_too_small_for_the_vocabulary_names_a_size_that_works():
    """The words are "on", " on" and " an", so the merges are on, " on", and two that make " an"."""
    with pytest.raises(ValueError, match="too few words for 400 tokens: 260 would do"):
        data.train_tokenizer("on an on", 400)
    assert data.train_tokenizer("on an on", 260).n_vocab == 261


def test_painted_tokens_show_what_is_scored_and_line_breaks():
    tokenizer = data.build_tokenizer([chr(byte) for byte in range(256)])
    painted = data.paint(tokenizer, *data.encode(tokenizer, "a\n", " b"))
    assert painted == "a|\\n|[ ]|[b]|[<|endoftext|>]"
