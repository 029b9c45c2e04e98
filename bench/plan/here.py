"""The machine at hand, measured: the speeds that `kvloom doctor` shows, and passes of a model of the shape."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ...blend.blender import Blender
from ...connectors.hf.connector import TransformersConnector
from ...connectors.hf.generation import cache_argument
from ...connectors.hf.prefill import Prefill
from ...core import KVChunk, Tier
from ...evaluation.environment import memory_bytes
from ...evaluation.models import load_model
from ...evaluation.passages import load_questions
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ...kvstore.tiers.host import HostTier
from ..doctor.run import machine_speeds
from ..harness.page_cache import drop_page_cache
from ..harness.rounds import return_free_memory
from ..schedule.costs import PrefillCost, pairs
from .machines import Assumptions
from .request import figure
from .setup import Machine
from .shapes import ModelShape

SHORT, LEAST, LONG, LONGEST = 64, 128, 512, 4096  # tokens of the passes that are timed
_PATIENCE_S = 0.7  # of a pass: longer ones are not timed
_ROUNDS = 5
_DOCUMENT = 16  # tokens, so few that everything but them is what costs time
_DOCUMENTS = 9
_COPY_BYTES = 64 << 20
_MEMORY_RATIO = 0.25  # of the machine's memory that weights may take for this
_TIMED_PARAMS = 2e8  # of the layers that are timed: more take too long on a processor
_SAMPLE_PARAMS = 5e8  # of a model that is run for a sample of its KV


def here_machine(shape: ModelShape, folder: Path, *, tiers: Sequence[str], assume: Assumptions) -> Machine:
    """Times passes of a model with random weights of this shape, and loads of tiny documents through the store.

    A model that is too large is timed with fewer layers, and the times are multiplied.

    Parameters
    ----------
    folder : whose disk is measured.
    tiers : names; `host` and `disk` are measured.

    Raises
    ------
    OSError : `folder` is not writable.
    """
    speeds = {name: metric.value * 1e9 for name, metric in machine_speeds(folder).items()}
    model, factor = _random_model(shape)
    _, tokenizer = load_model(None)
    prefill, longest = _measured_prefill(model, factor, shape)
    prefill = replace(prefill, windows=shape.windows)
    call_s, read_s = 0.0, dict[str, float]()
    for name in (name for name in tiers if name in ("host", "disk")):
        call_s, read_s[name] = _measured_call(model, tokenizer, name, folder, prefill)
    on_gpu = model.device.type == "cuda"
    link = speeds["device_copy_speed"] if on_gpu else _fresh_copy_speed()
    memory = torch.cuda.mem_get_info()[1] if on_gpu else 0
    layers = model.config.num_hidden_layers
    timed = f"{layers} of {shape.layers} layers of this shape, up to {longest} tokens"
    attention = "measured here" if longest > LONG else "taken to be as fast as the rest"
    flops_s = 2 * shape.computed_params / prefill.token_s if prefill.token_s else math.inf
    facts = (
        ("computing", f"{flops_s / 1e9:,.1f} GFLOP/s, {figure(prefill.fixed_s * 1e3)} ms a pass", f"measured: {timed}"),
        ("attention", f"{figure(prefill.pair_s * 1e9)} ns for two tokens in all layers", attention),
        ("context", f"{prefill.behind_s * 1e6:.3g} µs a token behind which a question is computed", "measured here"),
        ("copies", f"{link / 1e9:.3g} GB/s", "kvloom doctor" if on_gpu else "measured here, into fresh memory"),
        ("disk", f"{speeds['disk_read_speed'] / 1e9:.3g} GB/s read", "kvloom doctor"),
        ("a request that loads", f"{call_s * 1e3:.3g} ms beside loading and computing", "measured here"),
    )
    return Machine(
        name="this machine",
        prefill=prefill,
        link_bytes_s=link,
        memory_bytes=float(memory),
        overlaps=False,
        read_s=read_s,
        read_bytes_s={"disk": speeds["disk_read_speed"]},
        call_s=call_s,
        lanes=1,
        facts=facts,
        lanes_of="TransformersConnector",
    )


def sample_of(model: str, shape: ModelShape, tokens: int) -> KVChunk | None:
    """A chunk of the model's own KV, of bundled text; None if it has no weights, or too many to run it for that."""
    folder = Path(model).expanduser()
    if not any(folder.glob("*.safetensors")) or shape.params > _SAMPLE_PARAMS:
        return None
    found, tokenizer = load_model(folder, dtype=str(shape.dtype).removeprefix("torch."))
    text = "\n".join(passage for question in load_questions() for passage in question.passages)
    ids = tokenizer(text[: 16 * tokens], add_special_tokens=False, verbose=False).input_ids[:tokens]
    if len(ids) < tokens:
        return None
    with KVStore([HostTier(None)]) as store:
        layers = TransformersConnector(found, tokenizer, store, model_id="plan").layers
        (chunk,) = Prefill(layers, lead_ids=(ids[0],), pack_tokens=tokens).behind_lead([ids])
    return chunk


