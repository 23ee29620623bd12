"""GPT-2 in and out, of any size: a local folder in Hugging Face's format <-> a checkpoint of ours.

    python tools/gpt2.py import FOLDER out/gpt2.pt   config.json, model.safetensors, vocab.json and
                                                     merges.txt -> what train_dpo.py --init takes
    python tools/gpt2.py export out/dpo.pt FOLDER    -> the same and tokenizer.json, which also has
                                                     the pattern: for transformers and TRL

Nothing is downloaded. Both ways, weights keep every bit and texts their token ids, but where a text
spells out <|endoftext|>, in which ours sees words. What transformers has trained comes back too, if
the export's vocab.json and merges.txt lie beside it. Needs safetensors (requirements-peers.txt).
"""

import itertools
import json
import os
import sys
from pathlib import Path

import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import model as gpt
from lab import flags, runs

USAGE = "gpt2.py: say `import FOLDER out/gpt2.pt` or `export out/dpo.pt FOLDER`"
SIZES = {"vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer",
         "n_head": "n_head", "n_embd": "n_embd"}  # fmt: skip
# \w is not the same everywhere: under transformers, ² and ½ are letters, and to tiktoken not. So
# it goes out spelled as what it is to tiktoken.
WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
FIXED = {  # what model.py has no other form of; where config.json says nothing, it means the same
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


def read_json(path):
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise SystemExit(f"{path} is no JSON object: fetch it again")
    return content


def read_config(path):
    """config.json -> GPTConfig, or the reason why model.py cannot be that model."""
    theirs = read_json(path)
    for name, value in FIXED.items():
        if theirs.get(name, value) != value:
            raise SystemExit(f"{path}: {name} is {theirs[name]}, but model.py has only {value}")
    for name in SIZES.values():
        if type(theirs.get(name)) is not int or theirs[name] < 1:
            raise SystemExit(f"{path}: {name} must be a positive integer, not {theirs.get(name)}")
    width, heads = theirs["n_embd"], theirs["n_head"]
    if width % heads:
        raise SystemExit(f"{path}: n_embd {width} is no multiple of n_head {heads}")
    if theirs.get("n_inner") not in (None, 4 * width):
        raise SystemExit(f"{path}: n_inner is {theirs['n_inner']}, but model.py has only 4 n_embd")
    return gpt.GPTConfig(**{ours: theirs[name] for ours, name in SIZES.items()})


def read_ranks(vocab, merges):
    """vocab.json and merges.txt -> {token in bytes: id}, without the end of the text."""
    # Else tiktoken copies a file, and when it has changed still reads the copy.
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:  # "clobber": the 256 single bytes may be in any order
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(merges), str(vocab), clobber_one_byte_tokens=True
        )
        ordered = sorted(ranks.values()) == [*range(len(ranks))]
    except OSError as error:
        raise SystemExit(f"cannot read {merges}: {error.strerror}")
    except (AssertionError, KeyError, TypeError, ValueError):
        ordered = False
    if not ordered:
        raise SystemExit(f"{vocab}: the ids are not the order of {merges.name}: fetch both again")
    return ranks


def read_pattern(path):
    """What cuts a text into words: the first step in tokenizer.json, as we write it, or GPT-2's."""
    try:
        step = read_json(path)["pre_tokenizer"]["pretokenizers"][0]
        return step["pattern"]["Regex"].replace(WORD, r"\w")
    except (KeyError, IndexError, TypeError):  # GPT-2's own leaves the pattern to the program
        return r50k_pat_str


def read_tokenizer(folder, vocab_size):
    vocab, whole = folder / "vocab.json", folder / "tokenizer.json"
    end = read_json(vocab).get(data.END)
    ranks = read_ranks(vocab, folder / "merges.txt")
    if end != len(ranks) or vocab_size != len(ranks) + 1:
        raise SystemExit(
            f"{folder}: config.json's vocab_size is {vocab_size}, but vocab.json has {len(ranks)} "
            f"tokens and {data.END} as {end}: it must be the last token, and nothing may follow"
        )
    tokens = [token.decode("latin-1") for token in sorted(ranks, key=ranks.get)]
    try:
        return data.build_tokenizer(tokens, read_pattern(whole) if whole.exists() else r50k_pat_str)
    except ValueError:
        raise SystemExit(f"{whole}: its pre_tokenizer's pattern is none that tiktoken can read")


def read_weights(path):
    """model.safetensors -> tensors by their names, without prefix and without buffers."""
    library = safetensors()
    try:
        tensors = library.torch.load_file(path)
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror or 'no such file'}")
    except library.SafetensorError:
        raise SystemExit(f"{path} is cut short or no safetensors file: fetch it again")
    return {
        name.removeprefix("transformer."): tensor
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # causal masks of old files
    }


def read_model(path, config):
    """model.safetensors -> model, or the name of a tensor that is missing, odd or not ours."""
    tensors, model = read_weights(path), gpt.GPT(config).eval()
    weights = model.state_dict()  # shares memory with the model
    head = tensors.pop("lm_head.weight", None)  # tied, so old files have it twice
    for ours, (theirs, transposed) in weight_names(config.n_layer).items():
        if theirs not in tensors:
            raise SystemExit(f"{path}: there is no {theirs}")
        tensor = tensors.pop(theirs)
        if head is not None and theirs == "wte.weight" and not torch.equal(head, tensor):
            raise SystemExit(f"{path}: lm_head.weight is not wte.weight, to which model.py ties it")
        tensor = tensor.mT if transposed and tensor.dim() == 2 else tensor
        if tensor.shape != weights[ours].shape:
            raise SystemExit(
                f"{path}: {theirs} has the shape {[*tensor.shape]} after transposing where that is "
                f"due, but config.json asks for {[*weights[ours].shape]}"
            )
        weights[ours].copy_(tensor)
    if tensors:
        raise SystemExit(f"{path}: model.py has no place for {min(tensors)}")
    return model


def read_learnt(folder):
    """What an export says that the model has learnt; of others nothing is known."""
    template = {}
    if (folder / "tokenizer_config.json").exists():
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if (folder / "chat_template.jinja").exists():  # where transformers itself writes it
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    limits = folder / "generation_config.json"
    limit = read_json(limits).get("max_new_tokens") if limits.exists() else None
    learnt = {"conversations": True} if template == data.JINJA_TEMPLATE else {}
    return learnt | ({"answer_tokens": limit} if type(limit) is int and limit > 0 else {})


def import_folder(folder, path):
    config = read_config(folder / "config.json")
    tokenizer = read_tokenizer(folder, config.vocab_size)
    model = read_model(folder / "model.safetensors", config)
    model.learnt = read_learnt(folder)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        gpt.save(path, model, tokenizer=data.tokenizer_state(tokenizer))
    except OSError as error:
        raise SystemExit(f"cannot write {path}: {error}")
    print(f"wrote {path}: {sum(p.numel() for p in model.parameters()):,} parameters")


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


def main():
    match sys.argv[1:]:
        case ["import", folder, path]:
            import_folder(Path(folder), path)
        case ["export", path, folder]:
            export_folder(path, Path(folder))
        case _:
            raise SystemExit(USAGE)


if __name__ == "__main__":
    flags.command(main)
