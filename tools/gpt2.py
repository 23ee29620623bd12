"""GPT-2 in and out, of any size: a local folder in Hugging Face's format <-> a checkpoint of ours.

    python tools/gpt2.py import FOLDER out/gpt2.pt   what train_sft.py and train_dpo.py --init take
    python tools/gpt2.py export out/dpo.pt FOLDER    what transformers and TRL read

A folder has config.json, model.safetensors, in shards or not, and tokenizer.json, or vocab.json and
merges.txt. Nothing is downloaded. Weights keep every bit, and texts their token ids: where
transformers is installed, the import compares some. Needs safetensors (requirements-peers.txt).
"""

import json
import random
import sys
from pathlib import Path

import torch
from tiktoken_ext.openai_public import r50k_pat_str

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import model as gpt
from lab import flags
from tools.gpt2_export import FIXED, LETTERS, SIZES, WORD, export_folder, safetensors, weight_names

USAGE = "gpt2.py: say `import FOLDER out/gpt2.pt` or `export out/dpo.pt FOLDER`"
OTHER_BPE = "byte_fallback continuing_subword_prefix dropout end_of_word_suffix ignore_merges"


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
    if theirs.get("activation_function") == "gelu_pytorch_tanh":  # another name of the same
        theirs["activation_function"] = "gelu_new"
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


def read_pattern(path, whole):
    """tokenizer.json -> the pattern that cuts a text into words, or the name of what else is done
    to a text, which our tokenizer cannot do."""
    model, steps = whole.get("model") or {}, whole.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type", "nothing") for step in steps]
    odd = [f"{name} {model[name]}" for name in OTHER_BPE.split() if model.get(name)]
    if model.get("type", "BPE") != "BPE":
        odd = [f"model {model['type']}"]
    if whole.get("normalizer"):
        odd.append(f"normalizer {whole['normalizer'].get('type')}")
    if kinds[-1] != "ByteLevel" or len(steps) > 2:
        odd.append(f"pre_tokenizer {' and '.join(kinds)}")
    elif steps[-1].get("add_prefix_space", True):
        odd.append("add_prefix_space true")
    elif len(steps) == 2 and (kinds[0] != "Split" or steps[-1].get("use_regex", True)):
        odd.append(f"pre_tokenizer {kinds[0]}")
    if odd:
        raise SystemExit(f"{path}: our tokenizer has no {odd[0]}")
    if len(steps) == 1:  # GPT-2's own leaves the pattern to the program
        return r50k_pat_str
    split = {"behavior": "Isolated", "invert": False} | steps[0]
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        raise SystemExit(f"{path}: our tokenizer splits only around a Regex")
    return split["pattern"]["Regex"].replace(WORD, r"\w")


def read_vocabulary(folder):
    """-> (the file, {token: id}, the pairs that are merged in their order, the pattern)."""
    path, merges = folder / "tokenizer.json", folder / "merges.txt"
    if path.exists():
        whole = read_json(path)
        try:
            pattern = read_pattern(path, whole)
            added = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
            vocab, pairs = whole["model"]["vocab"] | added, whole["model"]["merges"]
            pairs = [p.split(" ") if isinstance(p, str) else [*map(str, p)] for p in pairs]
            return path, vocab, pairs, pattern
        except (AttributeError, KeyError, TypeError):
            raise SystemExit(f"{path} is no tokenizer.json: fetch it again")
    path, options = folder / "vocab.json", folder / "tokenizer_config.json"
    if options.exists() and read_json(options).get("add_prefix_space"):
        raise SystemExit(f"{options}: our tokenizer has no add_prefix_space true")
    vocab = read_json(path)
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SystemExit(f"cannot read {merges}: {error.strerror}")
    except UnicodeDecodeError:
        raise SystemExit(f"{merges} is not UTF-8: fetch it again")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return path, vocab, pairs, r50k_pat_str


