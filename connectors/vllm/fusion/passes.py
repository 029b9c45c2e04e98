"""The engine's own forward pass over chosen tokens of one request, outside of its schedule.

Every run of neighbouring positions `[a, b)` is given to the attention backend as a request of its own: a query of
`b - a` tokens behind a context of `b`, with the same row of blocks. A layer writes its keys and values before it
attends, so later runs see what earlier ones have just written: causal by construction, for any architecture, rotation,
quantised weights and tensor parallelism, without a line that knows the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ....blend.question import attention_with_weights
from ....errors import EngineError
from ..paged_layers import PagedLayers


class _SeenError(Exception):
    """Leaves the model from within, with what an attention layer was given."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class EnginePasses:
    """Runs the loaded model on tokens of a request.

    Parameters
    ----------
    vllm_config, kv_cache_spec : vLLM's own.
    model : the loaded model.
    cache : its layers.
    """

    def __init__(self, vllm_config: Any, kv_cache_spec: Any, model: nn.Module, cache: PagedLayers) -> None:
        self._config = vllm_config
        self._model = model
        self._cache = cache
        self._names = [layer.layer_name for layer in cache.layers]
        # An own builder: the runner's keeps buffers from one step to the next.
        builder = cache.layers[0].attn_backend.get_builder_cls()
        self._builder = builder(kv_cache_spec, self._names, vllm_config, cache.device)
        scheduler = vllm_config.scheduler_config
        self.max_tokens = int(scheduler.max_num_batched_tokens)
        # Builders on devices keep buffers of so many requests; the processor's does not.
        self.max_runs = int(scheduler.max_num_seqs) if cache.device.type == "cuda" else self.max_tokens

    def compute(self, token_ids: NDArray[np.int64], positions: Tensor, blocks: Sequence[int]) -> None:
        """All layers, for the tokens at `positions` (ascending, `[T]` int64) of a request; writes their KV.

        Parameters
        ----------
        token_ids : of the whole request.
        """
        self._forward(token_ids, positions, blocks, skip_compiled=False)

    def keys_and_values(
        self, layer: int, token_ids: NDArray[np.int64], positions: Tensor, blocks: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `compute`, up to what `layer` is given: keys `[H, T, D]` after rotation and values `[H, T, Dv]`."""

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
            raise _SeenError(given["key"], given["value"])

        module = self._cache.layers[layer]
        hook = module.register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self._forward(token_ids, positions, blocks, skip_compiled=True)
        except _SeenError as seen:
            heads, cache = self._cache.num_kv_heads, self._cache
            keys = seen.keys.view(-1, heads, cache.head_dim).transpose(0, 1)
            return keys, seen.values.view(-1, heads, cache.v_head_dim).transpose(0, 1)
        finally:
            hook.remove()
        raise EngineError(f"the model ran through without asking attention layer {module.layer_name}")

    def question_attention(
        self, question_ids: NDArray[np.int64], first: int, context_tokens: int, blocks: Sequence[int]
    ) -> Tensor:
        """How much a question attends to the context in its blocks: `[2, context_tokens]` float32, see
        `blend.question.question_attention`; of this rank's heads.

        The question's own keys and values need no slots: its attention is computed here, in place of the backend's,
        which gives no weights. A backend's own extras (a soft cap, say) are left out; only the choice depends on it.

        Parameters
        ----------
        first : position of the question's first token.
        """
        from vllm.forward_context import set_forward_context

        cache, device = self._cache, self._cache.device
        weights = torch.zeros(2, context_tokens, device=device)
        positions = torch.arange(first, first + len(question_ids), device=device)

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            layer = cache.layers[index]
            q, k, v = (
                part.view(len(positions), -1, dim).transpose(0, 1)
                for part, dim in ((query, cache.head_dim), (key, cache.head_dim), (value, cache.v_head_dim))
            )
            stored_keys, stored_values = cache.read_layer(index, blocks, 0, context_tokens)
            out, seen = attention_with_weights(
                q,
                torch.cat((stored_keys, k), dim=1),
                torch.cat((stored_values, v), dim=1),
                scale=float(layer.impl.scale),
                window_tokens=getattr(layer, "sliding_window", None),
            )
            weights.add_(seen[:, :context_tokens])
            return out.transpose(0, 1).reshape(len(positions), -1)

        with (
            _attending(cache.layers, attend),
            set_forward_context(None, self._config, num_tokens=len(positions), skip_compiled=True),
        ):
            self._model(
                input_ids=torch.from_numpy(question_ids).to(device, torch.int32),
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        return weights

    def _forward(
        self, token_ids: NDArray[np.int64], positions: Tensor, blocks: Sequence[int], *, skip_compiled: bool
    ) -> None:
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        device = self._cache.device
        runs = runs_of(positions.tolist())
        slots = self._cache.slots(blocks, positions)
        starts = torch.tensor([0, *(b - a for a, b in runs)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor([b for _, b in runs], dtype=torch.int32)
        row = torch.tensor(blocks, dtype=torch.int32, device=device)
        metadata = self._builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts.to(device),
                query_start_loc_cpu=starts,
                seq_lens=lengths.to(device),
                num_reqs=len(runs),
                num_actual_tokens=len(positions),
                max_query_len=max(b - a for a, b in runs),
                max_seq_len=int(lengths.max()),
                block_table_tensor=row.expand(len(runs), -1).contiguous(),
                slot_mapping=slots,
                causal=True,
                seq_lens_cpu_upper_bound=lengths,
            ),
        )
        ids = torch.from_numpy(token_ids)[positions]
        with set_forward_context(
            dict.fromkeys(self._names, metadata),
            self._config,
            num_tokens=len(positions),
            slot_mapping=dict.fromkeys(self._names, slots),
            skip_compiled=skip_compiled,
        ):
            # the types that the runner itself hands over: 32 bits for tokens, 64 for positions
            self._model(
                input_ids=ids.to(device, torch.int32),
                positions=positions.to(device),
                intermediate_tensors=None,
                inputs_embeds=None,
            )


@contextmanager
def _attending(layers: Sequence[Any], attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Attention layers compute `attend(index, query, key, value)` in place of their own forward."""

    def replaced(index: int) -> Callable[..., Tensor]:
        return lambda query, key, value, *_, **__: attend(index, query, key, value)

    try:
        for index, layer in enumerate(layers):
            layer.forward = replaced(index)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def runs_of(positions: Sequence[int]) -> list[tuple[int, int]]:
    """`[a, b)` of neighbouring positions, from ascending ones."""
    cuts = [i for i, (a, b) in enumerate(pairwise(positions), start=1) if b != a + 1]
    bounds = pairwise([0, *cuts, len(positions)])
    return [(positions[a], positions[b - 1] + 1) for a, b in bounds if a < b]


def running_model(layers: Sequence[Any]) -> nn.Module:
    """The engine's model, from the runner that is registering its caches with us: it calls us, so it is in the stack.

    vLLM has no official way to ask for it. What is found is believed only if `layers` are its modules.

    Raises
    ------
    EngineError : nobody in the stack has it.
    """
    frame: FrameType | None = inspect.currentframe()
    wanted = {id(layer) for layer in layers}
    while frame is not None:
        model = getattr(frame.f_locals.get("self"), "model", None)
        if isinstance(model, nn.Module) and wanted <= {id(module) for module in model.modules()}:
            unwrap = getattr(model, "unwrap", None)
            return unwrap() if callable(unwrap) else model
        frame = frame.f_back
    raise EngineError("the model that these attention layers belong to is not to be found")
