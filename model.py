"""A transformer with the architecture of GPT-2 (Radford et al. 2019): policy and reference alike.

Shapes, here and in every file:
    B batch    T tokens of a sequence    C n_embd    H n_head    D = C / H    V vocab_size

There is no dropout. DPO compares log π_θ(y|x) with log π_ref(y|x), which must differ by what was
learnt and by nothing else. Noise in either is noise in the margin, and loss 0 would not be ln 2.
"""

import os
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 128  # longest sequence in tokens: positions are learnt, so there are no more
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "n_embd must be a multiple of n_head"
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:  # generate() feeds only new tokens: the old ones' k and v are kept
            so_far = mask.shape[-1]
            cache[:, :, :, so_far - T : so_far] = torch.stack([k, v])  # (2, B, H, longest, D)
            k, v = cache[:, :, :, :so_far]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(approximate="tanh"),  # as in GPT-2
            nn.Linear(4 * config.n_embd, config.n_embd),
        )

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    autocast_bfloat16 = False  # True: forward() multiplies in bfloat16; weights stay as they are

    def __init__(self, config):
        super().__init__()
        self.config, self.learnt = config, {}  # learnt: what save() notes about its texts
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # weight tying
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # GPT-2's 0.02 suits a width of 768; a narrow model learns far faster from 0.08.
                nn.init.normal_(weight, std=0.02 if config.n_embd >= 512 else 0.08)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def hidden(self, ids, positions=None, mask=None, caches=None):
        """The states before the last projection: ids (B, T) -> (B, T, C).

        Without a mask, token t sees tokens 0..t. The other arguments are generate()'s. Raises
        ValueError where T exceeds the block size.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        if ids.shape[1] > self.config.block_size:
            size = self.config.block_size
            raise ValueError(f"{ids.shape[1]} tokens do not fit the block size of {size}")
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, caches[i] if caches else None)
        return self.ln_f(x)  # (B, T, C)

    def forward(self, ids, first=0):
        """ids (B, T) -> logits (B, T - first, V): [:, t] predicts token first + t + 1."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast_bfloat16):
            return self.lm_head(self.hidden(ids)[:, first:])

    @torch.no_grad()
    def generate(self, prompts, end, max_new_tokens, temperature=1.0, generator=None):
        """Sample one response to each prompt.

        prompts: B lists of token ids, of any lengths >= 1. Returns B lists of new ids. `end`, the
        end-of-text id, closes a response and is part of it; a response without it was cut off at
        max_new_tokens. Temperature 0 takes the likeliest token. generator: a torch.Generator on the
        model's device. Raises ValueError where a response could outgrow the block size.
        """
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.config.block_size:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit "
                f"the block size of {self.config.block_size}"
            )
        # Prompts are padded on the left, so that all rows grow at the same end.
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        ids = torch.tensor(padded, device=self.wte.weight.device)  # (B, T)
        start = torch.tensor([[longest - len(p)] for p in prompts], device=ids.device)  # (B, 1)
        positions = torch.arange(longest, device=ids.device) - start  # (B, T): 0 where it starts
        real, positions = positions >= 0, positions.clamp(min=0)  # (B, T) each
        causal = torch.ones(longest, longest, dtype=torch.bool, device=ids.device).tril()
        mask = causal & real[:, None, :]  # (B, T, T)
        # A pad that sees nothing would be NaN, so every token sees itself.
        mask |= torch.eye(longest, dtype=torch.bool, device=ids.device)
        mask = mask[:, None]  # (B, 1, T, T): the same for all heads
        heads = self.config.n_head
        room = 2, len(prompts), heads, longest + max_new_tokens, self.config.n_embd // heads
        caches = [self.wte.weight.new_empty(room) for _ in self.blocks]
        responses = [[] for _ in prompts]
        rows = torch.arange(len(prompts), device=ids.device)  # which prompt each row answers
        alive = torch.ones_like(rows, dtype=torch.bool)  # rows that are not finished
        for _ in range(max_new_tokens):
            hidden = self.hidden(ids, positions, mask, caches)[alive, -1]  # (those alive, C)
            ids = ids.new_full((len(rows), 1), end)  # (B, 1)
            ids[alive] = sample(self.lm_head(hidden), temperature, generator)
            for row, token in zip(rows[alive].tolist(), ids[alive, 0].tolist()):
                responses[row].append(token)
            alive = ids[:, 0] != end
            if not alive.any():
                break
            if 2 * alive.sum() <= len(rows):  # seldom, since this copies the caches
                rows, ids, real, positions = (t[alive] for t in (rows, ids, real, positions))
                caches = [cache[:, alive] for cache in caches]
                alive = alive[alive]
            real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)  # (B, T so far)
            mask = real[:, None, None]  # (B, 1, 1, T so far): a new token sees every real one
            positions = positions[:, -1:] + 1  # (B, 1)
        return responses


def sample(logits, temperature, generator=None):
    """One token from each row: logits (B, V) -> (B, 1). Raises FloatingPointError on NaN or inf."""
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if logits.dtype != torch.float64:
        logits = logits.float()
    cumulative = F.softmax(logits / temperature, dim=-1).cumsum(dim=-1)  # (B, V)
    # The first token whose cumulative probability reaches a uniform number. It is multiplied by
    # the last cumulative value, because rounding may keep that from being exactly 1.
    # (torch.multinomial draws V numbers per row instead of one, which is slow on a CPU.)
    chance = 1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)  # (0, 1]
    return (cumulative < chance * cumulative[:, -1:]).sum(dim=-1, keepdim=True)


def save(path, model, **extra):
    """Write a plain dict that rebuilds the model anywhere; never leaves half a file at `path`.

    Raises OSError where it cannot be written, FloatingPointError where a weight is not finite.
    """
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError(f"the weights for {path} are not finite")
    state = {"config": asdict(model.config), "learnt": model.learnt, **extra}
    try:
        torch.save(state | {"weights": model.state_dict()}, f"{path}.tmp")
    except RuntimeError as error:  # torch.save's name for a failed write
        raise OSError(f"cannot write {path}.tmp: is the disk full?") from error
    os.replace(f"{path}.tmp", path)


def load(path, device="cpu"):
    """-> (model in eval mode, the whole dict). Raises OSError, or ValueError, which says what does
    not fit."""
    try:
        state = dict(torch.load(path, map_location=device, weights_only=True))
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # truncated, foreign, pickled code: torch raises many kinds
        raise ValueError(f"{path} is not a whole checkpoint of this project") from error
    try:
        model = GPT(GPTConfig(**state["config"])).to(device)
        model.load_state_dict(state["weights"])
        model.learnt = state.get("learnt", {})
    except KeyError as error:
        raise ValueError(f"{path} is no checkpoint of this project: it has no {error}") from error
    except Exception as error:  # torch names all that is missing or has another shape, at length
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} does not fit model.py: {reason}") from error
    return model.eval(), state
