"""The method written straightforwardly, as the yardstick of benchmarks/model.py: same weights, same result, no care for speed.

Captions are padded to the text limit; every token goes through the head, masked or not, and the loss is masked afterwards;
conditions, targets and masks are repeated for the timesteps; generation aligns the text and projects its keys and values
again at every step, and runs the head on all tokens; attention is torch's fused kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fluid_core.diffusion.objectives import add_noise, token_loss
from fluid_core.diffusion.solvers import solve
from fluid_core.generation.guidance import guide
from fluid_core.model.draws import TrainingDraws
from fluid_core.model.fluid import FluidModel, drop_captions
from fluid_core.model.layers import unit_norm


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, gain: Tensor, mask: Tensor | None) -> Tensor:
    B, N, D = q.shape

    def split(x: Tensor) -> Tensor:
        return x.view(B, x.shape[1], heads, D // heads).transpose(1, 2)

    q, k, v = unit_norm(split(q)) * gain.to(q.dtype), unit_norm(split(k)), split(v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, N, D)


def _self_attention(layer: torch.nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    return layer.out(_attention(q, k, v, layer.heads, layer.gain, mask))


def conditions(model: FluidModel, tokens: Tensor, hidden: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """z (B, N, D) of every token, from the raw text states."""
    mask = text_mask[:, None, None, :]
    aligner, trunk = model.aligner, model.trunk
    y = aligner.project(text) + aligner.positions(text.shape[1])
    for block in aligner.blocks:
        y = y + _self_attention(block.attention, block.norm1(y), mask)
        y = y + block.mlp(block.norm2(y))
    y = aligner.norm(y)
    grid = (model.config.grid, model.config.grid)
    x = trunk.norm_in(trunk.embed_tokens(tokens, hidden) + trunk.positions(grid))
    for block in trunk.blocks:
        x = x + _self_attention(block.attention, block.norm1(x), None)
        k, v = block.cross.kv(y).chunk(2, dim=-1)
        q = block.cross.q(block.norm2(x))
        x = x + block.cross.out(_attention(q, k, v, block.cross.heads, block.cross.gain, mask))
        x = x + block.mlp(block.norm3(x))
    return trunk.norm_out(x) + trunk.head_positions(grid)


def training_loss(
    model: FluidModel, tokens: Tensor, text: Tensor, text_mask: Tensor, null: Tensor, draws: TrainingDraws,
    times: Tensor, noise: Tensor,
) -> Tensor:  # fmt: skip
    """The mean loss of the masked tokens. `times` (R, B * N) and `noise` (R, B * N, C) hold draws for every token."""
    objective, repeats = model.config.objective, model.config.timesteps_per_token
    text, text_mask = drop_captions(text, text_mask, null, draws.drop_text_B)
    z = conditions(model, tokens, draws.mask_BN, text, text_mask).flatten(0, 1).repeat(repeats, 1)
    target = tokens.flatten(0, 1).repeat(repeats, 1)
    mask = draws.mask_BN.flatten().repeat(repeats)
    x_t, steps = add_noise(objective, target, noise.flatten(0, 1), times.flatten())
    prediction = model.head(x_t, steps, model.head.embed_condition(z))
    loss = token_loss(objective, prediction, target, noise.flatten(0, 1), x_t, times.flatten())
    return (loss * mask).sum() / mask.sum()


@torch.no_grad()
def generate(
    model: FluidModel, texts: list[Tensor], null: Tensor, tokens: Tensor, known: Tensor, orders: Tensor, noise: Tensor,
    counts: list[int], head_steps: int, scale: float, solver: str,
) -> Tensor:  # fmt: skip
    """Tokens (B, N, C) with constant guidance, those that are `known` (B, N) from `tokens` (B, N, C).

    `orders` (B, the others) and `noise` (B, N, C) are the images' own.
    """
    B, N, C = noise.shape
    longest = model.config.max_text_tokens
    text = torch.zeros(2 * B, longest, model.config.text_width)
    mask = torch.zeros(2 * B, longest, dtype=torch.bool)
    for i, states in enumerate([*texts, *[null] * B]):
        text[i, : len(states)], mask[i, : len(states)] = states, True
    text = text.to(model.trunk.placeholder.dtype)
    tokens, known, done = tokens.clone(), known.clone(), 0
    for count in counts:
        z = conditions(model, tokens.repeat(2, 1, 1), ~known.repeat(2, 1), text, mask)
        conditional, unconditional = (model.head.embed_condition(part.flatten(0, 1)) for part in z.chunk(2))

        def predict(x: Tensor, step: float, c: Tensor = conditional, u: Tensor = unconditional) -> Tensor:
            time = torch.full((len(x),), step)
            return guide(model.head(x, time, c), model.head(x, time, u), torch.tensor(scale), C)

        flat = solve(model.config.objective, solver, predict, noise.flatten(0, 1), head_steps, 1.0, lambda i: noise[0])
        sampled = flat.view(B, N, C)
        places = orders[:, done : done + count]
        rows = torch.arange(B)[:, None]
        tokens[rows, places], known[rows, places] = sampled[rows, places], True
        done += count
    return tokens
