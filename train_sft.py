"""Pretrain on stories, then fine-tune on question -> answer: the model that DPO starts from.

    python train_sft.py                                  the village, a minute on two cores
    python train_sft.py --corpus my.txt --sft my.jsonl   your text and {"prompt", "response"} lines
    python train_sft.py --resume                         go on where a run was interrupted

Writes out/pretrained.pt and out/sft.pt; while it runs, what --resume needs in out/*.part.pt.
"""

import argparse
import hashlib
import math
import os
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F

import data
import evaluate
import model as gpt


@dataclass
class Config:
    seed: int = 0
    out: str = "out"  # folder for checkpoints
    corpus: str = ""  # own text to pretrain on; goes with --sft
    sft: str = ""  # own {"prompt", "response"} lines to fine-tune on
    skip_bad: bool = False  # count bad lines and go on
    resume: bool = False  # from the last saved state of the same run
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


def run_command(main, hint="the files already written are whole"):
    """Run a script; Ctrl-C, or a disk that is full, ends it in one line."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted; {hint}")
    except OSError as error:
        raise SystemExit(f"{error}; {hint}")


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


def identify(config, *texts):
    """What a resumed run must share with the interrupted one: its settings and its data."""
    settings = {name: value for name, value in vars(config).items() if name != "resume"}
    return settings | {"data": hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}


def last_state(paths, run, device):
    """The first of these checkpoints that identify() knows as this run's -> (path, its dict)."""
    found = f"there is no {' or '.join(paths)}"
    for path in filter(os.path.exists, paths):
        try:
            _, state = gpt.load(path, device)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--resume: {error}")
        was = state.get("run", {})
        other = [name for name in run if was.get(name) != run[name]]
        if not other:
            return path, state
        change = f"{other[0]} was {was.get(other[0], 'not noted')}, is {run[other[0]]}"
        found = f"{path} is of another run: {change}"
    raise SystemExit(f"--resume: {found}. Without the flag, a run starts from the beginning")


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


def train(model, draw, steps, lr, weight_decay, device, label, save=None, progress=None):
    """AdamW; draw() gives a batch -> the mean loss of the last 50.

    save(progress) is called ten times on the way; given what it got, training goes on from there.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay
    )
    recent, done = [], 0
    if progress:
        recent, done = progress["recent"], progress["step"]
        optimizer.load_state_dict(progress["optimizer"])
        for _ in range(done):
            draw()  # the batches that have been used
    bar = evaluate.progress(range(done, steps), label)
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
        if save and (step + 1) * 10 // steps > step * 10 // steps:
            save({"step": step + 1, "recent": recent, "optimizer": optimizer.state_dict()})
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


def pretrain(model, tokenizer, corpus, held_corpus, config, device, save, progress):
    """Next-token prediction on rows of the corpus."""
    rows, held_rows = (
        cut_rows(tokenizer, texts, config.context) for texts in (corpus, held_corpus)
    )
    picks = data.batches(len(rows), config.batch_size // 2 or 1, config.pretrain_steps, config.seed)

    def draw():
        ids = rows[next(picks)]
        return ids, torch.ones_like(ids, dtype=torch.bool)

    steps, lr = config.pretrain_steps, config.pretrain_lr
    loss = train(model, draw, steps, lr, 0.1, device, "pretrain", save, progress)
    held = mean_loss(model, held_rows, torch.ones_like(held_rows, dtype=torch.bool), device)
    save()
    print(f"pretrained: loss {loss:.3f} nats a token, held out {held:.3f}")


def finetune(model, tokenizer, examples, held_out, config, device, save, progress):
    """Next-token prediction on responses, given their prompts.

    Without weight decay: decay keeps what is certain a little uncertain, and DPO suffers from
    nothing as much as from a reference that leaks (README, "What holds DPO back").
    """
    print("one example, scored tokens marked:", data.paint(tokenizer, *examples[0]))
    picks = data.batches(len(examples), config.batch_size, config.steps, config.seed)

    def draw():
        return data.collate([examples[i] for i in next(picks)], tokenizer.eot_token)

    loss = train(model, draw, config.steps, config.lr, 0, device, "fine-tune", save, progress)
    held_loss = mean_loss(model, *data.collate(held_out, tokenizer.eot_token), device)
    save()
    print(f"fine-tuned: loss {loss:.3f} nats a response token, held out {held_loss:.3f}")


def resume(model, run, config, device):
    """Take up the weights of an interrupted run -> which checkpoint's, and train()'s progress."""
    stages = "sft.part", "pretrained.part", "sft", "pretrained"
    paths = [f"{config.out}/{stage}.pt" for stage in stages]
    path, state = last_state(paths, run, device)
    stage = stages[paths.index(path)]
    if stage == "sft":
        raise SystemExit(f"--resume: {path} is of this very run, and finished")
    model.load_state_dict(state["weights"])
    progress = state.get("progress")
    print(f"resumed from {path}", f"step {progress['step']}" if progress else "", sep=", ")
    return stage, progress


def save_stage(path, model, kept, progress=None):
    """The state of an unfinished stage in PATH.part.pt, or its finished model in PATH.pt."""
    if progress:
        gpt.save(f"{path}.part.pt", model, progress=progress, **kept)
    else:
        gpt.save(f"{path}.pt", model, **kept)
        os.remove(f"{path}.part.pt")


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
    kept = {"tokenizer": data.tokenizer_state(tokenizer), "run": identify(config, corpus, demos)}

    stage, progress = None, None
    if config.resume:
        stage, progress = resume(model, kept["run"], config, device)
    if stage in (None, "pretrained.part"):
        save = partial(save_stage, f"{config.out}/pretrained", model, kept)
        pretrain(model, tokenizer, corpus, held_corpus, config, device, save, progress)
        progress = None
    save = partial(save_stage, f"{config.out}/sft", model, kept)
    finetune(model, tokenizer, examples, held_examples, config, device, save, progress)
    if not config.sft:
        _, held_out, never = data.split_questions()
        print(
            f"likeliest answer true: {share_true(model, tokenizer, held_out):.0%} of held-out "
            f"questions, {share_true(model, tokenizer, never):.0%} of those on facts never asked"
        )
    print(f"wrote pretrained.pt and sft.pt to {config.out}/; next: python train_dpo.py")


if __name__ == "__main__":
    run_command(main, "--resume goes on from the last saved state")
