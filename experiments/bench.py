"""How fast this is, how much memory it takes, and how both grow.

    python experiments/bench.py            a few minutes
    python experiments/bench.py --peer     beside TRL and transformers (requirements-peers.txt)

Each figure comes from a process of its own, so that its peak memory is its own too. Seconds hold
all that DPO needs from texts to the trained policy: tokens, the reference's pass, the loop. A
machine's speed drifts: compare figures within one run, best as ratios.

Model FLOPs of a response of T tokens, S of them scored, in L layers of width C, vocabulary V:
    L (24 C² T + 2 C T²) + 2 C V S
forward (products of matrices only; attention is causal, so half of T² counts), three times that
with the backward pass. Padding is work too, but no use, so it does not count. The peak is what
torch itself reaches on this machine, at products of two 1024 x 1024 matrices in float32.
"""

import copy
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
import data
import model as gpt
import train_dpo
from train_sft import read_config, run_command


@dataclass
class Config:
    peer: bool = False  # also TRL's DPOTrainer and transformers' generate
    growth: bool = False  # also batch, length, width and number of pairs, each over its range
    quick: bool = False  # toy sizes, to see that it runs


@dataclass
class Setting:
    n_layer: int = 2
    n_embd: int = 128
    pairs: int = 4096
    batch_size: int = 64
    length: int = 0  # tokens of a sequence, half of them prompt; 0: the village's own texts
    peer: bool = False


def peak_flops():
    """The machine's float32 matrix product, FLOP/s: the best of thirty."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(30):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds)


def start(setting):
    """-> (random reference, tokenizer, (prompt, chosen, rejected) texts)."""
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer(data.every_word(), data.VOCAB_SIZE)
    shape = max(128, setting.length), setting.n_layer, 4, setting.n_embd
    reference = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, *shape)).eval().requires_grad_(False)
    rng, words = random.Random(0), data.every_word().split()
    pairs = []
    for prompt in rng.choices(data.split_questions()[0], k=setting.pairs):
        chosen, rejected = rng.sample([*data.responses(prompt)], 2)
        if setting.length:  # a word is a token; the end of the text is one more
            half = setting.length // 2
            prompt = " ".join(rng.choices(words, k=half))
            chosen, rejected = (" " + " ".join(rng.choices(words, k=half - 1)) for _ in "cr")
        pairs.append((prompt, chosen, rejected))
    return reference, tokenizer, pairs


def flops(examples, config):
    """Model FLOPs of a forward pass over (ids, mask) examples."""
    c = config.n_embd
    blocks = sum(24 * c * c * len(ids) + 2 * c * len(ids) ** 2 for ids, _ in examples)
    return config.n_layer * blocks + 2 * c * config.vocab_size * sum(sum(m) for _, m in examples)


def time_dpo(setting):
    """Our own training -> figures."""
    reference, tokenizer, pairs = start(setting)
    policy = copy.deepcopy(reference).requires_grad_(True)
    peak, before = peak_flops(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    dataset = train_dpo.prepare_pairs(reference, tokenizer, pairs)
    prepared = time.perf_counter()
    config = train_dpo.Config(batch_size=setting.batch_size)
    optimizer = train_dpo.make_optimizer(policy, config)
    arguments = config, tokenizer.eot_token, train_dpo.loss_and_metrics, None
    for _ in train_dpo.train(policy, optimizer, dataset, *arguments):
        pass
    ended = time.perf_counter()
    examples = [example for side in dataset[0] for example in side]
    tokens = sum(len(ids) for ids, _ in examples)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "pairs/s": len(pairs) / (ended - started),
        "tokens/s": tokens / (ended - started),
        "pairs/s in the loop": len(pairs) / (ended - prepared),
        "share of peak in the loop": 3 * flops(examples, policy.config) / (ended - prepared) / peak,
        "peak memory, MB": after / 1024,
        "of it, for training": (after - before) / 1024,
    }


def time_generation(setting):
    """Our own generate(), 1,024 prompts at once -> tokens a second, padding not among them."""
    reference, tokenizer, pairs = start(replace(setting, pairs=1024))
    prompts = [tokenizer.encode_ordinary(prompt) for prompt, _, _ in pairs]
    started = time.perf_counter()
    replies = reference.generate(prompts, tokenizer.eot_token, 24)
    return {"generated tokens/s": sum(map(len, replies)) / (time.perf_counter() - started)}


# --------------------------------------------------------------------------------------------------
# The same by TRL and transformers


def export(setting, folder):
    """The same random model and pairs -> (what transformers loads, texts)."""
    from tools import gpt2

    reference, tokenizer, pairs = start(setting)
    gpt.save(f"{folder}/sft.pt", reference, tokenizer=data.tokenizer_state(tokenizer))
    gpt2.export_folder(f"{folder}/sft.pt", Path(folder) / "model")
    return Path(folder) / "model", pairs


def time_trl(setting):
    """DPOTrainer on the same weights and texts, everything included, at its own defaults but for
    what would slow it down here: no bfloat16, no recomputed activations."""
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2LMHeadModel
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        path, pairs = export(setting, folder)
        policy, reference = (GPT2LMHeadModel.from_pretrained(path) for _ in range(2))
        tokenizer = AutoTokenizer.from_pretrained(path)
        rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
        arguments = DPOConfig(
            folder, beta=0.5, per_device_train_batch_size=setting.batch_size, num_train_epochs=1,
            optim="sgd", learning_rate=6e-3, max_length=None, bf16=False, use_cpu=True,
            activation_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        dataset = Dataset.from_list(rows)
        started = time.perf_counter()
        trainer = DPOTrainer(
            policy, reference, arguments, train_dataset=dataset, processing_class=tokenizer
        )
        prepared = time.perf_counter()
        trainer.train()
        ended = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "pairs/s": len(pairs) / (ended - started),
        "pairs/s in the loop": len(pairs) / (ended - prepared),
        "peak memory, MB": memory,
    }


def time_transformers(setting):
    """generate() of transformers: the same weights, the same prompts, 24 new tokens at most."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        path, pairs = export(replace(setting, pairs=1024), folder)
        model, tokenizer = (
            GPT2LMHeadModel.from_pretrained(path),
            AutoTokenizer.from_pretrained(path),
        )
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
        started = time.perf_counter()
        batch = tokenizer([pair[0] for pair in pairs], return_tensors="pt", padding=True)
        prompt_length = batch["input_ids"].shape[1]
        replies = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            do_sample=True, top_k=0, max_new_tokens=24, pad_token_id=tokenizer.eos_token_id,
        )[:, prompt_length:]  # fmt: skip
        seconds = time.perf_counter() - started
    ended = (replies == tokenizer.eos_token_id).int().cumsum(1) > 1  # what only pads
    return {"generated tokens/s": (~ended).sum().item() / seconds}