def read_tokenizer(folder, vocab_size):
    """-> our tokenizer. Its ids follow the merges' order. The end of the text comes after them,
    and rows beyond it, which no text reaches, may pad the vocabulary."""
    path, vocab, pairs, pattern = read_vocabulary(folder)
    count, end = 256 + len(pairs), vocab.get(data.END)
    if end != count or vocab_size <= count:
        raise SystemExit(
            f"{path}: {data.END} has the id {end}, and config.json's vocab_size is {vocab_size}, "
            f"but bytes and merges are {count} tokens: it must have the first id after these"
        )
    order = {letter: vocab.get(letter) for letter in LETTERS}  # bytes may stand in any order
    order |= {"".join(pair): 256 + i for i, pair in enumerate(pairs)}
    in_order = sorted(i for i in order.values() if type(i) is int) == [*range(count)]
    spelled = {letter: chr(byte) for byte, letter in enumerate(LETTERS)}
    if not in_order or any(vocab.get(t) != i or {*t} - {*spelled} for t, i in order.items()):
        raise SystemExit(f"{path}: the ids are not the order of the merges: fetch it again")
    tokens = ["".join(map(spelled.get, token)) for token in sorted(order, key=order.get)]
    try:
        return data.build_tokenizer(tokens, pattern)
    except ValueError:
        raise SystemExit(f"{path}: tiktoken cannot read its pre_tokenizer's pattern")


def compare_ids(folder, tokenizer):
    """Where transformers is installed, refuse a tokenizer that gives other ids on odd texts."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return
    try:  # the length only keeps it from warning of long texts
        theirs = AutoTokenizer.from_pretrained(folder, model_max_length=10**6)
    except Exception as error:  # of any class, for any file in the folder
        reason = str(error).strip().split("\n")[0]
        print(f"token ids were not compared: transformers cannot read {folder}: {reason}")
        return
    rng = random.Random(0)
    pieces = [*" aeinorstAZ019_.,!?'-\n\t\r\u00a0\u200d²½Ⅷéß漢щ👩", "'s", "  ", " the", "e\u0301"]
    for _ in range(400):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 30)))
        if theirs.encode(text, add_special_tokens=False) != tokenizer.encode_ordinary(text):
            raise SystemExit(f"{folder}: our tokenizer and transformers' differ on {text!r}")
    print("token ids are those of transformers on 400 odd texts")


def read_weights(folder):
    """model.safetensors, or its shards -> tensors by their names, without prefix and buffers."""
    library, index = safetensors(), folder / "model.safetensors.index.json"
    paths = [folder / "model.safetensors"]
    if index.exists() and not paths[0].exists():
        paths = [folder / name for name in sorted({*read_json(index)["weight_map"].values()})]
    if not paths[0].exists() and (pickled := sorted(folder.glob("*.bin"))):
        raise SystemExit(
            f"{pickled[0]} may hold code and is not read: save it as safetensors, as transformers' "
            "save_pretrained does"
        )
    tensors = {}
    for path in paths:
        try:
            tensors |= library.torch.load_file(path)
        except OSError as error:
            raise SystemExit(f"cannot read {path}: {error.strerror or 'no such file'}")
        except library.SafetensorError:
            raise SystemExit(f"{path} is cut short or no safetensors file: fetch it again")
    return {
        name.removeprefix("transformer."): tensor
        for name, tensor in tensors.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # causal masks of old files
    }


def read_model(folder, config):
    """-> model, or the name of a tensor that is missing, odd or not ours."""
    tensors, model = read_weights(folder), gpt.GPT(config).eval()
    weights = model.state_dict()  # shares memory with the model
    head = tensors.pop("lm_head.weight", None)  # tied, so old files have it twice
    for ours, (theirs, transposed) in weight_names(config.n_layer).items():
        if theirs not in tensors:
            raise SystemExit(f"{folder}: there is no {theirs}")
        tensor = tensors.pop(theirs)
        if theirs == "wte.weight":
            if head is not None and not torch.equal(head, tensor):
                raise SystemExit(f"{folder}: lm_head.weight must be wte.weight, as in model.py")
            if len(tensor) > config.vocab_size:
                rows = len(tensor) - config.vocab_size
                print(f"left out: {rows} rows of wte.weight, after {data.END}, which no text has")
                tensor = tensor[: config.vocab_size]
        tensor = tensor.mT if transposed and tensor.dim() == 2 else tensor
        if tensor.shape != weights[ours].shape:
            raise SystemExit(
                f"{folder}: {theirs} has the shape {[*tensor.shape]} after transposing where that "
                f"is due, but config.json asks for {[*weights[ours].shape]}"
            )
        weights[ours].copy_(tensor)
    if tensors:
        raise SystemExit(f"{folder}: model.py has no place for {min(tensors)}")
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
    compare_ids(folder, tokenizer)
    config.vocab_size = tokenizer.n_vocab
    model = read_model(folder, config)
    model.learnt = read_learnt(folder)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        gpt.save(path, model, tokenizer=data.tokenizer_state(tokenizer))
    except OSError as error:
        raise SystemExit(f"cannot write {path}: {error}")
    print(f"wrote {path}: {sum(p.numel() for p in model.parameters()):,} parameters")


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
