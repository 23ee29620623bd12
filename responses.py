"""What DPO asks of a model: samples y ~ π(·|x), and log π(y|x), with a gradient or without."""

import torch
from torch import Tensor
from tqdm import tqdm

import data
import dpo


def response_logps(model, examples) -> Tensor:
    """log π(y|x) of N examples (ids, mask) -> (N,), with a gradient, on the model's device."""
    device, vocab_size = model.wte.weight.device, model.config.vocab_size
    # Examples of like length go through the model together, because padding costs time too.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    longest = len(examples[order[-1]][0])
    # A CPU is fastest with few at a time, and a GPU with many. Logits take most of the memory.
    # With a gradient those of all chunks are kept, so that --grad-accum saves memory.
    rows, most_logits = (32, 2**26) if device.type == "cpu" else (512, 2**28)
    chunk = max(1, min(rows, most_logits // (longest * vocab_size)))
    logps = []
    for start in range(0, len(order), chunk):
        ids, mask = data.collate([examples[i] for i in order[start : start + chunk]], device)
        # No logits are needed before those that predict the first scored token.
        first = max(0, mask.int().argmax(dim=1).min().item() - 1)
        logits = model(ids, first)  # (chunk, T - first, V)
        logps.append(dpo.sequence_logps(logits, ids[:, first:], mask[:, first:]))  # (chunk,)
    return torch.cat(logps)[torch.tensor(order, device=device).argsort()]  # (N,), as they came


@torch.no_grad()
def response_logps_no_grad(model, examples, label="log-probabilities") -> Tensor:
    """The same without a gradient, of any number of examples -> (N,) float32."""
    logps = torch.empty(len(examples), device=model.wte.weight.device)
    for start in tqdm(range(0, len(examples), 4096), label, leave=False, disable=None):
        chunk = slice(start, start + 4096)
        logps[chunk] = response_logps(model, examples[chunk])
    return logps


def sample_responses(model, tokenizer, prompts, config, label, generator=None):
    """One response per prompt -> N examples (ids, mask), and N texts, None for a response cut off.

    config: max_new_tokens, and seed, from which a random generator starts if none is given.
    """
    end, limit, examples, texts = tokenizer.eot_token, config.max_new_tokens, [], []
    if generator is None:
        generator = torch.Generator(model.wte.weight.device).manual_seed(config.seed)
    kept = 2 * model.config.n_layer * model.config.n_embd * model.config.block_size
    rows = max(1, min(512, 2**28 // kept))  # so that k and v take at most a gigabyte
    for start in tqdm(range(0, len(prompts), rows), label, leave=False, disable=None):
        chunk = [tokenizer.encode_ordinary(prompt) for prompt in prompts[start : start + rows]]
        for prompt, reply in zip(chunk, model.generate(chunk, end, limit, generator=generator)):
            examples.append(data.join_ids(prompt, reply))
            texts.append(tokenizer.decode(reply[:-1]) if reply[-1] == end else None)
    return examples, texts
