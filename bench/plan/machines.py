"""What a machine can do: figures of GPUs and of places for chunks, as data sheets state them or as a user says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

HERE = "here"
"""In place of a GPU's name: this machine, measured."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "PIB": 2**50}
_SIZE = re.compile(r"([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes
    ----------
    flops : dense multiplications and additions a second in bfloat16, without sparsity.
    hbm : bytes a second of its own memory.
    memory : bytes of it.
    link : bytes a second from the host, in one direction.
    """

    name: str
    flops: float
    hbm: float
    memory: float
    link: float


_PCIE4, _PCIE5 = 32e9, 64e9  # x16
GPUS: Mapping[str, Gpu] = MappingProxyType({
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80g", 989e12, 3.35e12, 80e9, _PCIE5),
        Gpu("h200-141g", 989e12, 4.8e12, 141e9, _PCIE5),
        Gpu("b200-180g", 2250e12, 8.0e12, 180e9, _PCIE5),
        Gpu("a100-80g", 312e12, 2.039e12, 80e9, _PCIE4),
        Gpu("a100-40g", 312e12, 1.555e12, 40e9, _PCIE4),
        Gpu("a40-48g", 149.7e12, 0.696e12, 48e9, _PCIE4),
        Gpu("l40s-48g", 362e12, 0.864e12, 48e9, _PCIE4),
        Gpu("l4-24g", 121e12, 0.3e12, 24e9, _PCIE4),
        Gpu("a10-24g", 125e12, 0.6e12, 24e9, _PCIE4),
        Gpu("rtx4090-24g", 165e12, 1.008e12, 24e9, _PCIE4),
        Gpu("mi300x-192g", 1307e12, 5.3e12, 192e9, _PCIE5),
    )
})  # fmt: skip
"""GPUs by name: dense bfloat16, memory and link of their vendors' data sheets."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What no data sheet says. Each may be given with `--assume NAME=VALUE`.

    Attributes
    ----------
    compute_ratio : of a GPU's operations a second that a prefill reaches.
    memory_ratio, link_ratio : of the bytes a second of its memory, and of its link.
    step_s : seconds of an engine's step beside the GPU's work, and of a request's way through it.
    reserve_ratio : of the GPU's memory that weights and KV leave free, for activations.
    lanes : loads that run at once in an engine.
    decode_factor : how many times as fast as this machine's processor that of the machine decodes chunks.
    question_tokens : at the end of a prompt, never cached.
    chunk_tokens : of a stored chunk.
    budget_ratio : of the context that a decode step with retrieval attends to.
    fusion_ratio : of the documents' tokens that a fusion computes.
    busy_ratio : of the time that a resource may be in use, where queues must stay short.
    """

    compute_ratio: float = 0.5
    memory_ratio: float = 0.8
    link_ratio: float = 0.8
    step_s: float = 0.005
    reserve_ratio: float = 0.1
    lanes: float = 4
    decode_factor: float = 1.0
    question_tokens: float = 128
    chunk_tokens: float = 256
    budget_ratio: float = 0.03
    fusion_ratio: float = 0.15
    busy_ratio: float = 0.8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0 or (field.name.endswith("_ratio") and value > 1):
                most = " to 1" if field.name.endswith("_ratio") else ""
                raise ValueError(f"{field.name} is {value:g}; expected a number from 0{most}")
        for name in ("compute_ratio", "memory_ratio", "link_ratio", "busy_ratio", "decode_factor"):
            if not getattr(self, name):
                raise ValueError(f"{name} is 0; expected more than that")
        for name in ("lanes", "chunk_tokens"):
            if getattr(self, name) < 1 or getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name):g}; expected a whole number from 1")


@dataclass(frozen=True, slots=True)
class TierPlan:
    """A place for chunks that may be bought.

    Attributes
    ----------
    name : `host`, `disk` or `remote`, or a name of the user's, which is taken for a disk.
    capacity_bytes : of it.
    read_bytes_s : bytes a second that it delivers into the host's memory; infinite for that memory itself.
    latency_s : seconds until the first byte of a chunk.
    """

    name: str
    capacity_bytes: int
    read_bytes_s: float
    latency_s: float


KINDS = {"host": (math.inf, 20e-6), "disk": (7e9, 100e-6), "remote": (12.5e9, 500e-6)}
"""Bytes a second and latency by kind of tier: memory, one NVMe disk of PCIe 4, a network of 100 Gbit/s."""

DEFAULT_TIERS = ("host=256GiB", "disk=4TB")


def gpu_by_name(text: str) -> Gpu:
    """A GPU of `GPUS`, or one as `flops=989e12,hbm=3.35e12,memory=80e9,link=64e9`.

    Raises
    ------
    ValueError : it is none.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    names = [field.name for field in fields(Gpu)][1:]
    if "=" not in text:
        raise ValueError(
            f"no GPU {text!r}; expected {HERE} (this machine), one of {', '.join(GPUS)}, or "
            "flops=989e12,hbm=3.35e12,memory=80e9,link=64e9"
        )
    found = read_assignments(text, names, "the GPU")
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"the GPU lacks {', '.join(missing)}; expected {', '.join(names)}")
    for name, value in found.items():
        if value <= 0:
            raise ValueError(f"{name} of the GPU is {value:g}; expected more than 0")
    return Gpu("the given GPU", **found)


