"""Which tokens of a fused context are recomputed: choosers, plain functions of one signature.

A chooser takes the tokens that may still be chosen and the number to keep, and returns indices into them, or None as
long as it cannot choose yet. The blender calls it before every layer; from the check layer on the deviations are known.
To add one, write a function of this signature, name its source, and enter it in `CHOOSERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NO_NEXT = 1 << 40  # where the chunk behind the last one would begin
_BORDER_TOKENS = 24  # at a border between chunks, on both sides together; more of them find less than the question does
_BEGIN_TOKENS = 4  # of a chunk, that are worth more than the last ones of the chunk before


@dataclass(frozen=True, slots=True, eq=False)
class CandidateTokens:
    """Tokens whose KV was cached elsewhere and that have a hidden state here, in ascending position.

    Attributes
    ----------
    positions : `[N]` int64, in the fused context.
    offsets : `[N]` int64, in the token's own chunk.
    deviation : `[N]` float32, how far the cached KV is from the KV computed in context; None before the check layer.
    value_deviation : `[N]` float32, the same of the values alone.
    to_next : `[N]` int64, from the token to the first one of the next chunk, at least 1; in the last chunk `NO_NEXT`
        less the position. None if the next chunks are not known.
    attention : gives `[2, N]` float32, how much the question attends to the tokens, see `question.question_attention`.
        The question runs through the model when this is called first, and not before. None if no question was given.
    """

    positions: Tensor
    offsets: Tensor
    deviation: Tensor | None
    attention: Callable[[], Tensor] | None = None
    value_deviation: Tensor | None = None
    to_next: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)


Chooser = Callable[[CandidateTokens, int], Tensor | None]


def places_in_chunks(positions: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """`offsets` and `to_next` of `CandidateTokens`: `[N]` each.

    Parameters
    ----------
    positions : `[N]` int64, none before the first start.
    starts : `[C]` int64, of the chunks, ascending.
    """
    chunk = torch.searchsorted(starts, positions, right=True) - 1
    following = torch.cat((starts[1:], starts.new_tensor([NO_NEXT])))
    return positions - starts[chunk], following[chunk] - positions


def kv_deviation(fresh_keys: Tensor, cached_keys: Tensor, fresh_values: Tensor, cached_values: Tensor) -> Tensor:
    """Distance between the cached and the fresh KV of each token.

    `sqrt(|dK|^2 / mean |K|^2 + |dV|^2 / mean |V|^2)`, norms over all heads, means over the tokens of this layer, so
    that neither keys nor values outweigh the other. CacheBlend (arXiv 2405.16444, section 4.3) defines the deviation
    over both; its released code compares values alone, unnormalised, and the LMCache port keys alone.

    Parameters
    ----------
    fresh_keys, cached_keys : `[H, N, D]`, rotated to the same positions.
    fresh_values, cached_values : `[H, N, Dv]`.

    Returns
    -------
    Tensor : `[N]` float32.
    """
    return deviation_of(squares(fresh_keys, cached_keys, fresh_values, cached_values))


def squares(fresh_keys: Tensor, cached_keys: Tensor, fresh_values: Tensor, cached_values: Tensor) -> Tensor:
    """What `deviation_of` needs of each token: `|dK|^2`, `|K|^2`, `|dV|^2`, `|V|^2`, as `[4, N]` float32.

    Each is a sum over heads, so that tensor-parallel ranks can add their rows. A row depends on its own token only, so
    that a context can be processed in slices. Arguments as for `kv_deviation`.
    """
    rows = []
    for fresh, cached in ((fresh_keys, cached_keys), (fresh_values, cached_values)):
        wide = fresh.float()
        rows += [(wide - cached.float()).square().sum(dim=(0, 2)), wide.square().sum(dim=(0, 2))]
    return torch.stack(rows)


def deviation_of(rows: Tensor) -> Tensor:
    """The deviation of every token, see `kv_deviation`, from the `squares` of all tokens of a layer."""
    off_keys, keys, off_values, values = rows
    tiny = torch.finfo(torch.float32).tiny
    total: Tensor = off_keys / keys.mean().clamp_min(tiny) + off_values / values.mean().clamp_min(tiny)
    return total.sqrt()


def value_deviation_of(rows: Tensor) -> Tensor:
    """The part of values in the deviation of every token: `sqrt(|dV|^2 / mean |V|^2)`, from the `squares`."""
    _, _, off_values, values = rows
    relative: Tensor = off_values / values.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return relative.sqrt()


def by_deviation(tokens: CandidateTokens, count: int) -> Tensor | None:
    """The `count` tokens of highest KV deviation: CacheBlend (arXiv 2405.16444, section 4.3)."""
    if tokens.deviation is None:
        return None
    return tokens.deviation.topk(count).indices.sort().values


def by_values(tokens: CandidateTokens, count: int) -> Tensor | None:
    """The `count` tokens whose values deviate most, as the code released with CacheBlend has it.

    Keys of a document computed near its lead tokens deviate everywhere once it stands far from them, and hide in layer
    1 what other documents have changed; values show it (decision 106).
    """
    if tokens.value_deviation is None:
        return None
    return tokens.value_deviation.topk(count).indices.sort().values


def by_values_and_question(tokens: CandidateTokens, count: int) -> Tensor | None:
    """As `by_deviation_and_question`, with the deviation of values alone."""
    if tokens.value_deviation is None:
        return None
    return _and_question(tokens, tokens.value_deviation, count)


def by_question(tokens: CandidateTokens, count: int) -> Tensor | None:
    """The `count` tokens that the question attends to most, in the cache as it is: naively fused before layer 0.

    Needs no deviations, so that no layer is computed for all tokens. The question's last token, from which the answer
    is sampled, counts as much as all together, and a token lends its score to its two neighbours, because what binds a
    value often stands right before it.

    Raises
    ------
    ValueError : no question was given.
    """
    return _question_scores(tokens).topk(count).indices.sort().values


def by_mean_attention(tokens: CandidateTokens, count: int) -> Tensor | None:
    """The `count` tokens that the question's tokens attend to most on average: the selection of ProphetKV (arXiv
    2602.02579), as far as its paper tells, and of FusionRAG (arXiv 2601.12904).

    Raises
    ------
    ValueError : no question was given.
    """
    return _attention(tokens)[0].topk(count).indices.sort().values


def by_deviation_and_question(tokens: CandidateTokens, count: int) -> Tensor | None:
    """Three quarters of the tokens by deviation, then the rest by the question's attention to what is left.

    Deviation finds what documents bind to one another, whatever is asked; the question finds what this answer needs, in
    few tokens. Without a question, all are chosen by deviation.
    """
    if tokens.deviation is None:
        return None
    return _and_question(tokens, tokens.deviation, count)


def _and_question(tokens: CandidateTokens, deviation: Tensor, count: int) -> Tensor:
    by_question = 0 if tokens.attention is None else count // 4
    chosen = deviation.topk(count - by_question).indices
    return _and_rest(chosen, _question_scores(tokens), by_question) if by_question else chosen.sort().values


def _and_rest(chosen: Tensor, scores: Tensor, count: int) -> Tensor:
    """What is chosen, and `count` more by their scores `[N]`, which are changed."""
    scores[chosen] = -torch.inf
    return torch.cat((chosen, scores.topk(count).indices)).sort().values


def by_first_and_question(tokens: CandidateTokens, count: int) -> Tensor | None:
    """Half of the tokens are the first ones of every chunk, the other half what the question attends to most.

    The first tokens go on with sentences that the chunk before begins (and EPIC's chooser mends nothing else); the
    question finds what this answer needs, wherever it stands. Neither needs deviations: no layer is computed for all
    tokens. Without a question, all are chosen by the deviation of values.
    """
    if tokens.attention is None:
        return by_values(tokens, count)
    firsts = tokens.offsets.argsort(stable=True)[: count - count // 2]
    return _and_rest(firsts, _question_scores(tokens), count // 2)


def by_borders_and_question(tokens: CandidateTokens, count: int) -> Tensor | None:
    """The tokens at borders between chunks, up to three quarters of all; the rest by the question's attention.

    What a border cuts has its beginning in the last tokens of one chunk and its end in the first tokens of the next,
    and both must see one another, whatever is asked; the question finds what this answer needs, wherever it stands.
    `_BORDER_TOKENS` at each border, the first `_BEGIN_TOKENS` of a chunk before the others (decision 139). Neither
    needs deviations: no layer is computed for all tokens. Without a question, all are chosen by the values' deviation.
    """
    if tokens.attention is None:
        return by_values(tokens, count)
    distance = tokens.offsets
    if tokens.to_next is not None:
        distance = torch.minimum(distance, tokens.to_next - 1 + _BEGIN_TOKENS)
    borders = int((tokens.offsets == 0).sum())
    at_borders = min(count - count // 4, _BORDER_TOKENS * borders)
    near = distance.argsort(stable=True)[:at_borders]
    return _and_rest(near, _question_scores(tokens), count - at_borders)


def by_first_and_values(tokens: CandidateTokens, count: int) -> Tensor | None:
    """Half of the tokens are the first ones of every chunk, the other half by the deviation of values."""
    if tokens.value_deviation is None:
        return None
    firsts = tokens.offsets.argsort(stable=True)[: count - count // 2]
    return _and_rest(firsts, tokens.value_deviation.clone(), count // 2)


def first_tokens(tokens: CandidateTokens, count: int) -> Tensor | None:
    """The first tokens of every chunk, equally many: EPIC's LegoLink (arXiv 2410.15332). Needs no deviations.

    The paper takes up to 32 a chunk; here the number follows from `count`, so that choosers compare at equal cost.
    """
    by_offset = tokens.offsets.argsort(stable=True)
    return by_offset[:count].sort().values


def random_tokens(tokens: CandidateTokens, count: int, *, seed: int = 0) -> Tensor | None:
    """`count` random tokens: the control that every other chooser must beat.

    It chooses where `by_deviation` does, after one full layer, so that the two differ in the choice alone.
    """
    if tokens.deviation is None:
        return None
    generator = torch.Generator().manual_seed(seed * 1_000_003 + len(tokens))
    chosen = torch.randperm(len(tokens), generator=generator)[:count].sort().values
    return chosen.to(tokens.positions.device)


def no_tokens(tokens: CandidateTokens, count: int) -> Tensor | None:
    """No tokens: naive reuse."""
    return tokens.positions[:0]


def deviation_and_first(tokens: CandidateTokens, count: int, *, first: int = 2) -> Tensor | None:
    """The first `first` tokens of every chunk (false sinks, arXiv 2410.15332), the rest of `count` by deviation."""
    if tokens.deviation is None:
        return None
    mandatory = tokens.offsets < first
    ranked = torch.where(mandatory, torch.inf, tokens.deviation)
    return ranked.topk(count).indices.sort().values


def _attention(tokens: CandidateTokens) -> Tensor:
    if tokens.attention is None:
        raise ValueError("tokens cannot be chosen by the question, because none was given: give question_ids")
    return tokens.attention()


def _question_scores(tokens: CandidateTokens) -> Tensor:
    """See `by_question`."""
    scores = _attention(tokens).sum(0)
    is_next = tokens.positions.diff() == 1
    best = scores.clone()
    best[1:] = torch.maximum(best[1:], scores[:-1].where(is_next, scores[1:]))
    best[:-1] = torch.maximum(best[:-1], scores[1:].where(is_next, scores[:-1]))
    return best


CHOOSERS: dict[str, Chooser] = {
    "deviation": by_deviation,
    "values": by_values,
    "values+question": by_values_and_question,
    "first+values": by_first_and_values,
    "first+question": by_first_and_question,
    "borders+question": by_borders_and_question,
    "question": by_question,
    "mean attention": by_mean_attention,
    "deviation+question": by_deviation_and_question,
    "first": first_tokens,
    "random": random_tokens,
    "none": no_tokens,
    "deviation+first": deviation_and_first,
}
