"""Describes the machine of a measurement: versions, processor, devices, commit. Never a host name, user or path."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLED_MODEL = ROOT / "bench" / "reference" / "model"  # a Hugging Face folder


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, None if it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def usable(module: str) -> bool:
    """Whether a module could be imported; does not import it, only the packages that it is in."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def commit() -> str:
    """Commit of the source tree, with `-dirty` behind it if files differ; outside a checkout the package version."""
    from .. import __version__

    if not (ROOT / ".git").exists():
        return str(__version__)
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return str(__version__)
    return done.stdout.strip()


def cpu_model() -> str:
    """Name of the processor as the system states it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Main memory of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def devices() -> list[dict[str, str | int]]:
    """CUDA devices by name, with their memory in bytes."""
    import torch

    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": device.name, "memory_bytes": device.total_memory} for device in found]


def environment() -> dict[str, object]:
    """The `env` object of every benchmark result."""
    from datetime import UTC, datetime

    import torch

    return {
        "python": platform.python_version(),
        "kvloom": version_of("kvloom"),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "devices": devices(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
