"""tools/gpt2.py against transformers itself, on random weights; skipped where it is missing."""

import copy
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import refusal

import data
import model as gpt
from lab import village
from tools import gpt2

ODD = [
    "What does Mara do for work? Mara's a baker, isn't she? They're 42 years old.",
    "  two spaces,\n\nnew lines \r\n and\ttabs \n at the end  ",
    "Übung macht den Meister: naïve café, Ωμέγα, щи, 漢字かな交じり文, हिन्दी, ไทย, العربية",
    "👩\u200d👩\u200d👧 🇩🇪 ², ½, Ⅷ, Ⓐ, a_b, __init__, e\u0301 \u00a0\u3000 \u200b\u00ad\x00\x7f",
    *("", " ", "\n", "a", " a", "\ufeff", "\U0010ffff"),
]
LETTERS = "aaabcdeeefghiiklmnooprstuvwy     .,!?'\n\t019_ABMÜé漢👩"


@pytest.fixture(scope="module")
def transformers():
    """The peer. It must not reach for the network."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def texts():
    """The village's texts, odd ones, and words cut anywhere, where pieces meet as in no word."""
    rng = random.Random(0)
    told = [
        *village.stories(20, seed=0),
        *village.QUESTIONS,
        *village.responses([*village.QUESTIONS][0]),
    ]
    noise = ["".join(rng.choices(LETTERS, k=rng.randint(1, 60))) for _ in range(1000)]
    words = village.every_word().replace(" ", "").replace("\n", "")
    starts = [rng.randrange(len(words) - 40) for _ in range(1000)]
    return told + ODD + noise + [words[i : i + rng.randint(1, 40)] for i in starts]


