"""Align the fine-tuned model with DPO, Eq. 7, against a frozen copy of itself, and measure it.

    python train_dpo.py                     pairs sampled from the reference, labelled by Eq. 1
    python train_dpo.py --pairs my.jsonl    your own {"prompt", "chosen", "rejected"} lines

Writes out/pairs.jsonl, out/dpo.pt, out/dpo.jsonl (metrics of the steps), out/dpo.json (the report).
"""

import copy
import json
import math
import os
import random
import time
from dataclasses import dataclass

import torch

import data
import dpo
import evaluate
import model as gpt
from train_sft import prepare, read_config, schedule, set_speed


@dataclass
class Config:
    seed: int = 0
    out: str = "out"  # folder for all that is written
    init: str = ""  # checkpoint to start from: OUT/sft.pt
    pairs: str = ""  # own preference file
    skip_bad: bool = False  # count bad lines and go on
    num_pairs: int = 24_000  # to sample, where no file is given
    beta: float = 0.5
    lr: float = 6e-3
    optimizer: str = "sgd"  # or adamw
    momentum: float = 0.9  # of sgd
    epochs: int = 1
    batch_size: int = 64  # pairs a step
    max_new_tokens: int = 24
    eval_questions: int = 120  # at most, of each held-out set
    eval_samples: int = 20  # a question
    device: str = "auto"
    dtype: str = "float32"  # bfloat16 autocasts the forward pass
    compile: bool = False


def load_checkpoint(config, device):
    """-> (frozen reference, tokenizer) from the checkpoint to start from."""
    path = config.init or os.path.join(config.out, "sft.pt")
    try:
        reference, state = gpt.load(path, device)
        tokenizer = data.build_tokenizer(state["tokens"])
    except FileNotFoundError:
        raise SystemExit(f"there is no {path}: run `python train_sft.py` first")
    except (ValueError, KeyError) as error:
        raise SystemExit(f"cannot start from {path}: {error}")
    return reference.requires_grad_(False), tokenizer


# --------------------------------------------------------------------------------------------------
# Pairs


def sample_pairs(reference, tokenizer, config):
    """Two responses of the reference to each of num_pairs questions, labelled once by Eq. 1.

    -> (prompt, chosen, rejected) texts. Equal responses, and those cut off or empty, make no pair.
    """
    questions, _, _ = data.split_questions()
    rng = random.Random(config.seed)
    prompts = [q for q in rng.choices(questions, k=config.num_pairs) for _ in range(2)]
    examples, texts = evaluate.sample_responses(
        reference, tokenizer, prompts, config, "sampling pairs"
    )
    pairs, unusable = [], 0
    for prompt, first, second in zip(prompts[::2], texts[::2], texts[1::2]):
        if not first or not second or first == second:
            unusable += 1
            continue
        margin = data.reward(prompt, first) - data.reward(prompt, second)
        first_wins = rng.random() < 1 / (1 + math.exp(-margin))
        pairs.append((prompt, first, second) if first_wins else (prompt, second, first))
    changed = sum(
        text is not None and data.encode(tokenizer, prompt, text) != example
        for prompt, text, example in zip(prompts, texts, examples)
    )
    print(
        f"{config.num_pairs} pairs sampled: {unusable} with equal, empty or cut-off responses left "
        f"out; {changed / len(texts):.2%} of the samples are other tokens when read back from text"
    )
    if not pairs:
        raise SystemExit("none is left: fine-tune longer, until the model ends its responses")
    return pairs


def write_pairs(path, pairs):
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        for pair in pairs:
            line = dict(zip(("prompt", "chosen", "rejected"), pair))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(f"{path}.tmp", path)


def read_pairs(config, tokenizer, block_size):
    """Somebody's own file -> (pairs, pairs held out: those of every tenth prompt)."""
    fields = ("prompt", "chosen", "rejected")
    pairs = data.read_jsonl(config.pairs, fields, tokenizer, block_size, config.skip_bad)
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in pairs))
    if len(prompts) < 2:
        raise SystemExit(f"{config.pairs}: two prompts at least, one in every ten is held out")
    kept_back = set(prompts[1::10])
    train, held_out = ([p for p in pairs if (p[0] in kept_back) == held] for held in (False, True))
    print(f"{len(train)} pairs to train on, {len(held_out)} held out")
    return train, held_out


def noise_limits(pairs):
    """The best accuracy and the least loss that labels drawn by Eq. 1 allow, from true rewards."""
    chosen, rejected = (
        torch.tensor([data.reward(pair[0], pair[i]) for pair in pairs]) for i in (1, 2)
    )
    p = dpo.preference_probability(chosen, rejected)  # (N,)
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    accuracy = torch.maximum(p, 1 - p).mean().item()
    return {"best_loss": entropy.mean().item(), "best_accuracy": accuracy}


