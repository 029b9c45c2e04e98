"""Synthetic contexts of the 8B shape with planted out-of-distribution queries: SYNTHETIC, and to be labelled so.

What is planted is what makes search over real keys hard (RetrievalAttention, arXiv 2409.10516, section 2.1): queries
read directions in which keys hardly vary, and lie far from all keys. Before rotation

    key   = norm (key_mean + A x + B c) + noise                 x: what the text is like, c: what can be asked for
    query = query_mean + A y + sharpness B z                    z: the c of some earlier token, blurred

- `x` and `c` are shared by all KV heads, so that the keys of a layer have a low rank (96 + 32 of H D). Both follow the
  text: runs of about 128 tokens share a topic, others a theme to ask for, tokens share a type (Zipf), the rest is the
  token's own.
- `A` and `B` are orthogonal, and differ from head to head. Of the variance of a key, only `content_ratio` lies in `B`;
  neighbours among keys are therefore neighbours in topic, hardly in what a query asks for. That alone makes inverted
  lists and graphs of keys miss: nothing is shaped after any index.
- `B` and the means lie in channel pairs that rotate by less than half a turn in 512K tokens; what a query finds does
  not depend on how far away it is. `A` lies in all pairs, and is smeared by rotation as real keys are.
- A few keys in 1,000 have a part along the query mean, and are found by many queries: heavy hitters.
- A query at position p asks for the content of a token drawn from `[0, p)`. Test queries stand behind the context and
  draw anew: what they ask for may never have been asked before.

In the control, queries are further tokens' keys: then neighbours of keys are what is asked for, and every index finds
them. The sizes of all parts are `Recipe`'s defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...core import RopeSpec
from ...retrieval.selector import LayerShape

Asking: TypeAlias = Literal["far", "like keys"]

THETA = 3_580_165_449.0  # of an 8B model of a million tokens (Llama-3-8B-1M)
_BLOCK_TOKENS = 8192
_TEXT_RANK, _CONTENT_RANK = 96, 32
_SLOW_PAIRS = 24
_RUN_TOKENS = 128
_TYPES = 4096


@dataclass(frozen=True, slots=True)
class Recipe:
    """How large the planted parts are.

    Attributes
    ----------
    key_norm, query_mean : lengths: of a key's part in A and B, of the mean of all queries.
    content_ratio : share of a key's variance that queries read.
    content_dims : of B, for each KV head.
    sharpness : length of a query's part in B.
    blur : noise on what is asked for, relative to its length.
    theme, kind, own : weights of topic, type and token itself in what can be asked for of a token.
    heavy_ratio, heavy_logits : share of heavy hitters, and how many nats their scores are up, on average.
    """

    key_norm: float = 15.0
    query_mean: float = 22.0
    content_ratio: float = 0.1
    content_dims: int = 16
    sharpness: float = 45.0
    blur: float = 0.5
    theme: float = 0.7
    kind: float = 0.5
    own: float = 0.5
    heavy_ratio: float = 0.002
    heavy_logits: float = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class PlantedContext:
    """SYNTHETIC keys, values and queries of one layer.

    Attributes
    ----------
    keys, values : `[H, S, D]`, token i at position i; keys after rotation.
    train_queries, train_positions : `[Hq, Q, D]` after rotation, `[Q]`: of the prompt itself, every so many tokens.
    queries, positions : the same of what is asked behind the context.
    """

    shape: LayerShape
    keys: Tensor
    values: Tensor
    train_queries: Tensor
    train_positions: Tensor
    queries: Tensor
    positions: Tensor

    def unrotated(self) -> Tensor:
        """Keys before rotation, `[H, S, D]`."""
        if self.shape.rope is None:
            return self.keys
        return self.shape.rope.shift(self.keys, -torch.arange(self.keys.shape[1]))


def planted(
    tokens: int,
    *,
    kv_heads: int = 1,
    group: int = 4,
    head_dim: int = 128,
    queries: int = 64,
    stride: int = 5,
    seed: int = 0,
    asking: Asking = "far",
    recipe: Recipe | None = None,
    dtype: torch.dtype = torch.float16,
) -> PlantedContext:
    """A context; see the file's docstring. 512K tokens of one KV head take some seconds and 0.6 GB.

    Parameters
    ----------
    queries : test queries, at positions from `tokens` on.
    stride : tokens between training queries.
    asking : "like keys" is the control.

    Raises
    ------
    ValueError : sizes that leave nothing to ask for.
    """
    if tokens < stride or stride < 1 or queries < 1 or head_dim < 4 * _SLOW_PAIRS:
        raise ValueError(
            f"tokens {tokens}, stride {stride}, queries {queries}, head_dim {head_dim}; "
            f"expected tokens >= stride >= 1, queries >= 1, head_dim >= {4 * _SLOW_PAIRS}"
        )
    recipe = recipe or Recipe()
    random = torch.Generator().manual_seed(seed)
    rope = RopeSpec(tuple(THETA ** -(2 * i / head_dim) for i in range(head_dim // 2)))
    shape = LayerShape(kv_heads, group, head_dim, head_dim**-0.5, rope)
    text = _Text(tokens + queries, recipe, random)
    heads = [_Head(shape, recipe, random) for _ in range(kv_heads)]
    keys = torch.empty(kv_heads, tokens + queries, head_dim, dtype=dtype)
    values = torch.empty(kv_heads, tokens, head_dim, dtype=dtype)
    for first in range(0, tokens + queries, _BLOCK_TOKENS):
        ids = torch.arange(first, min(first + _BLOCK_TOKENS, tokens + queries))
        x, c = text.of(ids, random)
        for h, head in enumerate(heads):
            keys[h, ids] = rope.shift(head.keys(x, c, random), ids).to(dtype)
            kept = ids[ids < tokens]
            values[h, kept] = head.values(x, c, random)[: len(kept)].to(dtype)
    where = torch.arange(stride - 1, tokens, stride)
    behind = torch.arange(tokens, tokens + queries)
    if asking == "like keys":
        asked = [keys[:, at].repeat_interleave(group, 0) for at in (where, behind)]
    else:
        asked = [
            _ask(at, min(tokens, int(at[-1]) + 1), text, heads, group, random, rope, dtype) for at in (where, behind)
        ]
    return PlantedContext(shape, keys[:, :tokens], values, asked[0], where, asked[1], behind)


def mahalanobis_gap(context: PlantedContext, head: int = 0) -> tuple[float, float]:
    """Mean Mahalanobis distance to the distribution of a KV head's keys: of the test queries of its group, of keys."""
    keys = context.keys[head, :: max(1, context.keys.shape[1] // 20_000)].double()
    mean, spread = keys.mean(0), torch.linalg.inv(keys.T.cov())
    group = context.shape.group
    asked = context.queries[head * group : (head + 1) * group].flatten(0, 1).double()
    far, near = (((x - mean) @ spread * (x - mean)).sum(-1).clamp(min=0).sqrt().mean() for x in (asked, keys))
    return float(far), float(near)


class _Text:
    """Draws for each token a topic that lasts for a run of tokens, a type, and a part of its own."""

    def __init__(self, tokens: int, recipe: Recipe, random: torch.Generator) -> None:
        topics = max(8, tokens // 512)
        self._topic, self._theme = (
            torch.randint(0, topics, (tokens,), generator=random)[
                (torch.rand(tokens, generator=random) < 1 / _RUN_TOKENS).cumsum(0)
            ]
            for _ in range(2)
        )
        frequency = 1.0 / torch.arange(1, _TYPES + 1)
        self._type = torch.multinomial(frequency, tokens, replacement=True, generator=random)
        self._topics, self._types = (torch.randn(n, _TEXT_RANK, generator=random) for n in (topics, _TYPES))
        self._themes, self._kinds = (torch.randn(n, _CONTENT_RANK, generator=random) for n in (topics, _TYPES))
        self._recipe = recipe

    def of(self, ids: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """`x` `[T, 96]` and `c` `[T, 32]`, each of unit variance."""
        own = torch.randn(len(ids), _TEXT_RANK, generator=random)
        x = 0.7 * self._topics[self._topic[ids]] + 0.5 * self._types[self._type[ids]] + 0.5 * own
        recipe = self._recipe
        c = self.content(ids) + recipe.own * torch.randn(len(ids), _CONTENT_RANK, generator=random)
        return x, c / (recipe.theme**2 + recipe.kind**2 + recipe.own**2) ** 0.5

    def content(self, ids: Tensor) -> Tensor:
        """Directions `[T, 32]` in which queries look for tokens, without each token's own part."""
        wanted: Tensor = (
            self._recipe.theme * self._themes[self._theme[ids]] + self._recipe.kind * self._kinds[self._type[ids]]
        )
        return wanted


class _Head:
    """The directions of one KV head."""

    def __init__(self, shape: LayerShape, recipe: Recipe, random: torch.Generator) -> None:
        D, half = shape.head_dim, shape.head_dim // 2
        n = recipe.content_dims
        slow = torch.zeros(D, n + 2)
        rows = torch.cat((torch.arange(half - _SLOW_PAIRS, half), torch.arange(D - _SLOW_PAIRS, D)))
        slow[rows] = torch.randn(len(rows), n + 2, generator=random)
        directions = torch.linalg.qr(
            torch.cat((slow, torch.randn(D, min(_TEXT_RANK, D - n - 2), generator=random)), 1)
        )[0]
        self._b, means, self._a = directions[:, :n], directions[:, n : n + 2], directions[:, n + 2 :]
        self._text = _orthonormal(_TEXT_RANK, self._a.shape[1], random)
        self._read = _orthonormal(_CONTENT_RANK, n, random)
        variance = recipe.key_norm**2
        self._a_size = (variance * (1 - recipe.content_ratio) / self._a.shape[1]) ** 0.5
        self._b_size = (variance * recipe.content_ratio / n) ** 0.5
        self._query_mean = recipe.query_mean * means[:, 0]
        self._key_mean = 8.0 * means[:, 1] - 4.0 * means[:, 0]
        self._value = torch.randn(_CONTENT_RANK, D, generator=random) / _CONTENT_RANK**0.5
        self._recipe, self._shape = recipe, shape

    def keys(self, x: Tensor, c: Tensor, random: torch.Generator) -> Tensor:
        recipe, D = self._recipe, self._shape.head_dim
        key = self._a_size * (x @ self._text) @ self._a.T + self._b_size * (c @ self._read) @ self._b.T
        heavy = torch.rand(len(x), generator=random) < recipe.heavy_ratio
        bonus = torch.empty(len(x)).exponential_(1 / recipe.heavy_logits, generator=random) * heavy
        key += (bonus / (self._shape.scale * recipe.query_mean**2))[:, None] * self._query_mean
        norm = (0.1 * torch.randn(len(x), 1, generator=random)).exp()
        made: Tensor = norm * (self._key_mean + key) + 0.2 * torch.randn(len(x), D, generator=random)
        return made

    def values(self, x: Tensor, c: Tensor, random: torch.Generator) -> Tensor:
        made: Tensor = c @ self._value + 0.5 * torch.randn(len(x), self._shape.head_dim, generator=random)
        return made

    def queries(self, wanted: Tensor, random: torch.Generator) -> Tensor:
        """For contents `[Q, 32]`."""
        recipe = self._recipe
        z = torch.nn.functional.normalize(wanted @ self._read, dim=-1)
        blur = recipe.blur * torch.randn(z.shape, generator=random) / z.shape[1] ** 0.5
        z = torch.nn.functional.normalize(z + blur, dim=-1)
        y = torch.randn(len(z), self._a.shape[1], generator=random)
        made: Tensor = self._query_mean + recipe.sharpness * z @ self._b.T + 0.4 * y @ self._a.T
        return made


def _ask(
    at: Tensor,
    visible: int,
    text: _Text,
    heads: list[_Head],
    group: int,
    random: torch.Generator,
    rope: RopeSpec,
    dtype: torch.dtype,
) -> Tensor:
    """Queries of all heads at positions `at`, each for a token before it and before `visible`: `[Hq, Q, D]`."""
    asked = torch.empty(
        len(heads) * group, len(at), heads[0].queries(torch.zeros(1, _CONTENT_RANK), random).shape[1], dtype=dtype
    )
    for i in range(len(asked)):
        target = (torch.rand(len(at), generator=random) * at.clamp(max=visible)).long()
        for rows in torch.arange(len(at)).split(_BLOCK_TOKENS):
            query = heads[i // group].queries(text.content(target[rows]), random)
            asked[i, rows] = rope.shift(query, at[rows]).to(dtype)
    return asked


def _orthonormal(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """`[rows, columns]` with orthonormal columns, times what keeps unit variance; rows >= columns."""
    made: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=random))[0]
    return made
