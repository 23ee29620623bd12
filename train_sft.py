"""Pretrain on stories, then fine-tune on question -> answer: the model that DPO starts from.

    python train_sft.py                                  the village, a minute on two cores
    python train_sft.py --corpus my.txt --sft my.jsonl   your text and {"prompt", "response"} lines
    python train_sft.py --resume                         go on where a run was interrupted

Writes out/pretrained.pt and out/sft.pt, their metrics in .jsonl and what they came to in .json;
while it runs, what --resume needs in out/*.part.pt.
"""

import itertools
from dataclasses import dataclass

import torch

import data
import model as gpt
from lab import evaluate, files, flags, runs, village
from lab.flags import flag
from responses import response_logps, response_logps_no_grad


@dataclass
class Config(flags.Config):
    corpus: str = flag("", "own text to pretrain on; goes with --sft")
    sft: str = flag("", 'own {"prompt", "response"} lines to fine-tune on')
    skip_bad: bool = flag(False, "count the bad lines of that file, and go on")
    resume: bool = flag(False, "from the last saved state of the same run")
    vocab_size: int = flag(village.VOCAB_SIZE, "tokens; each word of the village is one")
    block_size: int = flag(128, "longest sequence in tokens")
    n_layer: int = flag(2, "layers: two know all facts of the village, and take a minute")
    n_head: int = flag(4, "attention heads")
    n_embd: int = flag(128, "width of the model")
    pretrain_steps: int = flag(500, "each of half as many rows as --batch-size")
    pretrain_lr: float = flag(5e-3, "the highest rate: a small model bears a large one")
    context: int = flag(64, "tokens of a pretraining row, two or three stories")
    steps: int = flag(800, "of fine-tuning: fewer leave more garbled answers, README")
    lr: float = flag(3e-3, "the highest rate of fine-tuning")
    batch_size: int = flag(64, "examples a step")


def cross_entropy(logps, examples):
    """−log π of N examples (N,) -> its mean over all their scored tokens (), in nats."""
    return -logps.sum() / sum(sum(mask) for _, mask in examples)


def train(model, optimizer, examples, batches, rates, start=0):
    """Next-token prediction; yields the metrics of each step after the first `start`.

    batches: for each step the indices of its examples. rates: for each step its learning rate.
    """
    for step, rows in itertools.islice(enumerate(batches), start, None):
        optimizer.param_groups[0]["lr"] = rates[step]
        batch = [examples[i] for i in rows]
        loss = cross_entropy(response_logps(model, batch), batch)
        loss.backward()
        grad_norm = runs.finite_grad_norm(model, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": rates[step]}


def make_optimizer(model, weight_decay):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay)


def cut_rows(tokenizer, texts, context):
    """Texts, each closed by end-of-text, laid end to end and cut -> examples. All tokens are scored
    but a row's first, which nothing comes before; it is the last of the row before."""
    stream = [i for text in texts for i in [*tokenizer.encode_ordinary(text), tokenizer.eot_token]]
    if len(stream) <= context:
        raise SystemExit(
            f"the corpus, or the tenth of it that is held out, has only {len(stream)} tokens: "
            f"give more text, or a --context below {context}"
        )
    rows = torch.tensor(stream).unfold(0, context + 1, context).tolist()
    return [(row, [False] + [True] * context) for row in rows]


def fit(run, examples, held_out, batch_size, steps, lr):
    """Take one of the two trainings to its end, and measure it on examples that it has not seen."""
    batches = data.batches(len(examples), batch_size, steps, run.config.seed)
    rates = data.learning_rates(lr, steps)
    training = train(run.model, run.optimizer, examples, batches, rates, run.step)
    for metrics in run.track(training, steps):
        run.log(metrics)
    loss = cross_entropy(response_logps_no_grad(run.model, held_out), held_out).item()
    print(f"{run.name}: {loss:.3f} nats a token on held-out text")
    run.finish({"held-out/loss": loss})


def check_sizes(config):
    """Refuse in one line what would fail later in many."""
    if bool(config.corpus) != bool(config.sft):
        raise SystemExit("train_sft.py: --corpus and --sft go together: give both, or neither")
    if config.n_embd % config.n_head:
        raise SystemExit(f"--n-embd {config.n_embd} is no multiple of --n-head {config.n_head}")
    if config.context > config.block_size:
        raise SystemExit(f"--context {config.context} exceeds --block-size {config.block_size}")


def read_texts(config):
    """-> ((corpus, corpus held out), the tokenizer, (demonstrations, demonstrations held out))."""
    if config.sft:
        corpus = files.own_corpus(config.corpus)
        files.own_demonstrations(config, None)  # bad lines first: a tokenizer takes a while
        print("learning the tokenizer")
        (words,) = corpus[0]
    else:
        tokens = config.pretrain_steps * (config.batch_size // 2 or 1) * config.context
        count = config.steps * config.batch_size
        corpus, demos = village.training_texts(tokens, count, config.seed)
        words = village.every_word()
    try:
        tokenizer = data.train_tokenizer(words, config.vocab_size)
    except ValueError as error:
        raise SystemExit(f"--vocab-size {config.vocab_size}: {error}")
    return corpus, tokenizer, files.own_demonstrations(config, tokenizer) if config.sft else demos


def main():
    config = flags.read_config(Config, "train_sft.py")
    check_sizes(config)
    device = runs.prepare(config)
    corpus, tokenizer, demos = read_texts(config)
    examples, held_out = ([data.encode(tokenizer, *demo) for demo in part] for part in demos)
    longest = max(len(ids) for ids, _ in examples + held_out)
    if longest > config.block_size:
        raise SystemExit(f"--block-size {config.block_size} is too small: {longest} are needed")
    shape = config.block_size, config.n_layer, config.n_head, config.n_embd
    model = gpt.GPT(gpt.GPTConfig(tokenizer.n_vocab, *shape)).to(device)
    model.bfloat16 = config.dtype == "bfloat16"
    size = sum(p.numel() for p in model.parameters())
    print(f"model: {size:,} parameters; tokenizer: {tokenizer.n_vocab} tokens")
    print("one example, scored tokens marked:", data.paint(tokenizer, *examples[0]))

    pretraining, fine_tuning = runs.Run("pretrained", config), runs.Run("sft", config)
    pretraining.saves(model, tokenizer, make_optimizer(model, 0.1), data=(corpus, demos))
    # No weight decay: it keeps what is certain a little uncertain, and nothing harms DPO as much as
    # a reference that writes garbled answers (README, "What holds DPO back").
    fine_tuning.saves(model, tokenizer, make_optimizer(model, 0), data=(corpus, demos))
    if runs.resume(pretraining, fine_tuning) is pretraining:  # so it is without --resume
        rows, held_rows = (cut_rows(tokenizer, texts, config.context) for texts in corpus)
        batch_size = config.batch_size // 2 or 1
        fit(pretraining, rows, held_rows, batch_size, config.pretrain_steps, config.pretrain_lr)
    fit(fine_tuning, examples, held_out, config.batch_size, config.steps, config.lr)
    if not config.sft:
        _, asked, never = village.split_questions()
        for name, part in (("held-out questions", asked), ("facts never asked", never)):
            share = evaluate.share_true(model, tokenizer, part)
            print(f"{name}: the likeliest answer is true for {share:.0%}")
    print("next: python train_dpo.py")


if __name__ == "__main__":
    flags.command(main, "--resume goes on from the last saved state")
