"""What users may set of kvloom in an engine: the connector's settings, and the options of one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar

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

LoadMode: TypeAlias = Literal["async", "layerwise"]
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
_TokenId: TypeAlias = Annotated[int, Strict(), Field(ge=0)]
TokenIds: TypeAlias = Annotated[tuple[_TokenId, ...], Field(description="a list of token ids")]
_Bound: TypeAlias = Annotated[int, Strict()]
Spans: TypeAlias = Annotated[
    tuple[tuple[_Bound, _Bound], ...], Field(description="[start, stop) pairs of integers, ascending")
]

CHECKED = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class ServingSettings:
    """`kv_connector_extra_config` of an engine. Sizes may be given as text (`"32GiB"`), paths with `~`.

    Attributes
    ----------
    host_bytes : size of the host tier, for all workers of this engine together.
    disk_path : folder of a `DiskTier`, shared by all engines that name it; None for none.
    disk_bytes : most bytes of chunks in that folder; None for no limit.
    remote_url : `http://host:port` of a kvloom service, the slowest tier, shared by all engines that name it and a
        token of one tenant; None for none. An engine starts, and goes on, without it.
    remote_token_file : file with a token of that service, read again when it changes.
    host_codec, disk_codec : codec of the chunks in that tier, a name of `compress.registry`; None stores them as they
        are.
    profile : file of the model's `Profile`, for codecs that need one.
    certificates : files. They permit lossy codecs, and give the share that fusions recompute. A certificate holds for
        one `model_id`.
    allow_uncertified : use lossy codecs without a certificate; warns.
    chunk_tokens : tokens of a stored chunk. A shorter prefix is not stored.
    model_id : name of the weights; None for the name of the model's folder. Two models of one name get each other's KV.
    salt : the tenant's secret, part of every key.
    load_mode : `async`: a request waits while its KV is loaded, and other requests go on. `layerwise`: a request
        computes at once, and each layer of its step waits for the KV of that layer.
    load_timeout_s : longest time that the load of a request may take; chunks that are later are computed.
    save_pending_bytes : most bytes of KV that wait to be stored, for each worker. Further chunks are not stored.
    fusion_ratio : share of the tokens of documents that a fused request recomputes, unless the request sets it; 1 is
        exact. `"certified"` takes the smallest share that a certificate permits for this model, and 1 without one.
    fusion_slice_tokens : tokens that one step of the engine computes of a fusion, beside its other work.
    check_layer : layer whose keys and values choose the tokens that a fusion recomputes.
    lead_ids : tokens that begin every prompt; None for the BOS if the tokenizer puts one in front of a text. A document
        is stored when it follows them at the start of a prompt, and is found in any context.
    separator_ids : tokens between documents. In a request without `documents`, the text between two separators is a
        document. Empty for none.
    match_tokens : documents of at least so many tokens are recognised by their text, anywhere in a prompt that names
        no documents. 0 turns this off. Only requests with a ratio below 1 are searched.
    """

    host_bytes: Size = ByteSize(4 << 30)
    disk_path: FolderPath | None = None
    disk_bytes: Size | None = None
    remote_url: Name | None = None
    remote_token_file: FilePath | None = None
    host_codec: Name | None = None
    disk_codec: Name | None = None
    profile: FilePath | None = None
    certificates: FilePaths = ()
    allow_uncertified: Switch = False
    chunk_tokens: Count = 256
    model_id: Name | None = None
    salt: Text = ""
    load_mode: Annotated[LoadMode, Field(description="one of async, layerwise")] = "async"
    load_timeout_s: Seconds = 10.0
    save_pending_bytes: Size = ByteSize(1 << 30)
    fusion_ratio: Annotated[Ratio | Literal["certified"], Field(description="a number from 0 to 1, or 'certified'")] = (
        "certified"
    )
    fusion_slice_tokens: Count = 512
    check_layer: Count = 1
    lead_ids: TokenIds | None = None
    separator_ids: TokenIds = ()
    match_tokens: NonNegative = 0

    @model_validator(mode="after")
    def _expect_consistent(self) -> Self:
        for name in ("disk_codec", "disk_bytes"):
            if getattr(self, name) is not None and self.disk_path is None:
                raise ValueError(f"{name} is given without disk_path; name the folder that it is for")
        if (self.remote_url is None) != (self.remote_token_file is None):
            raise ValueError("remote_url and remote_token_file belong together; give both or neither")
        return self

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ServingSettings:
        """Settings from JSON.

        Raises
        ------
        ValueError : a name is unknown, a value is of the wrong kind or out of range, or two settings contradict each
            other. The message is one line.
        """
        return checked(cls, config, "kv_connector_extra_config")


USAGE_KEYS = frozenset(
    {
        "prompt_tokens",
        "loaded_tokens",
        "computed_tokens",
        "load_s",
        "seconds_saved",
        "failed",
        "fused",
        "saved_chunks",
    }
)
"""What kvloom returns with a request. Proxies send it back as input, where it means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class RequestOptions:
    """`kv_transfer_params["kvloom"]` of one request.

    Attributes
    ----------
    load : look for stored KV of this prompt.
    save : store the KV of this request.
    documents : `[start, stop)` spans of the prompt in tokens, ascending and disjoint. Their KV may have been computed
        in any context; the request is fused.
    ratio : share of the tokens of the documents that is recomputed; None takes `ServingSettings.fusion_ratio`.
    """

    load: Switch = True
    save: Switch = True
    documents: Spans = ()
    ratio: Ratio | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any] | None, prompt_tokens: int) -> RequestOptions:
        """Options from JSON; the defaults without an entry `kvloom`. Ignores what kvloom itself returns (`USAGE_KEYS`).

        Raises
        ------
        ValueError : as `ServingSettings.of`, or a document is not within the prompt of `prompt_tokens`.
        """
        given = (params or {}).get("kvloom")
        if given is None:
            return cls()
        if isinstance(given, Mapping):
            given = {name: value for name, value in given.items() if name not in USAGE_KEYS}
        options = checked(cls, given, "kv_transfer_params['kvloom']")
        end = 0
        for start, stop in options.documents:
            if not end <= start < stop <= prompt_tokens:
                raise ValueError(
                    f"documents has {[start, stop]}; expected [start, stop) pairs of integers, ascending, within the "
                    f"prompt of {prompt_tokens} tokens"
                )
            end = stop
        return options


def documents_between(token_ids: Sequence[int], separator_ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Spans `[start, stop)` between two neighbouring separators, without empty ones; separators do not overlap."""
    length = len(separator_ids)
    row, wanted = list(token_ids), list(separator_ids)
    spans, begin, at = [], None, 0
    while length and at <= len(row) - length:
        if row[at] != wanted[0] or row[at : at + length] != wanted:
            at += 1
            continue
        if begin is not None and begin < at:
            spans.append((begin, at))
        at += length
        begin = at
    return tuple(spans)


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
