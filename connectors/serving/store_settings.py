"""What users may set of the store under any engine, and how settings are read from JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from ..tier_url import check_url, shown

T = TypeVar("T")


def _no_switch(value: object) -> object:
    """JSON's `true` is no number."""
    if isinstance(value, bool):
        raise ValueError(f"expected a size, not {value}")
    return value


def _absolute(value: object) -> object:
    """A path as it was meant where it was given: `~` expanded, relative to the folder of now, never empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a path")
    return str(Path(value).expanduser().resolve())


def _existing(path: str) -> str:
    """What is missing is missed before the engine loads its weights."""
    if not Path(path).is_file():
        raise ValueError("expected a file")
    return path


# The description of a type is what an error says to be expected.
Size: TypeAlias = Annotated[
    ByteSize, BeforeValidator(_no_switch), Field(ge=1, description="bytes from 1, or text like '32GiB'")
]
FilePath: TypeAlias = Annotated[
    str, BeforeValidator(_absolute), AfterValidator(_existing), Field(description="the path of a file that exists")
]
FolderPath: TypeAlias = Annotated[str, BeforeValidator(_absolute), Field(description="the path of a folder")]
FilePaths: TypeAlias = Annotated[tuple[FilePath, ...], Field(description="a list of paths of files that exist")]
Text: TypeAlias = Annotated[str, Strict(), Field(description="text")]
Name: TypeAlias = Annotated[str, Strict(), Field(min_length=1, description="text, not empty")]
Switch: TypeAlias = Annotated[bool, Strict(), Field(description="true or false")]
Count: TypeAlias = Annotated[int, Strict(), Field(ge=1, description="an integer from 1")]
NonNegative: TypeAlias = Annotated[int, Strict(), Field(ge=0, description="an integer from 0")]
Seconds: TypeAlias = Annotated[
    float, Strict(), Field(gt=0, allow_inf_nan=False, description="a number of seconds above 0")
]
Ratio: TypeAlias = Annotated[float, Strict(), Field(ge=0, le=1, description="a number from 0 to 1")]
Counts: TypeAlias = Annotated[
    tuple[Annotated[int, Strict(), Field(ge=1)], ...], Field(description="a list of integers from 1")
]
_TokenId: TypeAlias = Annotated[int, Strict(), Field(ge=0)]
TokenIds: TypeAlias = Annotated[tuple[_TokenId, ...], Field(description="a list of token ids")]
_Bound: TypeAlias = Annotated[int, Strict()]
Spans: TypeAlias = Annotated[
    tuple[tuple[_Bound, _Bound], ...], Field(description="[start, stop) pairs of integers, ascending")
]

CHECKED = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class StoreSettings:
    """Tiers, codecs and names, for connectors of every engine. Sizes may be given as text (`"32GiB"`), paths with `~`.

    Attributes
    ----------
    host_bytes : size of the host tier, for all ranks of this engine together; None for no host tier.
    disk_path : folder of a `DiskTier`, shared by all engines that name it; None for none.
    disk_bytes : most bytes of chunks in that folder; None for no limit.
    remote_url : the slowest tier, on other machines, shared by all engines that name it; None for none. A kvloom
        service (`https://host:port`, or `http` on this host), Redis, S3 or Mooncake; see `tier_url.open_tier`. An
        engine starts, and goes on, without it.
    remote_token_file : file with a token of a kvloom service, read again when it changes.
    remote_ca_file : certificates (PEM) to trust there; None for those of the system.
    host_codec, disk_codec : codec of the chunks in that tier, a name of `compress.registry`; None stores them as they
        are.
    profile : file of the model's `Profile`, for codecs that need one.
    certificates : files. They permit lossy codecs, and give the share that fusions recompute. A certificate holds for
        one `model_id`.
    allow_uncertified : use lossy codecs without a certificate; warns.
    model_id : name of the weights; None for the name of the model's folder. Two models of one name get each other's KV.
    salt : the tenant's secret, part of every key.
    load_timeout_s : longest time that a load may take; chunks that are later are computed.
    tensor_parallel_sizes : of the engines that share these tiers. What an engine of one of these sizes has stored is
        found by all that name it; the own size need not be named. Empty to look for what the own size stores alone.
    """

    host_bytes: Size | None = None
    disk_path: FolderPath | None = None
    disk_bytes: Size | None = None
    remote_url: Name | None = None
    remote_token_file: FilePath | None = None
    remote_ca_file: FilePath | None = None
    host_codec: Name | None = None
    disk_codec: Name | None = None
    profile: FilePath | None = None
    certificates: FilePaths = ()
    allow_uncertified: Switch = False
    model_id: Name | None = None
    salt: Text = ""
    load_timeout_s: Seconds = 10.0
    tensor_parallel_sizes: Counts = ()

    @model_validator(mode="after")
    def _expect_consistent(self) -> Self:
        if self.host_bytes is None and self.disk_path is None and self.remote_url is None:
            raise ValueError("there is no tier; give disk_path, remote_url or host_bytes")
        if self.host_codec is not None and self.host_bytes is None:
            raise ValueError("host_codec is given without host_bytes; say how large the host tier is")
        for name in ("disk_codec", "disk_bytes"):
            if getattr(self, name) is not None and self.disk_path is None:
                raise ValueError(f"{name} is given without disk_path; name the folder that it is for")
        if self.remote_url is not None:
            check_url(self.remote_url)
        is_service = (self.remote_url or "").startswith(("http://", "https://"))
        has_token = self.remote_token_file is not None or "token_file=" in (self.remote_url or "")
        if is_service != has_token:
            raise ValueError(
                "remote_url of a kvloom service and remote_token_file belong together; give both or neither"
            )
        if self.remote_ca_file is not None and not (self.remote_url or "").startswith("https://"):
            raise ValueError(
                f"remote_ca_file is given and remote_url is {shown(self.remote_url or '')!r}; expected https://host:port"
            )
        return self


def checked(kind: type[T], given: object, where: str) -> T:
    """An object of a pydantic dataclass, made of JSON.

    Raises
    ------
    ValueError : one line that names the wrong entry, its value and what is expected; for unknown entries, `where` they
        stand and which are known.
    """
    entries = expect_known(given, [field.name for field in fields(kind)], where)  # type: ignore[arg-type]
    try:
        return kind(**entries)
    except ValidationError as exc:
        (error, *_) = exc.errors()
        if not error["loc"]:  # two entries that contradict each other
            raise ValueError(str(error["ctx"]["error"])) from None
        name = str(error["loc"][0])
        schema = TypeAdapter(kind).json_schema()["properties"][name]
        raise ValueError(f"{name} is {entries[name]!r}; expected {_expectation(schema)}") from None


def expect_known(given: object, known: Sequence[str], where: str) -> Mapping[str, Any]:
    """The given object, if it has known entries only.

    Raises
    ------
    ValueError : it is no object, or has an unknown entry.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {given!r}; expected an object")
    if unknown := sorted(map(str, set(given) - set(known))):
        raise ValueError(f"{where} has {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    return given


def _expectation(schema: Mapping[str, Any]) -> str:
    """The description of a type, or of the alternative to null."""
    if "description" in schema:
        return str(schema["description"])
    return next(str(each["description"]) for each in schema["anyOf"] if "description" in each) + ", or null"