def read_assignments(text: str, names: Iterable[str], what: str) -> dict[str, float]:
    """`"gpu=2.5,host=0.01"` as numbers by name.

    Raises
    ------
    ValueError : a name is unknown or there twice, or a value is no finite number.
    """
    known, found = list(names), dict[str, float]()
    for item in text.split(","):
        name, separator, value = item.strip().partition("=")
        if name not in known or not separator or name in found:
            raise ValueError(f"{what} has {item.strip()!r}; expected {', '.join(known)}, each at most once, with =")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise ValueError(f"{name} of {what} is {value!r}; expected a number") from error
        if not math.isfinite(found[name]):
            raise ValueError(f"{name} of {what} is {value!r}; expected a finite number")
    return found


def read_assumptions(texts: Sequence[str]) -> Assumptions:
    """Assumptions with what `--assume` says in place of their defaults."""
    names = [field.name for field in fields(Assumptions)]
    found: dict[str, float] = {}
    for text in texts:
        found |= read_assignments(text, names, "--assume")
    return replace(Assumptions(), **found)


def read_prices(texts: Sequence[str]) -> dict[str, float]:
    """`gpu=2.5`, `disk=0.0001`: what an hour costs, of a GPU and of a GB in the tiers of these names.

    Raises
    ------
    ValueError : one is not of that form, or below 0.
    """
    found: dict[str, float] = {}
    for text in texts:
        for item in text.split(","):
            name = item.partition("=")[0].strip()
            found |= read_assignments(item, [name or "gpu"], "--price")
            if found[name] < 0:
                raise ValueError(f"{name} of --price is {found[name]:g}; expected a number from 0")
    return found


def read_bytes(text: str, what: str) -> int:
    """`"256GiB"`, `"4TB"` or a number of bytes.

    Raises
    ------
    ValueError : it is no size above 0.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else _UNITS.get(match[2].upper())
    try:
        size = 0 if match is None or unit is None else round(float(match[1]) * unit)
    except (ValueError, OverflowError):
        size = 0
    if not 0 < size < 1 << 70:
        raise ValueError(f"{what} is {text!r}; expected a size such as 256GiB or 4TB")
    return size


def read_tier(text: str) -> TierPlan:
    """`NAME=SIZE` or `NAME=SIZE@SPEED`, the speed in GB/s: `host=256GiB`, `disk=4TB@7`, `remote=100TB@12.5`.

    Raises
    ------
    ValueError : it is not of that form.
    """
    name, separator, rest = text.partition("=")
    size, _, speed = rest.partition("@")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name == "gpu":
        raise ValueError(f"--tier is {text!r}; expected NAME=SIZE or NAME=SIZE@GB/s, such as disk=4TB@7")
    read_bytes_s, latency_s = KINDS.get(name, KINDS["disk"])
    if speed:
        try:
            read_bytes_s = float(speed) * 1e9
        except ValueError:
            read_bytes_s = math.nan
        if not 0 < read_bytes_s < math.inf:
            raise ValueError(f"--tier {name} has {speed!r} behind @; expected GB/s above 0")
    return TierPlan(name, read_bytes(size, f"--tier {name}"), read_bytes_s, latency_s)
