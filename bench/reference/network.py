"""The reference model's network, and the weights from which it learns to retrieve in minutes."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tokenizer import VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class ModelConfig:
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    vocab: int = VOCAB_SIZE
    rope_theta: float = 10_000_000.0
    norm_eps: float = 1e-5


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        normed: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return normed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate half-split pairs of x `[B, H, T, D]` by cos and sin `[B, 1, T, D/2]`."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All `[B, H, T, D]`. Short sequences spelled out: on a CPU, compiled, a third faster than the fused kernel."""
    tokens = q.shape[2]
    if tokens > 512 or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores: Tensor = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.input_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (batch, tokens, _) = self.c, x.shape
        h = self.input_layernorm(x)
        q = self.q_proj(h).view(batch, tokens, c.heads, c.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(batch, tokens, c.kv_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(h).view(batch, tokens, c.kv_heads, c.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        group = c.heads // c.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = _causal_attention(q, k, v)
        x = x + self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.post_attention_layernorm(x)
        feed_forward: Tensor = self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return x + feed_forward


class Model(nn.Module):
    """Llama with tied embeddings; parameter names map one to one onto Hugging Face's."""

    inv_freq: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.norm_eps)
        half = c.head_dim // 2
        frequencies = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("inv_freq", frequencies.float(), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None, :, None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


CIRCUIT = r"layers\.[012]\.[qkvo]_proj"  # the matrices in which `start_near_retrieval` initialises heads


def _recency(frequencies: Tensor) -> Tensor:
    """Coefficients of the cosines and of the sines `[2, n]` of a score that falls by the logarithm of the distance."""
    distance = torch.logspace(0.2, 3.8, 400, dtype=torch.float64)
    phases = distance[:, None] * frequencies.double()
    basis = torch.cat((phases.cos(), phases.sin()), 1)
    score = 40.0 - 4.0 * torch.log1p(distance / 4.0)
    ridge = torch.eye(basis.shape[1], dtype=torch.float64)
    coefficients: Tensor = torch.linalg.solve(basis.T @ basis + ridge, basis.T @ score)
    return coefficients.view(2, -1).float()


@torch.no_grad()
def start_near_retrieval(model: Model, seed: int, *, names: list[int], values: list[int], is_: int) -> None:
    """Initialise heads of layers 0 to 2 as a retrieval circuit; everything else starts by adding nothing.

    The residual stream starts out divided: channel 0 is constant, 1 marks names, 2 marks values, the next ones hold the
    token itself, and each head below has some of its own.

    - Layer 0 attends 1, 4 and 6 tokens back (the constant drives q and k, whose phases over some RoPE pairs peak
      there): the colon after a question then carries the name in question, and the end of an alias statement the other
      name. Its last head lets a value attend to the last name before it, however far: its entity, as a first guess.
      Other tokens see there what stands right before them.
    - Layer 1 matches what a query token carries with what key tokens carry, in the slow RoPE pairs where distance
      hardly rotates: one head copies what followed the same token before (induction), one finds for a value whether its
      entity is the alias of another.
    - Layer 2 copies the value whose entity, or whose other entity, is the name in question, if "is" stands before it.

    Training is free to change all of it. Values are found in layer 2 so that their KV must have passed through a layer
    behind the one that bound them to their entity, as in deep models: in layer 1 already all KV is exact where fusion
    computes one layer in full.

    Parameters
    ----------
    names : tokens in which a name ends.
    values : tokens with which a value begins.
    is_ : the token before a value.
    """
    c = model.c
    g = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int, columns: int) -> Tensor:
        """Orthonormal rows, or columns if these are fewer."""
        q: Tensor = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=g))[0]
        return q if rows >= columns else q.T

    # A large embedding behind a small final norm: at a small scale, Adam's common drift of all rows of a tied embedding
    # drowns what tells tokens apart within a few hundred steps, and the heads below with it.
    std = 0.5
    model.norm.weight.fill_(0.08)
    for layer in model.layers:
        for name, weight in layer.named_parameters():
            if name.startswith(("o_proj", "down_proj")):
                weight.zero_()
            elif weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=g) * weight.shape[1] ** -0.5)
    width = 32  # channels that a head writes
    own = c.hidden - 5 * width
    itself = slice(3, own)
    one_before, four_before, six_before, entity, other_entity = (
        slice(start, start + width) for start in range(own, c.hidden, width)
    )
    embedding = model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=g) * std)
    embedding[:, own:] *= 0.02
    embedding[:, 1:3] = -3 * std
    embedding[:, 0] = embedding[names, 1] = embedding[values, 2] = 3 * std
    drive = 3 * std / float(embedding.square().mean(-1).sqrt().mean())

    first, second, third = (cast("Layer", model.layers[i]) for i in range(3))
    half, group, dim = c.head_dim // 2, c.heads // c.kv_heads, c.head_dim
    projection = orthonormal(width, own - 3)
    first.q_proj.weight.mul_(0.05)
    first.k_proj.weight.mul_(0.05)
    near = torch.tensor([0, 1, 2, 4, 6, 8, 10])  # RoPE pairs that tell offsets apart
    amplitude = torch.tensor([1, 1, 1, 0.7, 0.5, 0.3, 0.2])
    amplitude *= (30.0 * dim**0.5 / float(amplitude.square().sum())) ** 0.5 / drive  # a score of 30 at the right offset
    phases = model.inv_freq[near].cpu()
    for kv_head in range(c.kv_heads):
        rows = kv_head * dim
        first.k_proj.weight[rows + near, 0] = amplitude
        first.v_proj.weight[rows : rows + dim] = 0.0
        first.v_proj.weight[rows : rows + width, itself] = projection
    for head, (offset, target) in enumerate(((1, one_before), (4, four_before), (6, six_before))):
        column = head * dim
        first.q_proj.weight[column + near, 0] = amplitude * torch.cos(-offset * phases)
        first.q_proj.weight[column + half + near, 0] = amplitude * torch.sin(-offset * phases)
        first.o_proj.weight[target, column : column + width] = torch.eye(width) * std
    recent = torch.tensor([3, 5, 7, 9, *range(11, 25)])  # RoPE pairs that tell near from far
    cosines, sines = _recency(model.inv_freq[recent].cpu()) * dim**0.5 / 5.0 / drive
    first.k_proj.weight[(c.kv_heads - 1) * dim + recent, 1] = 5.0 / drive
    first.q_proj.weight[(c.heads - 1) * dim + recent, 2] = cosines
    first.q_proj.weight[(c.heads - 1) * dim + half + recent, 2] = -sines
    first.o_proj.weight[entity, (c.heads - 1) * dim :][:, :width] = torch.eye(width) * std

    slow = torch.arange(half - width // 2, half - 1)
    channels = torch.cat((slow, slow + half))  # the slowest pair is left for a bias

    def match(layer: Layer, kv_head: int, query: slice, key: slice, target: slice) -> None:
        """Let the first query head of a KV head find keys that carry in `key` what the query carries in `query`."""
        rows, column = kv_head * dim, kv_head * group * dim
        copied = orthonormal(dim, own - 3) if target == itself else projection
        layer.v_proj.weight[rows : rows + dim] = 0.0
        layer.v_proj.weight[rows : rows + len(copied), itself] = copied
        written = copied.T if target == itself else torch.eye(width)
        layer.o_proj.weight[target, column : column + len(copied)] = written * std
        layer.q_proj.weight[column : column + dim] *= 0.05
        layer.k_proj.weight[rows : rows + dim] *= 0.05
        rotation = orthonormal(len(channels), width) * 2.5
        layer.k_proj.weight[rows + channels, key] = rotation
        layer.q_proj.weight[column + channels, query] = rotation @ projection if query == itself else rotation

    match(second, 0, itself, one_before, itself)
    match(second, 1, entity, six_before, other_entity)
    # Values of layer 1 show the entity, though no head reads it from there yet.
    second.v_proj.weight[(c.kv_heads - 1) * dim + width :, entity] = 3.0 * torch.eye(width)
    match(third, 0, four_before, entity, itself)
    match(third, 1, four_before, other_entity, itself)
    word = projection @ embedding[is_, itself]
    for kv_head in range(c.kv_heads):  # a score of about 12 more for keys behind "is"
        third.q_proj.weight[kv_head * group * dim + half - 1, 0] = 3.0
        third.k_proj.weight[kv_head * dim + half - 1, one_before] = (
            12.0 * dim**0.5 / 10.0 * 0.5 * word / word.square().sum()
        )
