"""One model on one machine: what chunks take, where they go, and how long everything takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...calibration.model_profile import Profile
from ...compress.registry import CODECS, codec_by_name
from ...core import KVChunk
from ...errors import CodecError
from ..schedule.costs import Costs, LoadCost, PrefillCost
from .forms import FIXED_SIZES, StoredForm, random_chunk, stored_form
from .machines import GPUS, Assumptions, Gpu, TierPlan, gpu_by_name
from .shapes import ModelShape

CPU_KV_BYTES = 4 << 30  # that vLLM takes for its cache on a processor, unless it is told otherwise


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that runs one engine, as measured or as data sheets have it.

    Attributes
    ----------
    prefill : of the model on it.
    link_bytes_s : from the host's memory into the engine's cache.
    memory_bytes : of its GPUs.
    hbm_bytes_s : of their memory; 0 if it is not known.
    overlaps : whether the engine copies a chunk while it reads the next one.
    read_s : by kind of tier, what is spent on a chunk whatever its size, where it was measured.
    read_bytes_s : by kind of tier, where it was measured.
    call_s : see `Costs`.
    lanes : loads that run at once.
    facts : of which it is made: name, value, origin.
    lanes_of : which connector loads like that.
    """

    name: str
    prefill: PrefillCost
    link_bytes_s: float
    memory_bytes: float
    hbm_bytes_s: float = 0.0
    overlaps: bool = True
    read_s: Mapping[str, float] | None = None
    read_bytes_s: Mapping[str, float] | None = None
    call_s: float = 0.0
    lanes: int = 4
    facts: tuple[tuple[str, str, str], ...] = ()
    lanes_of: str = "kvloom's connector for vLLM"


@dataclass(frozen=True, slots=True)
class Setup:
    """A model, a machine, places for chunks, and the forms that chunks can have there."""

    shape: ModelShape
    machine: Machine
    tiers: Sequence[TierPlan]
    forms: Mapping[str, StoredForm]
    assume: Assumptions

    @property
    def gpu_kv_bytes(self) -> float:
        """Of the GPUs' memory, what is left for KV."""
        return max(0.0, self.machine.memory_bytes * (1 - self.assume.reserve_ratio) - self.shape.weight_bytes)

    def costs(self, codec: str, *, is_moved: bool = False) -> Costs:
        """Of chunks of the codec's form, from every tier; `is_moved`: to other positions than they were computed at."""
        form, machine = self.forms[codec], self.machine
        loads = {}
        for tier in self.tiers:
            nbytes = form.bytes_in(tier.name)
            speed = tier.read_bytes_s
            if machine.read_bytes_s is not None:
                speed = machine.read_bytes_s.get(tier.name, speed)
            latency_s = tier.latency_s if machine.read_s is None else machine.read_s.get(tier.name, tier.latency_s)
            moved_s = 0.0 if math.isinf(speed) else nbytes / speed
            loads[tier.name] = LoadCost(
                read_s=latency_s + moved_s,
                decode_s=(form.moved_s if is_moved else form.decode_s) / self.assume.decode_factor,
                copy_s=form.raw_bytes / machine.link_bytes_s,
                overlaps=machine.overlaps,
                shared_s=moved_s if tier.name == "remote" else 0.0,
            )
        return Costs(
            machine.prefill,
            form.tokens,
            form.raw_bytes,
            loads,
            machine.call_s,
            machine.lanes,
            kv_tokens=(self.gpu_kv_bytes or CPU_KV_BYTES) / self.shape.spec().token_bytes,
        )


