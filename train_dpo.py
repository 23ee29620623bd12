"""Align the fine-tuned model with DPO, Eq. 7, against a frozen copy of itself, and measure it.

    python train_dpo.py                     pairs sampled from the reference, labelled by Eq. 1
    python train_dpo.py --pairs my.jsonl    your own {"prompt", "chosen", "rejected"} lines
    python train_dpo.py --resume            go on where a run was interrupted

Writes out/pairs.jsonl, out/dpo.pt, out/dpo.jsonl (metrics of the steps), out/dpo.json (the report);
while it runs, the policy so far and what --resume needs in out/dpo.part.pt.
"""

import copy
import itertools
import json
import math
import os
import random
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import data
import dpo
import evaluate
import model as gpt
from train_sft import (
    identify,
    last_state,
    prepare,
    read_config,
    run_command,
    schedule,
    set_speed,
)


@dataclass
class RunConfig:
    """What every alignment run has, this one's and those in variants/."""

    seed: int = 0
    out: str = "out"  # folder for all that is written
    init: str = ""  # checkpoint to start from: OUT/sft.pt
    beta: float = 0.5  # of Eq. 3, by which the result is judged
    max_new_tokens: int = 24
    eval_questions: int = 120  # at most, of each held-out set
    eval_samples: int = 20  # a question
    device: str = "auto"
    dtype: str = "float32"  # bfloat16 autocasts the forward pass
    compile: bool = False


@dataclass
class Config(RunConfig):
    pairs: str = ""  # own preference file
    skip_bad: bool = False  # count bad lines and go on
    resume: bool = False  # from the last saved state of the same run
    num_pairs: int = 24_000  # to sample, where no file is given
    lr: float = 6e-3
    optimizer: str = "sgd"  # or adamw
    momentum: float = 0.9  # of sgd
    epochs: int = 1
    batch_size: int = 64  # pairs a step
    grad_accum: int = 1  # backward passes a step, each of as many of its pairs: takes less memory


def load_checkpoint(config, device):
    """-> (frozen reference, tokenizer) from the checkpoint to start from."""
    path = config.init or f"{config.out}/sft.pt"
    try:
        reference, state = gpt.load(path, device)
    except FileNotFoundError:
        raise SystemExit(f"there is no {path}: run `python train_sft.py` first")
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}")
    except ValueError as error:
        raise SystemExit(f"cannot start from {path}: {error}")
    if "tokenizer" not in state:
        raise SystemExit(f"cannot start from {path}: it has no tokenizer")
    return reference.requires_grad_(False), data.build_tokenizer(**state["tokenizer"])


# --------------------------------------------------------------------------------------------------
# Pairs


def sample_pairs(reference, tokenizer, config, questions):
    """Two responses of the reference to each of num_pairs prompts, labelled once by Eq. 1.

    -> (prompt, chosen, rejected) texts. Equal responses, and those cut off or empty, make no pair.
    """
    rng = random.Random(config.seed)
    prompts = [q for q in rng.choices(questions, k=config.num_pairs) for _ in range(2)]
    examples, texts = evaluate.sample_responses(
        reference, tokenizer, prompts, config, "sampling pairs"
    )
    rewards = evaluate.true_rewards(prompts, texts).double()
    p_first = dpo.preference_probability(rewards[::2], rewards[1::2])
    pairs = []
    for prompt, first, second, p in zip(prompts[::2], texts[::2], texts[1::2], p_first.tolist()):
        if first and second and first.strip() and second.strip() and first != second:
            first_wins = rng.random() < p
            pairs.append((prompt, first, second) if first_wins else (prompt, second, first))
    changed = sum(
        text is not None and data.encode(tokenizer, prompt, text) != example
        for prompt, text, example in zip(prompts, texts, examples)
    )
    print(
        f"{config.num_pairs} pairs sampled: {config.num_pairs - len(pairs)} with equal, empty or "
        f"cut-off responses left out; {changed / len(texts):.2%} of the samples are other tokens "
        "when read back from text"
    )
    if not pairs:
        raise SystemExit("no pair is left: fine-tune longer, until the model ends its responses")
    return pairs


