"""Profiles: what calibration fitted to one model (levels, thresholds, bases), in a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import safetensors
from safetensors.torch import save
from torch import Tensor

from ..core import KVSpec
from ..errors import CodecError, SpecMismatchError
from .output_file import write_output

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Profile:
    """Tables for one model, shared by all chunks. Codecs hold a profile and write its fingerprint into chunks.

    Attributes
    ----------
    spec : of the model; keys and values of another model are refused. The dtype does not count: tables are float32 and
        valid for the model in any precision.
    tensors : by name, on the cpu, named `METHOD.WHAT`, for instance `nuq.keys.levels.4`; first dimension is the layer.
    meta : text about the calibration: texts, tokens, date, versions.
    """

    spec: KVSpec
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that identify spec and tensors; `meta` does not count."""
        digest = hashlib.blake2b(b"kvloom Profile 1\0" + self._identity().encode(), digest_size=32)
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
            digest.update(tensor.contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises
        ------
        CodecError : the profile has no such tensor.
        """
        if name not in self.tensors:
            raise CodecError(
                f"the profile of {self.spec.model_id} has no {name!r}, only {sorted(self.tensors)}; "
                "make it anew with `kvloom calibrate`"
            )
        return self.tensors[name]

    def check_serves(self, spec: KVSpec) -> None:
        """Checks that the profile is for the model of `spec`.

        Raises
        ------
        SpecMismatchError : model, geometry or rope of `spec` differ from the profile's.
        """
        if model_identity(spec) != model_identity(self.spec):
            raise SpecMismatchError(
                f"this profile was made for {self.spec.model_id} ({self.spec.num_layers} layers, "
                f"{self.spec.num_kv_heads} heads of {self.spec.head_dim}), the chunk is of {spec.model_id} "
                f"({spec.num_layers} layers, {spec.num_kv_heads} heads of {spec.head_dim}); "
                "make one for it with `kvloom calibrate`"
            )

    def save(self, path: Path) -> None:
        """Writes the profile as a safetensors file; see `write_output`."""
        meta = {"kvloom_profile": str(FORMAT_VERSION), "spec": self.spec.to_json(), **self.meta}
        write_output(path, save({name: tensor.contiguous() for name, tensor in self.tensors.items()}, metadata=meta))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads what `save` wrote.

        Raises
        ------
        CodecError : the file does not exist, or is no profile of a version that this release reads.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                meta = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version, spec = meta.pop("kvloom_profile", None), meta.pop("spec", "")
            if version != str(FORMAT_VERSION):
                raise CodecError(f"{path} is no profile of version {FORMAT_VERSION} (kvloom_profile: {version})")
            return cls(KVSpec.from_json(spec), tensors, meta)
        except (OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError, AttributeError) as exc:
            raise CodecError(f"{path} cannot be read as a profile: {exc}") from exc

    def _identity(self) -> str:
        return model_identity(self.spec)


@lru_cache(maxsize=64)
def model_identity(spec: KVSpec) -> str:
    """Text that is equal for two specs of one model, whatever their precision."""
    return json.dumps(json.loads(spec.to_json()) | {"dtype": None}, sort_keys=True)