def prepare_pairs(reference, tokenizer, pairs):
    """Texts -> what train() takes. The reference's log-probabilities are computed here, once."""
    chosen, rejected = (
        [data.encode(tokenizer, pair[0], pair[i]) for pair in pairs] for i in (1, 2)
    )
    ref_chosen, ref_rejected = (
        evaluate.response_logps(reference, examples, tokenizer.eot_token)
        for examples in (chosen, rejected)
    )
    return chosen, rejected, ref_chosen, ref_rejected


# --------------------------------------------------------------------------------------------------
# Training


def dpo_losses(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Log-probabilities of a batch of pairs, (B,) each -> losses (B,), metrics to log."""
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta
    )
    margins = chosen_rewards - rejected_rewards
    return losses, {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "logps/chosen": policy_chosen.detach().mean(),
        "logps/rejected": policy_rejected.detach().mean(),
    }


def train_step(policy, optimizer, ids, mask, ref_chosen, ref_rejected, beta, loss_fn=dpo_losses):
    """One step down Eq. 7 -> metrics. ids, mask (2B, T): the chosen rows, then the rejected."""
    logits = policy(ids)  # (2B, T, V)
    policy_chosen, policy_rejected = dpo.sequence_logps(logits, ids, mask).chunk(2)  # (B,) each
    losses, metrics = loss_fn(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    loss = losses.mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()])
    if not (loss + grad_norm).isfinite():
        raise FloatingPointError(f"loss {loss.item()}, norm of its gradient {grad_norm.item()}")
    optimizer.step()
    return {"loss": loss.detach(), **metrics, "grad_norm": grad_norm}


def train(policy, pairs, steps, config, pad, loss_fn=dpo_losses):
    """Yields the metrics of each of `steps` steps. pairs: what prepare_pairs() returns."""
    chosen, rejected, ref_chosen, ref_rejected = pairs
    device = policy.wte.weight.device
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(policy.parameters(), config.lr, config.momentum)
    else:
        optimizer = torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=0)
    batch_size = min(config.batch_size, len(chosen))
    for step, rows in enumerate(data.batches(len(chosen), batch_size, steps, config.seed)):
        lr = optimizer.param_groups[0]["lr"] = config.lr * schedule(step, steps)
        examples = [chosen[i] for i in rows] + [rejected[i] for i in rows]
        batch = *data.collate(examples, pad), ref_chosen[rows], ref_rejected[rows]
        batch = [tensor.to(device) for tensor in batch]
        metrics = train_step(policy, optimizer, *batch, config.beta, loss_fn)
        yield {name: value.item() for name, value in metrics.items()} | {"lr": lr}


def run(policy, pairs, config, pad, probe, save, loss_fn=dpo_losses):
    """Train to the end; ten times on the way, probe() fresh samples and save() the weights.

    Every step's metrics, and the probes', are a line of dpo.jsonl.
    """
    steps = max(1, config.epochs * len(pairs[0]) // config.batch_size)
    bar, recent, step = evaluate.progress(range(1, steps + 1), "DPO"), [], 0
    with open(os.path.join(config.out, "dpo.jsonl"), "w") as log:
        try:
            for step, metrics in zip(bar, train(policy, pairs, steps, config, pad, loss_fn)):
                if step == 1:
                    check_first_loss(metrics["loss"])
                recent = [*recent[-49:], metrics]
                line = average(recent, ("loss", "rewards/margins", "rewards/accuracies"))
                bar.set_postfix_str(line, refresh=False)
                if step % max(1, steps // 10) == 0:
                    fresh = probe()
                    save()
                    bar.write(f"step {step:4}/{steps}  {line}  {average([fresh], fresh)}")
                    metrics |= fresh
                log.write(json.dumps({"step": step, **metrics}) + "\n")
        except FloatingPointError as error:
            raise SystemExit(
                f"after step {step}: {error}; try a smaller --lr. What was saved before is kept"
            )
    save()


def average(recent, names):
    """The means of some metrics over the last steps, as text."""
    means = {name: sum(metrics[name] for metrics in recent) / len(recent) for name in names}
    return "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())


def check_first_loss(loss):
    """At step 0 policy and reference are one, each margin is 0, and −log σ(0) = ln 2."""
    print(f"loss at step 0: {loss:.4f} (ln 2)")
    if abs(loss - math.log(2)) > 1e-3:  # rounding in bfloat16 stays below this
        raise SystemExit("which is not ln 2 = 0.6931: the policy is not the reference")


# --------------------------------------------------------------------------------------------------
# Report


def village_probe(policy, reference, tokenizer, config):
    """What loss and accuracy do not show, on four fresh samples a held-out question."""
    prompts = 4 * data.split_questions()[1][: config.eval_questions]
    texts, log_ratios = evaluate.fresh_samples(policy, reference, tokenizer, prompts, config)
    rewards = [evaluate.true_reward(p, text) for p, text in zip(prompts, texts)]
    garbled = [text not in data.responses(p) for p, text in zip(prompts, texts)]
    return {
        "fresh/reward": sum(rewards) / len(rewards),
        "fresh/kl": log_ratios.mean().item(),
        "fresh/garbled": sum(garbled) / len(garbled),
    }


def own_probe(policy, reference, tokenizer, held_out, prepared, config):
    """What can be known of somebody's own held-out pairs, without a true reward."""
    chosen, rejected, ref_chosen, ref_rejected = prepared
    policy_chosen, policy_rejected = (
        evaluate.response_logps(policy, examples, tokenizer.eot_token)
        for examples in (chosen, rejected)
    )
    losses, metrics = dpo_losses(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, config.beta
    )
    prompts = sorted({prompt for prompt, _, _ in held_out})[:480]
    texts, log_ratios = evaluate.fresh_samples(policy, reference, tokenizer, prompts, config)
    return {
        "held-out/loss": losses.mean().item(),
        "held-out/accuracy": metrics["rewards/accuracies"].item(),
        "fresh/kl": log_ratios.mean().item(),
        "fresh/cut-off": texts.count(None) / len(texts),
    }


def village_report(policy, reference, tokenizer, config):
    _, held_out, never = data.split_questions()
    held_out, never = held_out[: config.eval_questions], never[: config.eval_questions]
    evaluate.print_answers(reference, policy, tokenizer, held_out[:8], config)
    reports = []
    for title, questions in (("held-out questions", held_out), ("facts never asked", never)):
        rows, bracket = evaluate.measure(policy, reference, tokenizer, questions, config)
        reports.append(evaluate.summarise(rows, config.beta))
        evaluate.print_table(title, reports[-1], bracket)
    return reports[0] | {"never_asked": reports[1]}


def main():
    config = read_config(Config, "train_dpo.py")
    device = prepare(config)
    reference, tokenizer = load_checkpoint(config, device)
    policy = copy.deepcopy(reference).requires_grad_(True)
    for model in (reference, policy):
        set_speed(model, config, device)
    seconds, clock = {}, time.perf_counter()

    def lap(stage):
        nonlocal clock
        seconds[stage], clock = round(time.perf_counter() - clock, 1), time.perf_counter()

    def save():
        gpt.save(f"{config.out}/dpo.pt", policy, tokens=data.tokens_of(tokenizer))

    if config.pairs:
        pairs, held_out = read_pairs(config, tokenizer, reference.config.block_size)
        held_out_prepared = prepare_pairs(reference, tokenizer, held_out)
    else:
        pairs = sample_pairs(reference, tokenizer, config)
        write_pairs(f"{config.out}/pairs.jsonl", pairs)
        limits = noise_limits(pairs)
        print("labels this noisy allow at best:", average([limits], limits))
    lap("pairs")
    prepared = prepare_pairs(reference, tokenizer, pairs)
    lap("reference log-probabilities")
    print("a chosen response, scored tokens marked:", data.paint(tokenizer, *prepared[0][0]))

    def probe():
        if config.pairs:
            return own_probe(policy, reference, tokenizer, held_out, held_out_prepared, config)
        return village_probe(policy, reference, tokenizer, config)

    run(policy, prepared, config, tokenizer.eot_token, probe, save)
    lap("training")
    if config.pairs:
        prompts = list(dict.fromkeys(prompt for prompt, _, _ in held_out))[:8]
        evaluate.print_answers(reference, policy, tokenizer, prompts, config)
        report = probe()
        print("\nheld out:", *(f"{name} {value:.3f}" for name, value in report.items()), sep="  ")
    else:
        report = village_report(policy, reference, tokenizer, config) | {"pairs": limits}
    lap("measuring")
    report |= {"seconds": seconds, "config": vars(config), "seed": config.seed}
    with open(f"{config.out}/dpo.json.tmp", "w") as file:
        json.dump(report, file, indent=1)
    os.replace(f"{config.out}/dpo.json.tmp", f"{config.out}/dpo.json")
    print(f"\nwrote dpo.pt, dpo.jsonl and dpo.json to {config.out}/; seconds: {seconds}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the files already written are whole")