def write_pairs(path, pairs):
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        for pair in pairs:
            line = dict(zip(("prompt", "chosen", "rejected"), pair))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(f"{path}.tmp", path)


def read_pairs(config, tokenizer, block_size):
    """Somebody's own file -> (pairs, pairs held out, held-out prompts to sample from)."""
    fields = data.fields_of(config.pairs)
    pairs = data.read_jsonl(config.pairs, fields, tokenizer, block_size, config.skip_bad)
    if fields[-1] == "rating":
        pairs = data.pairs_from_ratings(pairs, config.pairs)
    train, held_out = data.hold_out(pairs, config.pairs)
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in held_out))
    longest = block_size - config.max_new_tokens
    short = [prompt for prompt in prompts if len(tokenizer.encode_ordinary(prompt)) <= longest]
    print(
        f"{len(train)} pairs to train on, {len(held_out)} held out; {len(short)} of their "
        f"{len(prompts)} prompts leave room for --max-new-tokens {config.max_new_tokens}"
    )
    if not short:
        raise SystemExit("none does, so nothing can be sampled: lower --max-new-tokens")
    return train, held_out, short[:480]


def check_village_fits(tokenizer, block_size, config):
    """Refuse a model, somebody's own perhaps, that cannot take the village's texts."""
    prompt = max(len(tokenizer.encode_ordinary(q)) for q in data.QUESTIONS)
    parts = data.OPENINGS, [a for q in data.QUESTIONS for a in data.answers(q)], data.CLOSINGS
    # Every part follows a space, where a token ends: the longest response has the longest parts.
    response = 1 + sum(max(len(tokenizer.encode_ordinary(f" {t}")) for t in part) for part in parts)
    need = prompt + max(response, config.max_new_tokens)
    if response > config.max_new_tokens or need > block_size:
        raise SystemExit(
            f"the village's responses take {response} tokens and prompts {prompt}: the model's "
            f"block size of {block_size} or --max-new-tokens is too small, or did you mean --pairs?"
        )


def noise_limits(pairs):
    """The best accuracy and the least loss that labels drawn by Eq. 1 allow, from true rewards."""
    chosen, rejected = (
        torch.tensor([data.reward(pair[0], pair[i]) for pair in pairs]) for i in (1, 2)
    )
    p = dpo.preference_probability(chosen, rejected)  # (N,)
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    accuracy = torch.maximum(p, 1 - p).mean().item()
    return {"best_loss": entropy.mean().item(), "best_accuracy": accuracy}


def encode_sides(tokenizer, pairs):
    """Texts -> (chosen, rejected), each a list of (ids, mask)."""
    return [[data.encode(tokenizer, pair[0], pair[i]) for pair in pairs] for i in (1, 2)]


def prepare_pairs(reference, tokenizer, pairs):
    """Texts -> what train() takes: the sides, chosen and rejected, and what is given of them: the
    reference's log-probabilities, computed here, once."""
    if isinstance(pairs[0][2], bool):
        raise SystemExit(
            "thumbs up and down make no pairs: python variants/train_variant.py --loss kto"
        )
    sides = encode_sides(tokenizer, pairs)
    return sides, [evaluate.known_logps(reference, side, tokenizer.eot_token) for side in sides]


# --------------------------------------------------------------------------------------------------
# Training


LN2 = math.log(2)  # Eq. 7 where policy and reference are one


def loss_and_metrics(policy_logps, lengths, ref_chosen_logps, ref_rejected_logps, beta):
    """A batch's log-probabilities -> losses (B,), metrics to log. A variant hands in its own.

    policy_logps (2B,) and lengths (2B,), in tokens, which only variants need: the chosen rows
    before the rejected. The reference's log-probabilities (B,) each.
    """
    policy_chosen_logps, policy_rejected_logps = policy_logps.chunk(2)
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    margins = chosen_rewards - rejected_rewards
    return losses, {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "logps/chosen": policy_chosen_logps.detach().mean(),
        "logps/rejected": policy_rejected_logps.detach().mean(),
    }


