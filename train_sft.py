"""Pretrain on stories, then fine-tune on question -> answer: the model that DPO starts from.

    python train_sft.py                                  the village, a minute on two cores
    python train_sft.py --corpus my.txt --sft my.jsonl   your text and {"prompt", "response"} lines

Writes out/pretrained.pt and out/sft.pt.
"""

import argparse
import math
import os
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

import data
import model as gpt
from evaluate import progress


@dataclass
class Config:
    seed: int = 0
    out: str = "out"  # folder for checkpoints
    corpus: str = ""  # own text to pretrain on; goes with --sft
    sft: str = ""  # own {"prompt", "response"} lines to fine-tune on
    skip_bad: bool = False  # count bad lines and go on
    vocab_size: int = data.VOCAB_SIZE
    block_size: int = 128
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128
    pretrain_steps: int = 500
    pretrain_lr: float = 5e-3
    context: int = 64  # tokens of a pretraining row
    steps: int = 800  # of fine-tuning
    lr: float = 3e-3
    batch_size: int = 64  # examples a step; of pretraining rows, half as many
    device: str = "auto"
    dtype: str = "float32"  # bfloat16 autocasts the forward pass
    compile: bool = False


def read_config(cls, script, **defaults):
    """The dataclass's fields as flags of the same names; a mistake ends the run in one line.

    defaults: in place of the dataclass's own.
    """

    def refuse(message):
        raise SystemExit(f"{script}: {message}")

    parser = argparse.ArgumentParser(prog=script, allow_abbrev=False)
    parser.error = refuse
    for field in fields(cls):
        flag = "--" + field.name.strip("_").replace("_", "-")
        default = defaults.get(field.name, field.default)
        if field.type is bool:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(
                flag, dest=field.name, type=field.type, default=default, metavar=default
            )
    config = cls(**vars(parser.parse_args()))
    for field in fields(cls):
        value, may_be_zero = getattr(config, field.name), field.name in ("seed", "momentum")
        limit = {"seed": 2**63, "momentum": 1}.get(field.name, math.inf)
        if field.type in (int, float) and not (0 < value < limit or may_be_zero and value == 0):
            below = f" and below {limit}" if limit < math.inf else ""
            refuse(
                f"--{field.name.strip('_').replace('_', '-')} must be positive{below}, not {value}"
            )
    for name, known in (("dtype", ("float32", "bfloat16")), ("optimizer", ("sgd", "adamw"))):
        if getattr(config, name, known[0]) not in known:
            refuse(f"--{name} must be {' or '.join(known)}, not {getattr(config, name)}")
    return config


def prepare(config):
    """Print the config, seed torch, prove that --out can be written -> the device."""
    print("config:", *(f"{name}={value}" for name, value in vars(config).items() if value != ""))
    torch.manual_seed(config.seed)
    try:
        os.makedirs(config.out, exist_ok=True)
        probe = os.path.join(config.out, ".writable")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as error:
        raise SystemExit(f"cannot write to --out {config.out}: {error.strerror}")
    name = config.device
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise SystemExit(f"--device {name} is not available here; --device cpu is")
    return torch.device(name)


def set_speed(model, config, device):
    """What --dtype and --compile ask for; generate() stays as it is."""
    if config.dtype == "bfloat16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    if config.compile:
        model.compile()


def token_losses(model, ids, mask):
    """Cross-entropy of each scored token: ids, mask (B, T) -> (number of scored tokens,)."""
    scored = mask[:, 1:]
    return F.cross_entropy(model(ids)[:, :-1][scored].float(), ids[:, 1:][scored], reduction="none")


@torch.no_grad()
def mean_loss(model, ids, mask, device):
    chunks = zip(ids.to(device).split(256), mask.to(device).split(256))
    return torch.cat([token_losses(model, *chunk) for chunk in chunks]).mean().item()


def schedule(step, steps):
    """Share of the full learning rate: linear warm-up over a twentieth, then a cosine to zero."""
    warmup = steps // 20
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def train(model, draw, steps, lr, weight_decay, device, label):
    """AdamW; draw() gives a batch -> the mean loss of the last 50."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay
    )
    recent = []
    bar = progress(range(steps), label)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps)
        ids, mask = draw()
        loss = token_losses(model, ids.to(device), mask.to(device)).mean()
        if not loss.isfinite():
            raise SystemExit(
                f"{label}: the loss is {loss.item()} at step {step}; try a smaller rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-49:], loss.item()]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
    return sum(recent) / len(recent)


def cut_rows(tokenizer, texts, context):
    """Texts, each closed by end-of-text, laid end to end and cut -> ids (N, context + 1)."""
    stream = [i for text in texts for i in [*tokenizer.encode_ordinary(text), tokenizer.eot_token]]
    if len(stream) <= context:
        raise SystemExit(
            f"the corpus, or the tenth of it that is held out, has only {len(stream)} tokens: "
            f"give more text, or a --context below {context}"
        )
    return torch.tensor(stream).unfold(0, context + 1, context)


@torch.no_grad()
def share_true(model, tokenizer, questions):
    """The share of village questions whose likeliest answer is true, whatever its manners."""
    prompts = [tokenizer.encode_ordinary(question) for question in questions]
    replies = model.generate(prompts, tokenizer.eot_token, 24, temperature=0)
    texts = [tokenizer.decode(reply[:-1]) for reply in replies]
    truths = [next(a for a, side in data.answers(q).items() if side == 1) for q in questions]
    return sum(truth in text for truth, text in zip(truths, texts)) / len(questions)


def check_sizes(config):
    """Refuse in one line what would fail later in many."""
    if bool(config.corpus) != bool(config.sft):
        raise SystemExit("train_sft.py: --corpus and --sft go together: give both, or neither")
    if config.n_embd % config.n_head:
        raise SystemExit(f"--n-embd {config.n_embd} is no multiple of --n-head {config.n_head}")
    if config.context > config.block_size:
        raise SystemExit(f"--context {config.context} exceeds --block-size {config.block_size}")


def village_texts(config):
    """-> (stories, held-out stories, demonstrations, held-out demonstrations)."""
    train_questions, held_out, _ = data.split_questions()
    unseen = config.seed + 1  # another seed than the training text's
    tokens = config.pretrain_steps * (config.batch_size // 2 or 1) * config.context
    return (
        data.stories(200 + tokens // 35, config.seed),  # of some 37 tokens: enough for one epoch
        data.stories(500, unseen),
        data.demonstrations(train_questions, config.steps * config.batch_size, config.seed),
        data.demonstrations(held_out, 1000, unseen),
    )


def own_corpus(path):
    """-> (nine tenths of the file, the last tenth), each a list of one text."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: not UTF-8 at byte {error.start}")
    border = len(text) * 9 // 10
    return [text[:border]], [text[border:]]


