"""How fast this is, how much memory it takes, and how both grow.

    python experiments/bench.py             two minutes
    python experiments/bench.py --peer      beside TRL and transformers (requirements-peers.txt)
    python experiments/bench.py --growth    with batch, length, width and number of pairs
    python experiments/bench.py --gpt2      GPT-2 124M at 512 tokens, on a GPU if there is one

Each figure has a process, and so a peak memory, of its own. Seconds are those from texts to the
trained policy. Ours and theirs run in turn, three times: medians, and of --growth the fastest.
The last three keep their figures in experiments/results/, in bench, growth and gpt2.
FLOPs of a response of T tokens, S of them scored, in L layers of width C, vocabulary V, forward:
    L (24 C² T + 2 C T²) + 2 C V S    (matrix products; attention is causal, so T²/2 count)
and twice that backward. The peak is that of products of two 1024 x 1024 matrices. The model is
random and ends no response before its 24th token.
"""

import copy
import itertools
import multiprocessing
import random
import resource
import statistics
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
from experiments import results
from lab import flags, village
from lab.flags import flag
from responses import sample_responses


@dataclass
class Config:
    peer: bool = flag(False, "also TRL's DPOTrainer and transformers' generate")
    growth: bool = flag(False, "instead a range of batches, lengths, widths and numbers of pairs")
    gpt2: bool = flag(False, "instead GPT-2 124M at 512 tokens: needs 8 GB")
    rounds: int = flag(3, "measurements of each figure")


@dataclass
class Setting:
    n_layer: int = 2
    n_embd: int = 128
    pairs: int = 2048
    batch_size: int = 64
    grad_accum: int = 1
    vocab_size: int = 0  # 0: the village's
    length: int = 0  # tokens of a sequence, half of them prompt; 0: the village's own texts
    device: str = "cpu"
    dtype: str = "float32"


