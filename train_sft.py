"""Pretrain on stories, then fine-tune on question -> answer: the model that DPO starts from.

    python train_sft.py                                  the village, a minute on two cores
    python train_sft.py --corpus my.txt --sft my.jsonl   your text and demonstrations
    python train_sft.py --init out/gpt2.pt --sft my.jsonl   a model that is pretrained already
    python train_sft.py --resume                         go on where a run was interrupted

Writes out/pretrained.pt and out/sft.pt; beside each a .jsonl with the metrics of its steps and a
.json with its loss on held-out text. While it runs, out/*.part.pt have what --resume needs.
"""

import math
from dataclasses import dataclass

import torch

import data
import model as gpt
from lab import evaluate, flags, runs, village
from lab.flags import flag
from lab.metrics import weight_sums
from lab.own import OwnFile, own_corpus
from responses import response_logps, response_logps_no_grad


@dataclass
class Config(flags.Config):
    init: str = flag("", "pretrained model to start from, in place of --corpus; goes with --sft")
    corpus: str = flag("", "your own text to pretrain on; goes with --sft")
    sft: str = flag(
        "", "your own demonstrations to fine-tune on: prompts and completions, or messages"
    )
    held_out: str = flag("", "file to measure on, in place of a tenth of your own prompts")
    skip_bad: bool = flag(False, "leave out bad lines of these files, and count them")
    max_bad: float = flag(0.1, "share of the lines that may be bad with --skip-bad", below=1)
    resume: bool = flag(False, "go on from the last saved state of the same run")
    vocab_size: int = flag(village.VOCAB_SIZE, "tokens to learn; each village word is one")
    block_size: int = flag(128, "tokens of the longest sequence")
    n_layer: int = flag(2, "layers; two learn all facts of the village in a minute")
    n_head: int = flag(4, "attention heads")
    n_embd: int = flag(128, "width of the model")
    pretrain_steps: int = flag(
        500, "steps of pretraining, on half as many rows as --batch-size", own=0
    )
    pretrain_lr: float = flag(5e-3, "highest learning rate of pretraining")
    context: int = flag(64, "tokens of a pretraining row, about two stories")
    steps: int = flag(800, "steps of fine-tuning; after fewer, more answers are garbled", own=0)
    max_epochs: int = flag(
        20, "passes of each training over your own data, where no steps are given"
    )
    lr: float = flag(
        3e-3, "highest rate of fine-tuning; with --init the lower, the wider the model", own=0
    )
    batch_size: int = flag(64, "examples in each step of fine-tuning")
    grad_accum: int = flag(1, "parts of a batch, each with its backward pass: takes less memory")


def cross_entropy(logps, examples):
    """−log π of N examples (N,) -> its mean over all their scored tokens (), in nats."""
    return -logps.sum() / sum(sum(mask) for _, mask in examples)


def train_supervised(model, optimizer, examples, batches, rates, start=0, grad_accum=1):
    """Next-token prediction; yields the metrics of each step after the first `start`.

    batches: for each step the indices of its examples. rates: for each step its learning rate.
    grad_accum: into how many parts a batch is cut, each with a backward pass of its own.
    """
    for lr, rows in list(zip(rates, batches))[start:]:
        optimizer.param_groups[0]["lr"] = lr
        batch = [examples[i] for i in rows]
        scored, loss = sum(sum(mask) for _, mask in batch), 0
        for k in range(min(grad_accum, len(batch))):
            part_loss = -response_logps(model, batch[k::grad_accum]).sum() / scored
            part_loss.backward()
            loss += part_loss.detach()
        grad_norm = runs.finite_grad_norm(model, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": lr}


def make_optimizer(model, weight_decay):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay)


def cut_rows(tokenizer, texts, context):
    """Texts, each closed by end-of-text, laid end to end and cut -> examples.

    All tokens of a row are scored but the first, which is also the last token of the row before.
    """
    stream = [i for text in texts for i in [*tokenizer.encode_ordinary(text), tokenizer.eot_token]]
    if len(stream) <= context:
        raise SystemExit(
            f"the corpus, or the tenth of it that is held out, has only {len(stream)} tokens: "
            f"give more text, or a --context below {len(stream)}"
        )
    rows = torch.tensor(stream).unfold(0, context + 1, context).tolist()
    return [(row, [False] + [True] * context) for row in rows]


def fit(run, examples, held_out, batch_size, steps, lr):
    """Take one of the two trainings to its end -> its loss on examples that it has not seen. On
    your own data it makes --max-epochs passes if no steps are given, and keeps the best weights."""
    steps = steps or run.config.max_epochs * math.ceil(len(examples) / batch_size)
    batches = data.batches(len(examples), batch_size, run.config.seed)
    rates = data.learning_rates(lr, steps)
    training = train_supervised(
        run.model, run.optimizer, examples, batches, rates, run.step, run.config.grad_accum
    )

    def measure():
        loss = cross_entropy(response_logps_no_grad(run.model, held_out), held_out)
        return {"held-out/loss": loss.item()}

    if run.config.sft:
        run.best.patience = 2
        run.measure_start(measure)
    for metrics in run.track(training, steps):
        run.log(metrics, measure if run.config.sft else dict)
    found = measure()
    print(f"{run.name}: {found['held-out/loss']:.3f} nats per token on held-out text")
    return found