def _random_model(shape: ModelShape) -> tuple[Any, float]:
    """A model of the shape with random weights, and how many times fewer layers it has."""
    attention = shape.query_heads * shape.head_dim
    per_layer = shape.computed_params / shape.layers
    hidden = _hidden(shape, per_layer)
    inner = max(64, round((per_layer - 2 * hidden * (attention + shape.kv_heads * shape.head_dim)) / (3 * hidden)))
    room = _MEMORY_RATIO * (memory_bytes() or 8e9) / (per_layer * shape.dtype.itemsize)
    layers = max(1, min(shape.layers, int(room), int(_TIMED_PARAMS / per_layer)))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=4096,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"  # noqa: SLF001  as `loading.load_model` has it
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model = model.to(shape.dtype).eval()
    return (model.cuda() if torch.cuda.is_available() else model), shape.layers / layers


def _hidden(shape: ModelShape, per_layer: float) -> int:
    """Width of the residual stream: as wide as all query heads, if so many weights fit into a layer."""
    attention = shape.query_heads * shape.head_dim
    widest = int(per_layer / (2 * (attention + shape.kv_heads * shape.head_dim) + 3 * 64))
    return max(64, min(attention, widest) // 64 * 64)


def _measured_prefill(model: Any, factor: float, shape: ModelShape) -> tuple[PrefillCost, int]:
    """Fixed cost, cost of a token and of a pair from passes of three lengths; and the longest of them.

    Where passes are so slow that only short ones can be timed, which say nothing of attention, it is taken to reach as
    many operations a second as the rest.
    """
    longest = LEAST
    while longest < LONGEST and _pass_s(model, longest) < _PATIENCE_S / 2:
        longest *= 2
    lengths, behind = (longest // 16, longest // 4, longest), max(longest, LONG)
    times: dict[int, list[float]] = {length: [] for length in (*lengths, -behind)}
    for _ in range(_ROUNDS if longest > LONG else 2):  # in turns, so that a busy moment meets all of them
        for length, found in times.items():
            found.append(_pass_s(model, length) if length > 0 else _behind_s(model, behind))
    median = {length: statistics.median(taken) for length, taken in times.items()}
    wanted = torch.tensor([median[n] for n in lengths], dtype=torch.float64)
    if longest > LONG:
        matrix = torch.tensor([[1.0, float(n), pairs(n)] for n in lengths], dtype=torch.float64)
        fixed_s, token_s, pair_s = (max(0.0, float(value)) for value in torch.linalg.solve(matrix, wanted))
    else:
        token_s = max(0.0, float(wanted[2] - wanted[1])) / (lengths[2] - lengths[1])
        fixed_s = max(0.0, float(wanted[2]) - token_s * longest)
        pair_s = token_s * shape.pair_flops * shape.layers / (2 * shape.computed_params)
    cost = PrefillCost(factor * fixed_s, factor * token_s, factor * pair_s)
    behind_s = max(0.0, factor * median[-behind] - cost.seconds(SHORT, behind)) / behind
    return replace(cost, behind_s=behind_s), longest


def _fresh_copy_speed() -> float:
    """Bytes a second of copies into memory that was not touched before, as a cache of a context is."""
    source, found = torch.ones(_COPY_BYTES, dtype=torch.uint8), []
    for _ in range(_ROUNDS):
        return_free_memory()
        found.append(_COPY_BYTES / _timed(source.clone))
    return statistics.median(found)


def _timed(work: Callable[[], object]) -> float:
    _wait()
    began_s = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began_s


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def _pass_s(model: Any, tokens: int) -> float:
    ids = torch.arange(tokens, device=model.device)[None] % model.config.vocab_size
    held = {cache_argument(): DynamicCache(config=model.config)}
    return _timed(lambda: model(ids, logits_to_keep=1, **held))


@torch.no_grad()
def _behind_s(model: Any, behind: int) -> float:
    """Of a few tokens behind many whose KV is in the cache."""
    config = model.config
    empty = torch.zeros(1, config.num_key_value_heads, behind, config.head_dim, dtype=model.dtype, device=model.device)
    cache = DynamicCache([(empty, empty) for _ in range(config.num_hidden_layers)])
    ids = torch.arange(SHORT, device=model.device)[None]
    return _timed(lambda: model(ids, logits_to_keep=1, **{cache_argument(): cache}))


def _measured_call(
    model: Any, tokenizer: PreTrainedTokenizerBase, tier: str, folder: Path, prefill: PrefillCost
) -> tuple[float, float]:
    """Seconds of a request that fuses stored documents, beside them, and of each document beside its bytes."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="kvloom-plan-")))
        tiers: list[Tier] = [HostTier(None) if tier == "host" else DiskTier(place)]
        store = stack.enter_context(KVStore(tiers))
        connector = TransformersConnector(model, tokenizer, store, Blender(0.0), model_id="plan")
        documents = [[(7 * i + n) % 3000 for n in range(_DOCUMENT)] for i in range(_DOCUMENTS)]
        few, many = list[float](), list[float]()
        for number in range(_ROUNDS + 1):
            for found, rows in ((few, documents[:1]), (many, documents)):
                drop_page_cache(place)
                spent_s = _timed(lambda rows=rows: connector.as_inputs(connector.fuse(rows), [1]))  # type: ignore[misc]
                if number:
                    found.append(spent_s)
    each_s = max(0.0, statistics.median(many) - statistics.median(few)) / (_DOCUMENTS - 1)
    return max(0.0, statistics.median(few) - each_s), each_s