def peak_flops():
    """The machine's float32 matrix product, FLOP/s: the best of thirty."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(30):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds)


def peak_memory():
    """This process's so far, in MB; the GPU's memory if it uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def start(setting):
    """-> (random reference, tokenizer, (prompt, chosen, rejected) texts)."""
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer(village.every_word(), village.VOCAB_SIZE)
    shape = max(128, setting.length), setting.n_layer, max(4, setting.n_embd // 64), setting.n_embd
    vocab_size = setting.vocab_size or tokenizer.n_vocab
    reference = gpt.GPT(gpt.GPTConfig(vocab_size, *shape)).eval().requires_grad_(False)
    reference = reference.to(setting.device)
    reference.autocast_bfloat16 = setting.dtype == "bfloat16"
    rng, words = random.Random(0), [f" {word}" for word in village.every_word().split()]
    words = [word for word in words if len(tokenizer.encode_ordinary(word)) == 1]
    pairs = []
    for prompt in rng.choices(village.split_questions()[0], k=setting.pairs):
        chosen, rejected = rng.sample([*village.responses(prompt)], 2)
        if setting.length:  # the end of the text is one token more
            half = setting.length // 2
            prompt, chosen, rejected = (
                "".join(rng.choices(words, k=count)) for count in (half, half - 1, half - 1)
            )
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
    config = train_dpo.Config(batch_size=setting.batch_size, grad_accum=setting.grad_accum)

    def train(texts):
        policy = copy.deepcopy(reference).requires_grad_(True)
        pairs = train_dpo.add_reference_logps(reference, tokenizer, texts)
        prepared = time.perf_counter()
        optimizer = train_dpo.make_optimizer(policy, config)
        for _ in train_dpo.train(policy, optimizer, pairs, config):
            pass
        return pairs.chosen + pairs.rejected, prepared

    train(pairs[: 2 * setting.batch_size])  # the first steps of a process are slow
    peak, before = peak_flops(), peak_memory()
    started = time.perf_counter()
    examples, prepared = train(pairs)
    ended = time.perf_counter()
    tokens, looped = sum(len(ids) for ids, _ in examples), ended - prepared
    return {
        "pairs/s": len(pairs) / (ended - started),
        "tokens/s": tokens / (ended - started),
        "pairs/s in the loop": len(pairs) / looped,
        "share of peak in the loop": 3 * flops(examples, reference.config) / looped / peak,
        "peak memory, MB": peak_memory(),
        "of it since the texts": peak_memory() - before,
    }


def time_generation(setting):
    """Our own sampling of 1,024 responses, 512 at once -> tokens per second."""
    reference, tokenizer, pairs = start(replace(setting, pairs=1024))
    prompts = [prompt for prompt, _, _ in pairs]
    started = time.perf_counter()
    examples, _ = sample_responses(reference, tokenizer, prompts, train_dpo.Config(), "")
    seconds = time.perf_counter() - started
    return {"generated tokens/s": sum(sum(mask) for _, mask in examples) / seconds}


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
        tokenizer = AutoTokenizer.from_pretrained(path)
        arguments = DPOConfig(
            folder, beta=0.5, per_device_train_batch_size=setting.batch_size, num_train_epochs=1,
            optim="sgd", learning_rate=6e-3, max_length=None, bf16=False, use_cpu=True,
            activation_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        for part in (pairs[: 2 * setting.batch_size], pairs):  # the first steps are slow, as ours
            policy, reference = (GPT2LMHeadModel.from_pretrained(path) for _ in range(2))
            rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in part]
            dataset = Dataset.from_list(rows)
            started = time.perf_counter()
            trainer = DPOTrainer(
                policy, reference, arguments, train_dataset=dataset, processing_class=tokenizer
            )
            prepared = time.perf_counter()
            trainer.train()
            ended = time.perf_counter()
    return {
        "pairs/s": len(pairs) / (ended - started),
        "pairs/s in the loop": len(pairs) / (ended - prepared),
        "peak memory, MB": peak_memory(),
    }


def time_transformers(setting):
    """generate() of transformers: the same weights, the same prompts, 24 new tokens at most."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        path, pairs = export(replace(setting, pairs=1024), folder)
        model = GPT2LMHeadModel.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
        tokens, started = 0, time.perf_counter()
        for rows in (pairs[:512], pairs[512:]):
            batch = tokenizer([row[0] for row in rows], return_tensors="pt", padding=True)
            replies = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                do_sample=True, top_k=0, max_new_tokens=24, pad_token_id=tokenizer.eos_token_id,
            )[:, batch["input_ids"].shape[1] :]  # fmt: skip
            tokenizer.batch_decode(replies)
            only_pads = (replies == tokenizer.eos_token_id).int().cumsum(1) > 1
            tokens += (~only_pads).sum().item()
        return {"generated tokens/s": tokens / (time.perf_counter() - started)}


def measure(functions, setting):
    """The figures of some functions, each from a fresh process."""
    context, figures = multiprocessing.get_context("spawn"), {}
    for function in functions:
        with ProcessPoolExecutor(1, context) as pool:
            figures |= pool.submit(function, setting).result()
    return figures


def medians(rounds):
    return {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}


def show(label, rounds):
    """The median of every figure."""
    texts = []
    for name, value in medians(rounds).items():
        digits = 1 if value < 10 else 0
        texts.append(f"{name} {value:.0%}" if "share" in name else f"{name} {value:,.{digits}f}")
    print(f"{label}: " + ", ".join(texts), flush=True)


def compare(setting, config):
    """One size of model, ours and with --peer theirs. What it finds beside the peer is kept in
    experiments/results/bench/."""
    size = f"{setting.n_layer} layers x {setting.n_embd}"
    ours, theirs = [], []
    for _ in range(config.rounds):
        ours.append(measure((time_dpo, time_generation), setting))
        if config.peer:
            theirs.append(measure((time_trl, time_transformers), setting))
    show(size, ours)
    if config.peer:
        names = f"TRL {version('trl')} and transformers {version('transformers')}"
        show(f"{size}, {names}", theirs)
        kept = {"share of peak in the loop": medians(ours)["share of peak in the loop"]}
        for name in theirs[0]:
            ratios = sorted(mine[name] / their[name] for mine, their in zip(ours, theirs))
            kept[name] = statistics.median(ratios), ratios[0], ratios[-1]
            print(
                f"{size}, {name}: ours over theirs {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )
        keep("bench", size, kept)


def grow(config):
    """Training over a range of each size, one at a time."""
    small = Setting(pairs=1024)
    tiny = replace(small, n_layer=1, n_embd=32)
    ranges = {
        "batch_size": [replace(small, batch_size=b) for b in (16, 64, 256)],
        "length": [
            replace(small, length=t, batch_size=8, pairs=2**16 // t) for t in (64, 256, 1024)
        ],
        "n_embd": [replace(small, n_embd=c) for c in (64, 128, 256, 512)],
        "pairs": [replace(tiny, pairs=n) for n in (4000, 20_000, 100_000)],
    }
    for name, settings in ranges.items():
        for setting in settings:
            rounds = [measure((time_dpo,), setting) for _ in range(config.rounds)]
            fastest = max(rounds, key=lambda figures: figures["pairs/s"])
            show(f"{name} {getattr(setting, name):,}", [fastest])
            keep("growth", f"{name} {getattr(setting, name)}", fastest)


def run_gpt2():
    """Speed and memory of steps over four pairs, in one pass and in four, in both dtypes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = 64 if device == "cuda" else 4
    gpt2 = Setting(12, 768, pairs, batch_size=4, vocab_size=50257, length=512, device=device)
    for dtype, grad_accum in itertools.product(("float32", "bfloat16"), (1, 4)):
        setting = replace(gpt2, dtype=dtype, grad_accum=grad_accum)
        figures = measure((time_dpo,), setting)
        figures = {name: figures[name] for name in ("pairs/s in the loop", "peak memory, MB")}
        name = f"GPT-2 on a {device}, {dtype}, --grad-accum {grad_accum}"
        show(name, [figures])
        keep("gpt2", name, figures)


def keep(study, name, figures):
    results.keep(study, 0, "", name, figures, ("experiments/bench",))


def main():
    config = flags.read_config(Config, "bench.py")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {config.rounds} rounds")
    if config.growth:
        return grow(config)
    if config.gpt2:
        return run_gpt2()
    for n_layer in (2, 4):
        compare(Setting(n_layer), config)


if __name__ == "__main__":
    flags.command(main)