# --------------------------------------------------------------------------------------------------


def measure(function, setting):
    """A function's figures, from a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, setting).result()


def show(label, figures):
    texts = (
        f"{name} {value:.0%}" if "share" in name else f"{name} {value:,.0f}"
        for name, value in figures.items()
    )
    print(f"{label}: " + ", ".join(texts), flush=True)


def compare(setting):
    """One size of model, ours and with --peer theirs."""
    size = f"{setting.n_layer} layers x {setting.n_embd}"
    ours = measure(time_dpo, setting) | measure(time_generation, setting)
    show(size, ours)
    if setting.peer:
        theirs = measure(time_trl, setting) | measure(time_transformers, setting)
        show(f"{size}, TRL {version('trl')} and transformers {version('transformers')}", theirs)
        ratios = (f"{name} {ours[name] / theirs[name]:.2f}" for name in theirs)
        print(f"{size}, ours over theirs: " + ", ".join(ratios), flush=True)


def main():
    config = read_config(Config, "bench.py")
    sizes = Setting(pairs=64 if config.quick else 4096, peer=config.peer)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for n_layer in (2, 4):
        compare(replace(sizes, n_layer=n_layer))
    if not config.growth:
        return
    small = replace(sizes, peer=False, pairs=64 if config.quick else 1024)
    tiny = replace(small, n_layer=1, n_embd=32)
    ranges = [
        [replace(small, batch_size=b) for b in (16, 64, 256)],
        [replace(small, length=t, batch_size=8, pairs=64) for t in (64, 256, 1024)],
        [replace(small, n_embd=c) for c in (64, 128, 256, 512)],
        [replace(tiny, pairs=n) for n in (1000, 10_000, 100_000)],
    ]
    for settings in ranges:
        for setting in settings[: 1 if config.quick else None]:
            show(str(setting), measure(time_dpo, setting))


if __name__ == "__main__":
    run_command(main)
