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
    rope_theta: float = 500_000.0
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


@torch.no_grad()
def start_near_retrieval(model: Model, seed: int) -> None:
    """Initialise heads of layers 0 and 1 as previous-token and induction heads; everything else small and random.

    The residual stream starts out divided: channel 0 is constant, the next ones hold the token itself, and each head of
    layer 0 has some of its own. Layer 0, head h attends at offset h + 1 (the constant drives q and k, whose phases over
    the fast RoPE pairs peak there) and writes a projection of the token found into its channels. Layer 1 matches what a
    query token carries with what key tokens carry, in the slow RoPE pairs where distance hardly rotates, and copies the
    token found: induction over one and over two tokens, and the value behind a name. Training is free to change all of
    it.
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
            if weight.ndim == 2:
                into_residual = name.startswith(("o_proj", "down_proj"))
                weight.copy_(
                    torch.randn(weight.shape, generator=g) * weight.shape[1] ** -0.5 * (std if into_residual else 1.0)
                )
    written = 40  # channels that each head of layer 0 writes
    own = c.hidden - c.heads * written  # channels [1, own) hold the token itself
    carried = [slice(1, own), *(slice(own + h * written, own + (h + 1) * written) for h in range(c.heads))]
    embedding = model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=g) * std)
    embedding[:, own:] *= 0.1
    embedding[:, 0] = 3 * std
    drive = float((embedding / embedding.square().mean(-1, keepdim=True).sqrt())[:, 0].mean())

    first, second = cast("Layer", model.layers[0]), cast("Layer", model.layers[1])
    half, group, dim = c.head_dim // 2, c.heads // c.kv_heads, c.head_dim
    amplitude = torch.tensor([1, 1, 1, 0.8, 0.6, 0.5, 0.4, 0.3, 0.3, 0.2, 0.2, 0.2])
    fast = len(amplitude)
    amplitude *= (18.0 * dim**0.5 / float(amplitude.square().sum())) ** 0.5  # a score of 18 at the right offset
    phases = model.inv_freq[:fast].cpu()
    first.q_proj.weight.mul_(0.1)
    first.k_proj.weight.mul_(0.1)
    first.v_proj.weight.zero_()
    first.o_proj.weight.zero_()
    projection = orthonormal(written, own - 1)
    for kv_head in range(c.kv_heads):
        rows = kv_head * dim
        first.k_proj.weight[rows : rows + fast, 0] = amplitude / drive
        first.v_proj.weight[rows : rows + written, carried[0]] = projection
    for head in range(c.heads):
        rows, offset = head * dim, head + 1
        first.q_proj.weight[rows : rows + fast, 0] = amplitude * torch.cos(-offset * phases) / drive
        first.q_proj.weight[rows + half : rows + half + fast, 0] = amplitude * torch.sin(-offset * phases) / drive
        first.o_proj.weight[carried[head + 1], rows : rows + written] = torch.eye(written) * std

    slow = torch.arange(18, half)
    channels = torch.cat((slow, slow + half))
    # (KV head, what its keys carry, what the queries of its group carry): 0 is the token itself, n the nth before.
    matches = (
        (0, (1, 2), ((0,), (0, 1))),  # after this token; after these two tokens
        (1, (2,), ((0,), (4,))),  # two after this token; two after the fourth before, where a question's name ends
    )
    for kv_head, key_parts, members in matches:
        second.q_proj.weight[kv_head * group * dim :][: group * dim] *= 0.3
        second.k_proj.weight[kv_head * dim :][:dim] *= 0.3
        compress = [orthonormal(len(channels), written) * 2.5 for _ in key_parts]
        rows = kv_head * dim
        for part, matrix in zip(key_parts, compress, strict=True):
            second.k_proj.weight[rows + channels, carried[part]] = matrix
        copied = orthonormal(dim, own - 1)
        second.v_proj.weight[rows : rows + dim] = 0.0
        second.v_proj.weight[rows : rows + dim, carried[0]] = copied
        for member, query_parts in enumerate(members):
            column = (kv_head * group + member) * dim
            for part, matrix in zip(query_parts, compress, strict=False):
                second.q_proj.weight[column + channels, carried[part]] = matrix @ projection if part == 0 else matrix
            second.o_proj.weight[:, column : column + dim] = 0.0
            second.o_proj.weight[carried[0], column : column + dim] = copied.T * std