def take_step(loss, model, optimizer):
    """What follows backward(): the optimizer's step, gradients cleared -> the norm they had."""
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if not (loss + grad_norm).isfinite():
        raise FloatingPointError(f"loss {loss.item()}, norm of its gradient {grad_norm.item()}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def train_step(policy, optimizer, sides, given, pad, beta, loss_fn=loss_and_metrics, grad_accum=1):
    """One step down Eq. 7 -> metrics.

    sides: (chosen, rejected), each B examples (ids, mask). given: the reference's log-probabilities
    of either, (B,) each.
    """
    parts = []
    for k in range(grad_accum):  # every grad_accum-th pair, from the k-th on
        examples = [example for side in sides for example in side[k::grad_accum]]
        policy_logps = evaluate.response_logps(policy, examples, pad)  # (2B / grad_accum,)
        lengths = torch.tensor([sum(mask) for _, mask in examples], device=policy_logps.device)
        known = [tensor[k::grad_accum].to(policy_logps.device) for tensor in given]
        losses, metrics = loss_fn(policy_logps, lengths, *known, beta)
        (losses.mean() / grad_accum).backward()
        parts.append({"loss": losses.detach().mean(), **metrics})
    metrics = {name: sum(part[name] for part in parts) / grad_accum for name in parts[0]}
    return metrics | {"grad_norm": take_step(metrics["loss"], policy, optimizer)}


def make_optimizer(model, config):
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), config.lr, config.momentum)
    return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0)