def gpu_machine(shape: ModelShape, gpu: Gpu, assume: Assumptions, gpus: int = 1) -> Machine:
    """By a GPU's data sheet; several of them share every layer's work (tensor parallelism).

    Raises
    ------
    ValueError : the weights do not fit.
    """
    flops = gpus * gpu.flops * assume.compute_ratio
    hbm_bytes_s, memory_bytes = gpus * gpu.hbm * assume.memory_ratio, gpus * gpu.memory
    if shape.weight_bytes >= memory_bytes * (1 - assume.reserve_ratio):
        raise ValueError(
            f"the weights of {shape.name} take {shape.weight_bytes / 1e9:,.0f} GB; {gpus} x {gpu.name} has "
            f"{memory_bytes * (1 - assume.reserve_ratio) / 1e9:,.0f} GB for weights and KV: give --gpus, or another GPU"
        )
    prefill = PrefillCost(
        fixed_s=assume.step_s + 2 * shape.head_params / flops,
        token_s=2 * shape.computed_params / flops,
        pair_s=shape.layers * shape.pair_flops / flops,
        floor_s=shape.read_bytes / hbm_bytes_s,
        behind_s=shape.spec().token_bytes / hbm_bytes_s,
        windows=shape.windows,
    )
    sheet = (f"data sheet of {gpu.name}" if gpu.name in GPUS else "given") + (f", {gpus} of them" if gpus > 1 else "")
    facts = (
        ("dense bfloat16", f"{gpus * gpu.flops / 1e12:,.0f} TFLOP/s", sheet),
        ("memory of the GPU", f"{memory_bytes / 1e9:,.0f} GB at {gpus * gpu.hbm / 1e9:,.0f} GB/s", sheet),
        ("host to GPU", f"{gpus * gpu.link / 1e9:,.0f} GB/s", sheet),
        ("compute_ratio", f"{assume.compute_ratio:.0%} of the operations", "assumed"),
        ("memory_ratio, link_ratio", f"{assume.memory_ratio:.0%}, {assume.link_ratio:.0%} of the bytes", "assumed"),
        ("step_s", f"{assume.step_s * 1e3:g} ms of each request beside the GPU's work", "assumed"),
        ("reserve_ratio", f"{assume.reserve_ratio:.0%} of the GPU's memory kept free", "assumed"),
        ("decoding", f"{assume.decode_factor:g} times as fast as here (decode_factor)", "assumed"),
    )
    return Machine(
        name=gpu.name if gpus == 1 else f"{gpus} x {gpu.name}",
        prefill=prefill,
        link_bytes_s=gpus * gpu.link * assume.link_ratio,
        memory_bytes=memory_bytes,
        hbm_bytes_s=hbm_bytes_s,
        lanes=int(assume.lanes),
        facts=facts,
    )


def named_machine(shape: ModelShape, gpu: str, assume: Assumptions, gpus: int = 1) -> Machine:
    """As `gpu_machine`, of a GPU by name."""
    return gpu_machine(shape, gpu_by_name(gpu), assume, gpus)


def measured_forms(
    shape: ModelShape, codecs: Sequence[str], tokens: int, *, profile: Path | None = None, sample: KVChunk | None = None
) -> dict[str, StoredForm]:
    """What a chunk takes under each codec, see `stored_form`.

    Parameters
    ----------
    tokens : of a chunk.
    sample : a chunk of the model itself; None for random numbers.

    Raises
    ------
    ValueError : no codec has such a name, it cannot encode such a cache, or its chunks take as much as the model says
        in them and there is no sample.
    """
    known = None if profile is None else Profile.load(profile)
    chunk = random_chunk(shape.spec(), tokens) if sample is None else sample
    found = {}
    for name in codecs:
        if name in CODECS and name not in FIXED_SIZES and sample is None:
            raise ValueError(
                f"what {name} takes depends on the model's KV; give a --model folder with weights"
                + ("" if name == "lossless" else " and --profile")
                + f", or codecs of {', '.join(sorted(FIXED_SIZES))}"
            )
        codec = codec_by_name(name, known)
        try:
            found[name] = stored_form(name, codec, chunk, is_sampled=sample is not None)
        except (CodecError, RuntimeError) as error:
            raise ValueError(f"codec {name} cannot encode the cache of {shape.name}: {error}") from error
    return found
