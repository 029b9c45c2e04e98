"""Decoding through retrieval inside an attention backend of vLLM: which tokens of a step, and what stays as it was.

Two classes to be put before a backend's own builder and implementation. The builder sorts the rows of a step: requests
that decode one token behind a context beyond the break-even go through an index, all others (prompts, short contexts,
drafts) through the backend, as a batch of their own. Layers that cannot be searched (windows, sinks, soft caps, ALiBi,
shared or quantised caches) get the whole batch as ever. KV stays in the engine's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .paged_index import PagedRetrieval
from .rows import DecodeRow, PromptPart, kept_queries
from .start import open_layers

_SPLIT = "kvloom"  # by this attribute of the backend's own metadata a layer finds it


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The rows of one step.

    Attributes
    ----------
    step : its number.
    rows : that go through indexes.
    dense : metadata of the others, as the backend makes it; None if there are none.
    dense_tokens : theirs, `[T]` int64.
    prompt : tokens of prompts, for indexes that learn from their queries.
    growing : prompts beyond the break-even, as far as they will be computed behind this step.
    """

    step: int
    rows: Sequence[DecodeRow]
    dense: Any
    dense_tokens: Tensor
    prompt: PromptPart | None
    growing: Sequence[DecodeRow] = ()


class RetrievingBuilder:
    """Before an `AttentionMetadataBuilder`."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any, **more: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **more)  # type: ignore[call-arg]
        self.retrieving = open_layers(super().build, kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[misc]
        self.steps = 0

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        stock = super().build  # type: ignore[misc]
        metadata = stock(common_prefix_len, common_attn_metadata, fast_build)
        found = sorted_rows(common_attn_metadata, self.retrieving.layers, self.retrieving.break_even_tokens)
        if found is None:
            return metadata
        rows, dense_rows, prompt, growing = found
        self.steps += 1
        dense, tokens = None, torch.empty(0, dtype=torch.int64)
        if rows and dense_rows:
            part, tokens = batch_of(common_attn_metadata, dense_rows)
            dense = stock(0, part, fast_build)
        setattr(metadata, _SPLIT, Split(self.steps, rows, dense, tokens, prompt, growing))
        return metadata


class RetrievingImpl:
    """Before an `AttentionImpl`."""

    retrieving: PagedRetrieval | None = None  # given by the builder, when the caches' shape is known

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]
        if self.retrieving is not None:
            self.retrieving.wrote(slot_mapping, kv_cache.shape[0])

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Any,
        value: Any,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        stock, split = super().forward, getattr(attn_metadata, _SPLIT, None)  # type: ignore[misc]
        ours = self.retrieving
        if ours is None or split is None:
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if split.prompt is not None and ours.learns:
            ours.heard(split.prompt, query)
        if not split.rows:
            ours.grow(split.step, split.growing, kv_cache)
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if split.dense is not None:
            tokens = split.dense_tokens.to(query.device)
            part = torch.empty_like(output[tokens])
            stock(layer, query[tokens], key[tokens], value[tokens], kv_cache, split.dense, part, *args, **kwargs)
            output[tokens] = part
        tokens = [row.token for row in split.rows]
        found = self.retrieve(ours, layer, split.step, split.rows, query[tokens], kv_cache)
        output[tokens] = found.view(len(tokens), *output.shape[1:])
        ours.grow(split.step, split.growing, kv_cache)  # last: an index that a row decodes with is not a prompt's
        return output

    def retrieve(
        self, ours: PagedRetrieval, layer: Any, step: int, rows: Sequence[DecodeRow], queries: Tensor, cache: Tensor
    ) -> Tensor:
        """See `PagedRetrieval.attend`; by the backend's own kernel if it has `attend_to_blocks`."""
        kernel = getattr(self, "attend_to_blocks", None)
        return ours.attend(step, rows, queries, cache, None if kernel is None else partial(kernel, layer))


def sorted_rows(
    cam: Any, layers: Sequence[PagedRetrieval], break_even_tokens: int
) -> tuple[list[DecodeRow], list[int], PromptPart | None, list[DecodeRow]] | None:
    """The rows of a step: those that go through indexes, the numbers of the others, queries to be kept, and prompts
    whose indexes may grow.

    Parameters
    ----------
    cam : vLLM's `CommonAttentionMetadata`.

    Returns
    -------
    None if the whole step is the backend's: no layer retrieves, or nobody says which rows are prompts (passes outside
    of the engine's schedule).
    """
    if not layers or cam.is_prefilling is None or cam.causal is not True:
        return None
    first, count = layers[0], cam.num_reqs
    starts, lengths = cam.query_start_loc_cpu[: count + 1].tolist(), cam.seq_lens[:count].tolist()
    is_prompt = cam.is_prefilling[:count].tolist()
    learns = any(layer.learns for layer in layers)
    rows: list[DecodeRow] = []
    others: list[int] = []
    growing: list[DecodeRow] = []
    tokens: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []
    for number in range(count):
        begin, end, length = starts[number], starts[number + 1], lengths[number]
        if begin == end:
            continue
        position = length - 1
        if end - begin == 1 and not is_prompt[number] and position >= break_even_tokens and first.stop(position):
            rows.append(_row(cam, number, begin, position, first.block_tokens))
            continue
        others.append(number)
        if not learns and is_prompt[number] and position >= break_even_tokens and first.stop(position):
            growing.append(_row(cam, number, begin, position, first.block_tokens))
        if learns and is_prompt[number]:
            kept = kept_queries(length - (end - begin), length)
            row = cam.block_table_tensor[number].tolist()
            tokens += [at - length + end for at in kept]
            positions += kept
            blocks += [row[at // first.block_tokens] for at in kept]
    prompt = PromptPart(torch.tensor(tokens), torch.tensor(positions), blocks) if tokens else None
    return (rows, others, prompt, growing) if rows or growing or prompt is not None else None


def _row(cam: Any, number: int, token: int, position: int, block_tokens: int) -> DecodeRow:
    blocks = cam.block_table_tensor[number, : position // block_tokens + 1]
    return DecodeRow(number, token, position, blocks.to("cpu", torch.int64, copy=True))


def batch_of(cam: Any, rows: Sequence[int]) -> tuple[Any, Tensor]:
    """Metadata of some rows of a step alone, and which tokens of the batch are theirs."""
    starts = cam.query_start_loc_cpu.tolist()
    counts = [starts[row + 1] - starts[row] for row in rows]
    tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
    begins = torch.tensor([0, *counts], dtype=cam.query_start_loc_cpu.dtype).cumsum(0, dtype=torch.int32)
    device = cam.query_start_loc.device
    chosen, here = torch.tensor(rows, device=device), tokens.to(device)
    lengths = cam.seq_lens[chosen]
    upper = cam.seq_lens_cpu_upper_bound
    part = replace(
        cam,
        query_start_loc=begins.to(device),
        query_start_loc_cpu=begins,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=None if upper is None else upper[torch.tensor(rows)],
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        max_query_len=max(counts),
        max_seq_len=int(lengths.max()),
        block_table_tensor=cam.block_table_tensor[chosen],
        slot_mapping=cam.slot_mapping[here],
        positions=None if cam.positions is None else cam.positions[here],
        is_prefilling=cam.is_prefilling[torch.tensor(rows)],
        # what belongs to requests by their number in the whole batch, and is of models that do not come here
        logits_indices_padded=None,
        num_logits_indices=None,
        req_idx=None if cam.req_idx is None else cam.req_idx[list(rows)],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    return part, tokens
