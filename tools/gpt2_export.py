"""The way out of tools/gpt2.py: a checkpoint of ours -> a folder that transformers and TRL read.

Weights keep every bit, and texts their token ids, except where <|endoftext|> is typed in a text:
ours reads it as words. tokenizer.json also has the pattern that cuts a text into words.
"""

import itertools
import json
import os
from pathlib import Path

import data
from lab import runs

SIZES = {"vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer",
         "n_head": "n_head", "n_embd": "n_embd"}  # fmt: skip
# \w is not the same everywhere: transformers takes ² and ½ for letters, and tiktoken does not. So
# the export spells out what it means to tiktoken.
WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
FIXED = {  # the only values that model.py has, and what a missing entry means
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise SystemExit("safetensors is missing: pip install -r requirements-peers.txt")
    return safetensors


def weight_names(n_layer):
    """Our name of each weight -> (theirs, whether theirs is transposed)."""
    names = {name: (name, False) for name in ("wte.weight", "wpe.weight")}
    layers = {"ln_1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj",
              "ln_2": "ln_2", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}  # fmt: skip
    for i, (ours, theirs) in itertools.product(range(n_layer), layers.items()):
        # Their "Conv1D" computes x W where nn.Linear computes x Wᵀ.
        names[f"blocks.{i}.{ours}.weight"] = f"h.{i}.{theirs}.weight", "ln" not in ours
        names[f"blocks.{i}.{ours}.bias"] = f"h.{i}.{theirs}.bias", False
    return names | {name: (name, False) for name in ("ln_f.weight", "ln_f.bias")}


# How GPT-2's files write each byte: as itself if Latin-1 can print it, else from U+0100 on.
_spare = itertools.count(256)
LETTERS = [chr(b) if chr(b).isprintable() and b != 32 else chr(next(_spare)) for b in range(256)]


def spell(token):
    return "".join(LETTERS[byte] for byte in token)


def last_merge(token, ranks):
    """The two tokens that byte-pair encoding joins last to make this one of two bytes or more."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        i = min(range(len(joined)), key=lambda i: ranks.get(joined[i], len(ranks)))
        parts[i : i + 2] = [joined[i]]
    return parts


def tokenizer_files(tokenizer):
    """-> {file name: content} of a tokenizer that gives the same ids as ours."""
    end = tokenizer.eot_token
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(end)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [" ".join(map(spell, last_merge(t, ranks))) for t in tokens if len(t) > 1]
    spelling = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    pattern = {"Regex": data.tokenizer_state(tokenizer)["pattern"].replace(r"\w", WORD)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    steps = [split, spelling | {"use_regex": False}]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    whole = {
        "version": "1.0",
        "added_tokens": [{"id": end, "content": data.END, "special": True} | plain],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": spelling,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return {
        "tokenizer.json": whole,
        "vocab.json": vocab | {data.END: end},
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }


def config_files(config, end, learnt):
    """-> {file name: content} of what transformers has to know about model and tokenizer."""
    template = {"chat_template": data.JINJA_TEMPLATE} if learnt.get("conversations") else {}
    limit = {"max_new_tokens": learnt["answer_tokens"]} if "answer_tokens" in learnt else {}
    sizes = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    ends = {"bos_token_id": end, "eos_token_id": end}
    return {
        "config.json": {"architectures": ["GPT2LMHeadModel"]} | FIXED | sizes | no_dropout | ends,
        "generation_config.json": ends | limit,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": data.END,
            "eos_token": data.END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.block_size,
        }
        | template,
    }


def their_weights(model):
    """The content of model.safetensors, in bytes."""
    weights, names = model.state_dict(), weight_names(model.config.n_layer)
    if odd := {*names} ^ {*weights} - {"lm_head.weight"}:
        raise SystemExit(f"model.py is no GPT-2 that transformers knows: see {min(odd)}")
    tensors = {
        f"transformer.{theirs}": (weights[ours].T if transposed else weights[ours]).contiguous()
        for ours, (theirs, transposed) in names.items()
    }
    return safetensors().torch.save(tensors, metadata={"format": "pt"})


def export_folder(path, folder):
    model, tokenizer = runs.load_checkpoint(path)
    files = {"model.safetensors": their_weights(model)}
    files |= tokenizer_files(tokenizer) | config_files(
        model.config, tokenizer.eot_token, model.learnt
    )
    half = Path(f"{folder}.tmp")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SystemExit(f"{folder} exists and is not an empty folder: name another")
        half.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, dict):
                content = json.dumps(content, ensure_ascii=False, indent=1)
            (half / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(half, folder)
    except OSError as error:
        raise SystemExit(f"cannot write {folder}: {error.strerror}")
    print(f"wrote {', '.join(sorted(files))} to {folder}")