def check_flags(config):
    """Refuse flags that do not go together, before any work."""
    if bool(config.corpus or config.init) != bool(config.sft) or (config.corpus and config.init):
        together = "--sft goes with --corpus, to pretrain on, or with --init, a pretrained model"
        raise SystemExit(f"train_sft.py: {together}: give two of these, or none")
    if config.n_embd % config.n_head:
        raise SystemExit(f"--n-embd {config.n_embd} is no multiple of --n-head {config.n_head}")
    if config.context > config.block_size:
        raise SystemExit(f"--context {config.context} exceeds --block-size {config.block_size}")


def read_corpus(config):
    """-> ((corpus, corpus held out), the village's demonstrations, and the tokenizer)."""
    if config.sft:
        corpus, demos = own_corpus(config.corpus), None
        print("learning the tokenizer")
        (text,) = corpus[0]
    else:
        tokens = config.pretrain_steps * (config.batch_size // 2 or 1) * config.context
        count = config.steps * config.batch_size
        corpus, demos = village.training_texts(tokens, count, config.seed)
        text = village.every_word()
    try:
        return corpus, demos, data.train_tokenizer(text, config.vocab_size)
    except ValueError as error:
        raise SystemExit(f"--vocab-size {config.vocab_size}: {error}")


def main():
    config = flags.read_config(Config, "train_sft.py")
    check_flags(config)
    device = runs.prepare(config)
    own = OwnFile(config.sft, "sft", config, config.held_out) if config.sft else None
    corpus = ()
    if config.init:
        model, tokenizer = runs.load_checkpoint(config.init, device, config.dtype)
    else:
        corpus, demos, tokenizer = read_corpus(config)
        shape = config.block_size, config.n_layer, config.n_head, config.n_embd
        model = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, *shape)).to(device)
    if own:
        demos = own.split(tokenizer, model.config.block_size)
    examples, held_out = ([data.encode(tokenizer, *demo) for demo in part] for part in demos)
    longest = max(len(ids) for ids, _ in examples + held_out)
    if longest > model.config.block_size:
        raise SystemExit(f"--block-size {config.block_size} is too small: {longest} are needed")
    # 3e-3 is good at a width of 128, and about 1e-4 is what GPT-2 takes at 768.
    config.lr = config.lr or Config.lr * (128 / model.config.n_embd if config.init else 1) ** 2
    model.autocast_bfloat16 = config.dtype == "bfloat16"
    size = sum(p.numel() for p in model.parameters())
    print(f"model: {size:,} parameters; tokenizer: {tokenizer.n_vocab} tokens; --lr {config.lr:g}")
    print("one example, scored tokens marked:", data.paint(tokenizer, *examples[0]))

    pretraining, fine_tuning = runs.Run("pretrained", config), runs.Run("sft", config)
    start = {"data": (corpus, demos), "start": weight_sums(model)}
    pretraining.attach(model, tokenizer, make_optimizer(model, 0.1), **start)
    # Weight decay would keep the model unsure, and it would write more garbled answers, which
    # harm DPO (docs/family.md).
    fine_tuning.attach(model, tokenizer, make_optimizer(model, 0), **start)
    trainings = [fine_tuning] if config.init else [pretraining, fine_tuning]
    if runs.resume(*trainings) is pretraining:  # not with --init, nor if it had ended before
        rows, held_rows = (cut_rows(tokenizer, texts, config.context) for texts in corpus)
        batch_size = config.batch_size // 2 or 1
        steps, lr = config.pretrain_steps, config.pretrain_lr
        pretraining.finish(fit(pretraining, rows, held_rows, batch_size, steps, lr))
    of_village = {"conversations": False, "answer_tokens": evaluate.Config.max_new_tokens}
    model.learnt = own.learnt if own else of_village
    found = fit(fine_tuning, examples, held_out, config.batch_size, config.steps, config.lr)
    fine_tuning.finish(found | ({"file": own.report} if own else {}))
    if not own:
        _, kept_back, never = village.split_questions()
        for name, part in (("held-out questions", kept_back), ("facts never asked", never)):
            share = evaluate.share_true(model, tokenizer, part)
            print(f"{name}: the likeliest answer is true for {share:.0%}")
    print(f"next: python train_dpo.py --out {config.out}" + " --pairs FILE" * bool(own))


if __name__ == "__main__":
    flags.command(main, "--resume goes on from the last saved state")