def count_steps(config, count):
    """-> (pairs a step, steps)."""
    batch_size = min(config.batch_size, count)
    if batch_size % config.grad_accum:
        raise SystemExit(f"--grad-accum {config.grad_accum} does not divide a step's {batch_size}")
    return batch_size, max(1, config.epochs * count // batch_size)


def train(
    policy, optimizer, dataset, config, pad, loss_fn=loss_and_metrics, first_loss=LN2, done=0
):
    """Yields the metrics of each step after the first `done`. dataset: from prepare_pairs()."""
    sides, given = dataset
    batch_size, steps = count_steps(config, len(sides[0]))
    batches = enumerate(data.batches(len(sides[0]), batch_size, steps, config.seed))
    for step, rows in itertools.islice(batches, done, None):
        lr = optimizer.param_groups[0]["lr"] = config.lr * schedule(step, steps)
        batch = [[side[i] for i in rows] for side in sides], [tensor[rows] for tensor in given]
        metrics = train_step(
            policy, optimizer, *batch, pad, config.beta, loss_fn, config.grad_accum
        )
        if step == 0 and first_loss is not None:
            check_first_loss(metrics["loss"].item(), first_loss, config)
        yield {name: value.item() for name, value in metrics.items()} | {"lr": lr}


SHOWN = ("loss", "rewards/margins", "rewards/accuracies")


def run(training, steps, config, name, probe, save, shown=SHOWN, done=0):
    """Train to the end; ten times on the way, probe() fresh samples and save(step) the weights.

    training yields the metrics of each of `steps` steps, but for the first `done`. They, and the
    probes', are the lines of NAME.jsonl. Returns the last ones.
    """
    bar, step = evaluate.progress(range(done + 1, steps + 1), name), done
    with open(f"{config.out}/{name}.jsonl", "a+", buffering=1) as log:
        recent = cut_log(log, done)
        try:
            for step, metrics in zip(bar, training):
                recent = [*recent[-49:], metrics]
                line = average(recent, shown)
                bar.set_postfix_str(line, refresh=False)
                due = step * 10 // steps > (step - 1) * 10 // steps
                if due:
                    fresh = probe()
                    bar.write(f"step {step:4}/{steps}  {line}  {average([fresh], fresh)}")
                    metrics |= fresh
                log.write(json.dumps({"step": step, **metrics}) + "\n")
                if due:
                    save(step)
        except FloatingPointError as error:
            raise SystemExit(
                f"after step {step}: {error}; try a smaller --lr. What was saved before is kept"
            )
    return recent


def cut_log(log, done):
    """Leave only the lines of the first `done` steps in the open file -> the last of them."""
    log.seek(0)
    lines = [log.readline() for _ in range(done)]
    if not all(line.endswith("\n") for line in lines):
        raise SystemExit(f"--resume: {log.name} has fewer lines than the {done} steps done")
    log.truncate(log.tell())
    return [json.loads(line) for line in lines[-50:]]


def average(recent, names):
    """The means of some metrics over the last steps, as text."""
    means = {name: sum(metrics[name] for metrics in recent) / len(recent) for name in names}
    return "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())


def check_first_loss(loss, first_loss, config):
    """At step 0 policy and reference are one: each margin is 0, and −log σ(0) = ln 2."""
    # log π comes from other batches here than there: its last bits differ, in bfloat16 its second.
    tolerance = max(1, config.beta) * (1e-3 if config.dtype == "float32" else 5e-2)
    expected = "ln 2" if first_loss == LN2 else f"{first_loss:.4f}"
    if abs(loss - first_loss) > tolerance * max(1, first_loss):
        raise SystemExit(
            f"loss at step 0: {loss:.4f}, not {expected}: the policy is not the reference"
        )
    tqdm.write(f"loss at step 0: {loss:.4f} ({expected})")


# --------------------------------------------------------------------------------------------------
# Report


def village_probe(policy, reference, tokenizer, config):
    """What loss and accuracy do not show, on four fresh samples a held-out question."""
    prompts = 4 * data.split_questions()[1][: config.eval_questions]
    texts, log_ratios = evaluate.fresh_samples(policy, reference, tokenizer, prompts, config)
    rewards = evaluate.true_rewards(prompts, texts)
    garbled = [text not in data.responses(p) for p, text in zip(prompts, texts)]
    return {
        "fresh/reward": rewards.mean().item(),
        "fresh/kl": log_ratios.mean().item(),
        "fresh/garbled": sum(garbled) / len(garbled),
    }


def own_probe(policy, reference, tokenizer, held_out, prompts, config, loss_fn):
    """What can be known of somebody's own held-out pairs, without a true reward."""
    sides, given = held_out
    policy_logps = [evaluate.known_logps(policy, side, tokenizer.eot_token) for side in sides]
    lengths = torch.tensor([sum(mask) for side in sides for _, mask in side])
    losses, metrics = loss_fn(torch.cat(policy_logps), lengths, *given, config.beta)
    texts, log_ratios = evaluate.fresh_samples(policy, reference, tokenizer, prompts, config)
    return {
        "held-out/loss": losses.mean().item(),
        "held-out/accuracy": metrics["rewards/accuracies"].item(),
        "fresh/kl": log_ratios.mean().item(),
        "fresh/cut-off": texts.count(None) / len(texts),
    }


def village_report(policy, reference, tokenizer, config, name):
    _, held_out, never = data.split_questions()
    held_out, never = held_out[: config.eval_questions], never[: config.eval_questions]
    evaluate.print_answers(reference, policy, tokenizer, held_out[:8], config)
    reports = []
    for title, questions in (("held-out questions", held_out), ("facts never asked", never)):
        exact = evaluate.exact_distribution(reference, tokenizer, questions)
        rows, bracket = evaluate.measure(policy, reference, tokenizer, questions, exact, config)
        reports.append(evaluate.summarise(rows, config.beta))
        evaluate.print_table(title, reports[-1], bracket, name)
    return reports[0] | {"never_asked": reports[1]}


def write_json(path, value):
    """Never leaves half a file at `path`."""
    with open(f"{path}.tmp", "w") as file:
        json.dump(value, file, indent=1)
    os.replace(f"{path}.tmp", path)


STARTED = time.perf_counter()


def lap(seconds, stage):
    """Note how long a stage took: all the time that no stage before it has taken."""
    seconds[stage] = round(time.perf_counter() - STARTED - sum(seconds.values()), 1)


def start(config):
    """-> (policy, frozen reference, tokenizer), the policy a copy of the reference."""
    device = prepare(config)
    reference, tokenizer = load_checkpoint(config, device)
    policy = copy.deepcopy(reference).requires_grad_(True)
    for model in (reference, policy):
        set_speed(model, config, device)
    return policy, reference, tokenizer


def train_and_report(
    name, training, steps, models, config, seconds, shown=SHOWN, own=None, extra=(),
    progress=lambda step: {}, done=0,
):  # fmt: skip
    """The second half of every trainer: train, measure, and write NAME.pt, .jsonl and .json.

    models: what start() returns. own: of somebody's own data, where there is no truth, the probe
    and the prompts to answer before and after. extra: what else the report should hold. progress:
    what NAME.part.pt should hold for --resume, after which `done` steps are behind us.
    """
    policy, reference, tokenizer = models
    path = f"{config.out}/{name}"
    vocabulary = data.tokenizer_state(tokenizer)

    def save(step):
        gpt.save(f"{path}.part.pt", policy, tokenizer=vocabulary, **progress(step))

    def probe():
        return own[0]() if own else village_probe(*models, config)

    if os.path.exists(f"{path}.json"):
        os.remove(f"{path}.json")  # the report of another run
    recent = run(training, steps, config, name, probe, save, shown, done)
    gpt.save(f"{path}.pt", policy, tokenizer=vocabulary)
    print(f"last {len(recent)} steps:", average(recent, shown))
    lap(seconds, "training")
    if own:
        report = probe()
        evaluate.print_answers(reference, policy, tokenizer, own[1][:8], config)
        print("\nheld out:", average([report], report))
    else:
        report = village_report(*models, config, name)
    lap(seconds, "measuring")
    report |= {**dict(extra), "seconds": seconds, "config": vars(config), "seed": config.seed}
    write_json(f"{path}.json", report)
    os.remove(f"{path}.part.pt")
    print(f"\nwrote {name}.pt, .jsonl and .json to {config.out}/; seconds: {seconds}")


def resume(path, policy, optimizer, identity):
    """Take up the weights and the optimizer's state of an interrupted run -> its steps so far."""
    _, state = last_state([path], identity, policy.wte.weight.device)
    policy.load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"resumed from {path}, step {state['step']}")
    return state["step"]