def own_demonstrations(config, tokenizer):
    """-> (demonstrations, demonstrations held out), each a list of (prompt, response)."""
    fields = ("prompt", "response")
    lines = data.read_jsonl(config.sft, fields, tokenizer, config.block_size, config.skip_bad)
    return data.hold_out(lines, config.sft)


def pretrain(model, tokenizer, corpus, held_corpus, config, device):
    """Next-token prediction on rows of the corpus."""
    rows, held_rows = (
        cut_rows(tokenizer, texts, config.context) for texts in (corpus, held_corpus)
    )
    picks = data.batches(len(rows), config.batch_size // 2 or 1, config.pretrain_steps, config.seed)

    def draw():
        ids = rows[next(picks)]
        return ids, torch.ones_like(ids, dtype=torch.bool)

    loss = train(model, draw, config.pretrain_steps, config.pretrain_lr, 0.1, device, "pretrain")
    held = mean_loss(model, held_rows, torch.ones_like(held_rows, dtype=torch.bool), device)
    print(f"pretrained: loss {loss:.3f} nats a token, held out {held:.3f}")


def finetune(model, tokenizer, examples, held_out, config, device):
    """Next-token prediction on responses, given their prompts.

    Without weight decay: decay keeps what is certain a little uncertain, and DPO suffers from
    nothing as much as from a reference that leaks (README, "What holds DPO back").
    """
    print("one example, scored tokens marked:", data.paint(tokenizer, *examples[0]))
    picks = data.batches(len(examples), config.batch_size, config.steps, config.seed)

    def draw():
        return data.collate([examples[i] for i in next(picks)], tokenizer.eot_token)

    loss = train(model, draw, config.steps, config.lr, 0, device, "fine-tune")
    held_loss = mean_loss(model, *data.collate(held_out, tokenizer.eot_token), device)
    print(f"fine-tuned: loss {loss:.3f} nats a response token, held out {held_loss:.3f}")


def main():
    config = read_config(Config, "train_sft.py")
    check_sizes(config)
    device = prepare(config)
    if config.sft:
        corpus, held_corpus = own_corpus(config.corpus)
        own_demonstrations(config, None)  # bad lines first: learning a tokenizer takes a while
        words = corpus[0]
        print("learning the tokenizer")
    else:
        corpus, held_corpus, demos, held_demos = village_texts(config)
        words = data.every_word()
    try:
        tokenizer = data.train_tokenizer(words, config.vocab_size)
    except ValueError as error:
        raise SystemExit(f"--vocab-size {config.vocab_size}: {error}")
    if config.sft:
        demos, held_demos = own_demonstrations(config, tokenizer)
    examples, held_examples = (
        [data.encode(tokenizer, *demo) for demo in part] for part in (demos, held_demos)
    )
    longest = max(len(ids) for ids, _ in examples + held_examples)
    if longest > config.block_size:
        raise SystemExit(f"--block-size {config.block_size} is too small: {longest} are needed")
    shape = config.block_size, config.n_layer, config.n_head, config.n_embd
    model = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, *shape)).to(device)
    set_speed(model, config, device)
    size = sum(p.numel() for p in model.parameters())
    print(f"model: {size:,} parameters; tokenizer: {tokenizer.n_vocab} tokens")
    vocabulary = data.tokenizer_state(tokenizer)

    pretrain(model, tokenizer, corpus, held_corpus, config, device)
    gpt.save(f"{config.out}/pretrained.pt", model, tokenizer=vocabulary)
    finetune(model, tokenizer, examples, held_examples, config, device)
    gpt.save(f"{config.out}/sft.pt", model, tokenizer=vocabulary)
    if not config.sft:
        _, held_out, never = data.split_questions()
        print(
            f"likeliest answer true: {share_true(model, tokenizer, held_out):.0%} of held-out "
            f"questions, {share_true(model, tokenizer, never):.0%} of those on facts never asked"
        )
    print(f"wrote pretrained.pt and sft.pt to {config.out}/; next: python train_dpo.py")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the files already written are whole")