def randomise(model):
    """Every weight odd, biases and LayerNorms too, so that none can be left out or swapped."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3, generator=generator)
    return model.eval()


def some_ids(vocab_size):
    return torch.randint(vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def their_folder(transformers, tmp_path_factory):
    """What transformers and tokenizers write: random weights, and a vocabulary of GPT-2's kind."""
    import tokenizers

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(village.stories(50, seed=0) + ODD, 400, show_progress=False)
    tokenizer.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(vocab | {data.END: len(vocab)}))
    config = transformers.GPT2Config(
        vocab_size=len(vocab) + 1, n_positions=32, n_embd=24, n_layer=3, n_head=4
    )
    randomise(transformers.GPT2LMHeadModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(their_folder, tmp_path):
    """A copy of it, to spoil."""
    return shutil.copytree(their_folder, tmp_path / "gpt2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of the village's, and the file that it is in."""
    path = tmp_path_factory.mktemp("ours") / "model.pt"
    tokenizer = data.train_tokenizer(village.every_word(), village.VOCAB_SIZE)
    config = gpt.GPTConfig(tokenizer.n_vocab, 40, n_layer=3, n_head=4, n_embd=24)
    model = randomise(gpt.GPT(config))
    gpt.save(path, model, tokenizer=data.tokenizer_state(tokenizer))
    return path, model, tokenizer


@pytest.fixture
def run(monkeypatch):
    """-> a function: gpt2.py, given its arguments."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpt2.py", *map(str, arguments)])
        gpt2.main()

    return call


# --- Import ---------------------------------------------------------------------------------------


def test_a_folder_that_transformers_cannot_read_is_imported_and_said_to_be(
    transformers, folder, tmp_path, run, capsys
):
    (folder / "special_tokens_map.json").write_text("[1]")
    run("import", folder, tmp_path / "gpt2.pt")
    assert "token ids were not compared: transformers cannot read" in capsys.readouterr().out


def test_an_imported_model_has_the_logits_that_transformers_computes(
    transformers, their_folder, tmp_path, run
):
    run("import", their_folder, tmp_path / "new" / "gpt2.pt")  # the folder is made
    model, _ = gpt.load(tmp_path / "new" / "gpt2.pt")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(their_folder).eval()
    ids = some_ids(model.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["gpt2.pt"]


def test_an_imported_tokenizer_gives_gpt2s_ids(transformers, their_folder, tmp_path, run, texts):
    run("import", their_folder, tmp_path / "gpt2.pt")
    _, state = gpt.load(tmp_path / "gpt2.pt")
    ours = data.build_tokenizer(**state["tokenizer"])
    theirs = transformers.GPT2TokenizerFast.from_pretrained(their_folder)
    for text in texts:
        assert ours.encode_ordinary(text) == theirs.encode(text), text
        assert ours.decode(ours.encode_ordinary(text)) == text
    assert ours.eot_token == theirs.eos_token_id


def test_old_files_have_masks_a_second_head_and_no_prefix(their_folder, folder, tmp_path, run):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert {*bare} != {*tensors}
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    for i in range(3):
        bare[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        bare[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, folder / "model.safetensors")
    run("import", their_folder, tmp_path / "new.pt")
    run("import", folder, tmp_path / "old.pt")
    (new, _), (old, _) = (gpt.load(tmp_path / name) for name in ("new.pt", "old.pt"))
    for weight, other in zip(new.parameters(), old.parameters(), strict=True):
        assert torch.equal(weight, other)


def change_json(path, change):
    """Apply a function to what a JSON file holds."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def pad(folder, rows):
    """A vocabulary that was padded to a multiple, as many are, with rows that win every softmax."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    wte = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = torch.cat([wte, 100 * wte[:rows]])
    save_file(tensors, folder / "model.safetensors")
    change_json(folder / "config.json", lambda c: c.update(vocab_size=len(wte) + rows))


@pytest.mark.parametrize("named", [False, True])
def test_rows_that_no_text_reaches_are_cut(
    transformers, their_folder, folder, tmp_path, run, capsys, named
):
    pad(folder, 47)
    if named:  # a pad token
        change_json(folder / "vocab.json", lambda v: v.update({"<|pad|>": len(v)}))
    run("import", folder, tmp_path / "padded.pt")
    assert "left out: 47 rows of wte.weight, after <|endoftext|>" in capsys.readouterr().out
    run("import", their_folder, tmp_path / "whole.pt")
    (padded, state), (whole, other) = (
        gpt.load(tmp_path / f"{name}.pt") for name in ("padded", "whole")
    )
    assert state["tokenizer"] == other["tokenizer"] and padded.config == whole.config
    for weight, same in zip(padded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight, same)


@pytest.mark.parametrize("saved_by", ["us", "transformers"])
def test_tokenizer_json_alone_is_enough(transformers, their_folder, tmp_path, run, saved_by, texts):
    run("import", their_folder, tmp_path / "first.pt")
    if saved_by == "us":
        run("export", tmp_path / "first.pt", tmp_path / "alone")
    else:
        shutil.copytree(their_folder, tmp_path / "alone")
        tokenizer = transformers.AutoTokenizer.from_pretrained(their_folder)
        tokenizer.save_pretrained(tmp_path / "alone")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "alone" / name).unlink(missing_ok=True)
    assert (tmp_path / "alone" / "tokenizer.json").exists()
    run("import", tmp_path / "alone", tmp_path / "again.pt")
    first, again = (
        data.build_tokenizer(**gpt.load(tmp_path / f"{name}.pt")[1]["tokenizer"])
        for name in ("first", "again")
    )
    for text in texts:
        assert first.encode_ordinary(text) == again.encode_ordinary(text)


def test_weights_in_shards_are_put_together(transformers, their_folder, tmp_path, run):
    shutil.copytree(their_folder, tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(their_folder)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len([*(tmp_path / "shards").glob("model-*.safetensors")]) > 1
    run("import", tmp_path / "shards", tmp_path / "shards.pt")
    run("import", their_folder, tmp_path / "whole.pt")
    models = [gpt.load(tmp_path / f"{name}.pt")[0] for name in ("shards", "whole")]
    for weight, same in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(weight, same)


def test_another_name_of_the_same_activation(transformers, folder, tmp_path, run):
    change_json(folder / "config.json", lambda c: c.update(activation_function="gelu_pytorch_tanh"))
    run("import", folder, tmp_path / "gpt2.pt")
    model, _ = gpt.load(tmp_path / "gpt2.pt")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = some_ids(model.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_merges_end_their_lines_as_they_like(their_folder, folder, tmp_path, run, ending):
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    (folder / "merges.txt").write_bytes(ending.join(lines).encode())  # the last one without
    run("import", folder, tmp_path / "odd.pt")
    run("import", their_folder, tmp_path / "usual.pt")
    odd, usual = (gpt.load(tmp_path / f"{name}.pt")[1]["tokenizer"] for name in ("odd", "usual"))
    assert odd == usual


# --- Export ---------------------------------------------------------------------------------------


def test_an_exported_model_has_our_logits_in_transformers(transformers, checkpoint, tmp_path, run):
    path, model, _ = checkpoint
    run("export", path, tmp_path / "new" / "folder")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder").eval()
    ids = some_ids(model.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["folder"]
    dropouts = theirs.config.embd_pdrop, theirs.config.attn_pdrop, theirs.config.resid_pdrop
    assert dropouts == (0, 0, 0)


@pytest.mark.parametrize("kind", ["village", "gpt2"])
def test_an_exported_tokenizer_gives_our_ids(
    transformers, checkpoint, their_folder, tmp_path, run, texts, kind
):
    path = checkpoint[0]
    if kind == "gpt2":
        run("import", their_folder, path := tmp_path / "gpt2.pt")
    ours = data.build_tokenizer(**gpt.load(path)[1]["tokenizer"])
    run("export", path, tmp_path / "folder")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in texts:
        assert ours.encode_ordinary(text) == theirs.encode(text), text
        assert theirs.decode(theirs.encode(text)) == text
    assert len(theirs) == ours.n_vocab
    assert ours.eot_token == theirs.eos_token_id == theirs.encode(data.END)[0]


def test_words_end_where_ours_do(transformers, tmp_path, run):
    """Letters merge within words only. To the regular expressions of transformers ² and ½ belong to
    words, and the joiners of emoji do not; to tiktoken's it is the other way round.
    """
    odd = ["²", "³", "¹", "¼", "½", "¾", "\u200c", "\u200d", *"ⅧⒶ_é漢٣!-\u00ad\u0301"]
    tokens = dict.fromkeys(bytes([i]).decode("latin-1") for i in range(256))
    spelled = [("a" + letter).encode().decode("latin-1") for letter in odd]
    tokens |= dict.fromkeys(text[:i] for i in (2, 3, 4) for text in spelled)
    ours = data.build_tokenizer([*tokens])
    model = gpt.GPT(gpt.GPTConfig(ours.n_vocab, 8, n_layer=1, n_head=1, n_embd=8))
    gpt.save(tmp_path / "odd.pt", model, tokenizer=data.tokenizer_state(ours))
    run("export", tmp_path / "odd.pt", tmp_path / "folder")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert len({len(ours.encode_ordinary("a" + letter)) for letter in "½Ⅷ"}) == 2
    for letter in odd:
        assert ours.encode_ordinary("a" + letter) == theirs.encode("a" + letter), letter
    run("import", tmp_path / "folder", tmp_path / "back.pt")
    change_json(
        tmp_path / "folder" / "tokenizer.json",
        lambda whole: whole["pre_tokenizer"]["pretokenizers"][0].update(
            pattern={"Regex": data.PATTERN}
        ),
    )
    message = refusal(run, "import", tmp_path / "folder", tmp_path / "back.pt")
    assert "our tokenizer and transformers' differ on" in message


def test_generation_in_transformers_ends_where_ours_does(transformers, checkpoint, tmp_path, run):
    path, model, tokenizer = checkpoint
    end, prompts = tokenizer.eot_token, [[i] for i in range(60)]
    replies = model.generate(prompts, end, 30, temperature=0)
    run("export", path, tmp_path / "folder")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folder")
    for prompt, reply in zip(prompts, replies):
        ids = torch.tensor([prompt])
        full = theirs.generate(ids, attention_mask=ids**0, max_new_tokens=30, do_sample=False)
        assert full[0].tolist() == prompt + reply


@pytest.mark.parametrize("kind", ["village", "gpt2"])
def test_out_through_transformers_and_in_again_is_the_same_to_the_bit(
    transformers, checkpoint, their_folder, tmp_path, run, kind
):
    path = checkpoint[0]
    if kind == "gpt2":
        run("import", their_folder, path := tmp_path / "gpt2.pt")
    run("export", path, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "back")
    os.remove(tmp_path / "back" / "model.safetensors")
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").save_pretrained(
        tmp_path / "back"
    )
    run("import", tmp_path / "back", tmp_path / "back.pt")
    (model, state), (again, state_again) = gpt.load(path), gpt.load(tmp_path / "back.pt")
    assert state["tokenizer"] == state_again["tokenizer"] and model.config == again.config
    for weight, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("saved_by", ["us", "transformers"])
def test_transformers_asks_a_conversation_as_we_do(
    transformers, checkpoint, tmp_path, run, saved_by
):
    """The chat template gives the ids that fine-tuning scores and that sampling starts from."""
    _, model, tokenizer = checkpoint
    model = copy.deepcopy(model)
    model.learnt = {"conversations": True, "answer_tokens": 7}
    gpt.save(tmp_path / "chat.pt", model, tokenizer=data.tokenizer_state(tokenizer))
    run("export", tmp_path / "chat.pt", folder := tmp_path / "folder")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if saved_by == "transformers":  # as after a training there
        theirs.save_pretrained(folder)
        transformers.GenerationConfig.from_pretrained(folder).save_pretrained(folder)
    assert transformers.GenerationConfig.from_pretrained(folder).max_new_tokens == 7
    said = " Be kind.", "Who is Ada?\n", "(A smith)\n\n: so.", "‘Where’?"
    roles = "system", "user", "assistant", "user"
    messages = [{"role": role, "content": content} for role, content in zip(roles, said)]
    for start in (0, 1, 3):
        prompt, response = data.apply_template(messages[start:], " 1. By the hill!\n")
        ids, mask = data.encode(tokenizer, prompt, response)
        asked = theirs.apply_chat_template(messages[start:], add_generation_prompt=True)
        assert asked["input_ids"] == ids[: mask.index(True)]
        answer = {"role": "assistant", "content": " 1. By the hill!\n"}
        assert theirs.apply_chat_template([*messages[start:], answer])["input_ids"] == ids
    run("import", folder, tmp_path / "back.pt")
    assert gpt.load(tmp_path / "back.pt")[0].learnt == model.learnt


def test_an_export_of_texts_has_no_chat_template(transformers, checkpoint, tmp_path, run):
    run("export", checkpoint[0], tmp_path / "folder")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "folder").chat_template is None
    run("import", tmp_path / "folder", tmp_path / "back.pt")
    assert gpt.load(tmp_path / "back.pt")[0].learnt == {}


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is llama, but model.py has only gpt2"),
        ({"activation_function": "gelu"}, "activation_function is gelu, but model.py has only"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_inner": 95}, "n_inner is 95, but model.py has only 4 n_embd"),
        ({"n_head": 5}, "n_embd 24 is no multiple of n_head 5"),
        ({"n_layer": None}, "n_layer must be a positive integer, not None"),
        ({"n_positions": "32"}, "n_positions must be a positive integer, not 32"),
        ({"n_embd": 48}, "wte.weight has the shape"),
        ({"n_layer": 4}, "there is no h.3.ln_1.weight"),
        ({"n_layer": 2}, "model.py has no place for h.2.attn.c_attn.bias"),
        ({"vocab_size": 400}, "config.json's vocab_size is 400, but bytes and merges are 400"),
    ],
)
def test_another_model_is_refused_by_name(folder, run, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refusal(run, "import", folder, folder / "gpt2.pt")
    assert not (folder / "gpt2.pt").exists()


@pytest.mark.parametrize("n_inner", [None, 96])
def test_four_times_the_width_may_be_said_or_left_unsaid(folder, run, n_inner):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_inner": n_inner}))
    run("import", folder, folder / "gpt2.pt")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_a_missing_file_is_named(folder, run, name):
    (folder / name).unlink()
    message = refusal(run, "import", folder, folder / "gpt2.pt")
    assert message.startswith(f"cannot read {folder / name}: ")


@pytest.mark.parametrize(
    "name, message",
    [
        ("config.json", "config.json is no JSON object"),
        ("model.safetensors", "model.safetensors is cut short"),
        ("vocab.json", "vocab.json is no JSON object"),
    ],
)
def test_a_file_cut_short_is_named(folder, run, name, message):
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    assert message in refusal(run, "import", folder, folder / "gpt2.pt")


def test_merges_that_end_within_a_letter_are_named(folder, run):
    (folder / "merges.txt").write_bytes("#version: 0.2\nĠ t\nĠ".encode()[:-1])
    message = refusal(run, "import", folder, folder / "gpt2.pt")
    assert "merges.txt is not UTF-8: fetch it again" in message


def test_merges_that_are_too_few_are_counted(folder, run):
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:-5]), encoding="utf-8")
    message = refusal(run, "import", folder, folder / "gpt2.pt")
    assert "<|endoftext|> has the id 400" in message and "bytes and merges are 395" in message


@pytest.mark.parametrize("case", ["swapped", "gap", "text", "end first", "no end", "odd"])
def test_ids_that_are_not_the_merges_order_are_refused(folder, run, case):
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text())
    tokens = [*vocab]
    if case == "swapped":
        vocab[tokens[300]], vocab[tokens[301]] = 301, 300
    elif case == "gap":  # between the bytes, which may stand in any order, but not anywhere
        vocab[tokens[255]] = 500
    elif case == "text":
        vocab[tokens[0]] = "0"
    elif case == "end first":
        vocab = {data.END: 0} | {t: i + 1 for t, i in vocab.items() if t != data.END}
    elif case == "no end":
        del vocab[data.END]
    else:
        vocab["漢"] = vocab.pop(tokens[300])  # no letter of GPT-2's alphabet of bytes
    path.write_text(json.dumps(vocab))
    message = refusal(run, "import", folder, folder / "gpt2.pt")
    is_end = case in ("end first", "no end")
    assert ("has the id" if is_end else "the ids are not the order of the merges") in message


STEP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalizer": {"type": "NFC"}}, "our tokenizer has no normalizer NFC"),
        ({"pre_tokenizer": STEP | {"add_prefix_space": True}}, "no add_prefix_space true"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "no pre_tokenizer Metaspace"),
        ({"pre_tokenizer": None}, "no pre_tokenizer nothing"),
        ({"pre_tokenizer": {"pretokenizers": [{"type": "Digits"}, STEP]}}, "pre_tokenizer Digits"),
        ({"pre_tokenizer": {"pretokenizers": [STEP] * 3}}, "ByteLevel and ByteLevel and"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "our tokenizer has no model WordPiece"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "no byte_fallback True"),
        ({"model": None}, "tokenizer.json is no tokenizer.json"),
    ],
)
def test_what_our_tokenizer_cannot_be_is_refused_by_its_name(
    their_folder, folder, tmp_path, run, change, message
):
    run("import", their_folder, tmp_path / "first.pt")
    run("export", tmp_path / "first.pt", tmp_path / "out")
    shutil.copy(tmp_path / "out" / "tokenizer.json", folder)
    change_json(folder / "tokenizer.json", lambda whole: whole.update(change))
    assert message in refusal(run, "import", folder, tmp_path / "gpt2.pt")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("pattern", {"Regex": "(("}, "tiktoken cannot read its pre_tokenizer's pattern"),
        ("pattern", {"String": " "}, "our tokenizer splits only around a Regex"),
        ("behavior", "Removed", "our tokenizer splits only around a Regex"),
    ],
)
def test_a_pattern_that_cuts_otherwise_is_refused(
    transformers, checkpoint, tmp_path, run, field, value, message
):
    run("export", checkpoint[0], folder := tmp_path / "folder")
    change_json(
        folder / "tokenizer.json",
        lambda whole: whole["pre_tokenizer"]["pretokenizers"][0].update({field: value}),
    )
    assert message in refusal(run, "import", folder, tmp_path / "gpt2.pt")


def test_a_prefix_space_beside_merges_is_refused(folder, run):
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert "no add_prefix_space" in refusal(run, "import", folder, folder / "gpt2.pt")


def test_pickled_weights_are_named_and_not_read(folder, run):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(run, "import", folder, folder / "gpt2.pt")
    assert "pytorch_model.bin may hold code and is not read: save it as safetensors" in message


def test_a_head_of_its_own_and_a_tensor_too_many_are_refused(folder, run):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, path)
    assert "lm_head.weight must be wte.weight" in refusal(run, "import", folder, folder / "g.pt")
    save_file(tensors | {"score.weight": torch.zeros(2, 24)}, path)
    assert "has no place for score.weight" in refusal(run, "import", folder, folder / "g.pt")


def test_export_never_touches_a_folder_with_something_in_it(
    transformers, checkpoint, tmp_path, run
):
    (tmp_path / "empty").mkdir()
    run("export", checkpoint[0], tmp_path / "empty")  # an empty one is fine
    before = sorted((tmp_path / "empty").iterdir())
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "file"):
        message = refusal(run, "export", checkpoint[0], tmp_path / name)
        assert "exists and is not an empty folder: name another" in message
    assert sorted((tmp_path / "empty").iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_no_half_a_folder(transformers, checkpoint, tmp_path, run, monkeypatch):
    def full(path, content, write=Path.write_bytes):
        if path.name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    message = refusal(run, "export", checkpoint[0], tmp_path / "folder")
    assert message == f"cannot write {tmp_path / 'folder'}: No space left on device"
    assert not (tmp_path / "folder").exists()


def test_no_place_to_write_to_is_named(transformers, folder, checkpoint, tmp_path, run):
    (tmp_path / "file").write_text("")
    for arguments in (("import", folder), ("export", checkpoint[0])):
        message = refusal(run, *arguments, tmp_path / "file" / "x" / "y")
        assert message.startswith(f"cannot write {tmp_path / 'file' / 'x' / 'y'}: ")


def test_without_safetensors_one_line_says_how_to_get_it(checkpoint, tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    message = refusal(run, "export", checkpoint[0], tmp_path / "folder")
    assert message == "safetensors is missing: pip install -r requirements-peers.txt"
    assert not (tmp_path / "folder").exists()


def test_a_model_that_is_no_gpt2_any_more_is_named_in_one_line(run, tmp_path, monkeypatch):
    """A forker's RMSNorm: no bias where GPT-2 has one."""
    pytest.importorskip("safetensors")
    monkeypatch.setattr(torch.nn, "LayerNorm", torch.nn.RMSNorm)
    tokenizer = data.train_tokenizer(village.every_word(), village.VOCAB_SIZE)
    model = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, 64, n_layer=1, n_head=2, n_embd=8))
    gpt.save(tmp_path / "rms.pt", model, tokenizer=data.tokenizer_state(tokenizer))
    message = refusal(run, "export", tmp_path / "rms.pt", tmp_path / "folder")
    assert "model.py is no GPT-2 that transformers knows: see blocks.0.ln_1.bias" in message
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("arguments", [[], ["import"], ["export", "a", "b", "c"], ["inport", "a"]])
def test_usage(run, arguments):
    assert refusal(run, *arguments) == gpt2.USAGE


def test_a_missing_checkpoint_is_named(run, tmp_path):
    assert "there is no nowhere.pt" in refusal(run, "export", "nowhere.pt", tmp_path / "folder")