def align(name, models, config, prepare=prepare_pairs, loss_fn=loss_and_metrics, first_loss=LN2):
    """Pairs -> training -> measurement. A variant changes the last three arguments."""
    policy, reference, tokenizer = models
    seconds, own, extra = {}, None, {}
    block_size = reference.config.block_size
    if config.pairs:
        pairs, held_out, prompts = read_pairs(config, tokenizer, block_size)
        held_out = prepare(reference, tokenizer, held_out)
        own = (lambda: own_probe(*models, held_out, prompts, config, loss_fn)), prompts
    else:
        check_village_fits(tokenizer, block_size, config)
        pairs = sample_pairs(reference, tokenizer, config, data.split_questions()[0])
        write_pairs(f"{config.out}/pairs.jsonl", pairs)
        limits = extra["pairs"] = noise_limits(pairs)
        print("labels this noisy allow at best:", average([limits], limits))
    lap(seconds, "pairs")
    dataset = prepare(reference, tokenizer, pairs)
    lap(seconds, "reference log-probabilities")
    print("the first response, scored tokens marked:", data.paint(tokenizer, *dataset[0][0][0]))
    optimizer, done = make_optimizer(policy, config), 0
    sums = [weights.double().sum().item() for weights in reference.state_dict().values()]
    identity = identify(config, dataset[0], sums)
    if config.resume:
        done = resume(f"{config.out}/{name}.part.pt", policy, optimizer, identity)

    def progress(step):
        return {"run": identity, "step": step, "optimizer": optimizer.state_dict()}

    end = tokenizer.eot_token
    training = train(policy, optimizer, dataset, config, end, loss_fn, first_loss, done)
    _, steps = count_steps(config, len(dataset[0][0]))
    train_and_report(
        name, training, steps, models, config, seconds, SHOWN, own, extra, progress, done
    )


def main():
    config = read_config(Config, "train_dpo.py")
    align("dpo", start(config), config)


if __name__ == "__main__":
    run_command(main, "--resume goes on from the last saved state")
