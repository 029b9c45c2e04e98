"""What users may say of kvloom in vLLM: in `kv_connector_extra_config`, and in `kv_transfer_params` of a request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

LoadMode: TypeAlias = Literal["async", "layerwise"]

_UNITS = MappingProxyType({"": 1, "B": 1} | {f"{p}iB": 1 << 10 * (i + 1) for i, p in enumerate("KMGT")})
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B|)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """`kv_connector_extra_config`. Sizes may be given as text, `"32GiB"`.

    Attributes
    ----------
    host_bytes : of chunks in the memory of the machine, all workers of this engine together.
    disk_path : folder of a `DiskTier`, shared by all engines that name it; None for none.
    disk_bytes : of chunks in that folder; None for no limit.
    host_codec, disk_codec : what chunks are encoded with in that tier, a name of `compress.catalog`; None for as they
        are.
    profile : file of the model's `Profile`, for codecs that need one.
    certificates : files; what makes lossy codecs usable, and says what share a fusion computes. Certificates speak for
        one `model_id`: `kvloom certify --model-id` takes the engine's.
    allow_uncertified : use lossy codecs without a certificate all the same; warns.
    chunk_tokens : tokens a chunk; what is shorter is not stored.
    model_id : names the weights; None hashes the model's files. Two models of one name would be given each other's KV.
    salt : the tenant's secret, part of every key.
    load_mode : `async`: a request waits aside while its KV is loaded, and others go on. `layerwise`: it computes at
        once, and every layer waits for its own KV, as does all else that is computed in that step.
    load_timeout_s : how long the loads of one request may take; what has not come by then is computed.
    save_pending_bytes : of KV that waits to be stored, a worker. What would come on top is not stored.
    fusion_ratio : share of the tokens of documents that a fused request recomputes unless it says itself; 1 is exact.
        `"certified"`: the smallest that a certificate of fusions permits for this model, and 1 without one. A number is
        the user's own choice.
    fusion_slice_tokens : tokens that one step of the engine computes of a fusion, beside its other work.
    check_layer : the layer whose keys and values choose the tokens of a fusion.
    lead_ids : tokens that stand before everything (a BOS). A document is stored when it follows them at the start of a
        prompt, and is found in any context.
    separator_ids : tokens that stand between documents: what lies between two of these rows is a document, in requests
        that give no documents themselves. Empty for none.
    match_tokens : stored documents of at least so many tokens are recognised in prompts that give none, by what they
        say, wherever they stand. 0 for never. As such prompts are fused, this takes a `fusion_ratio` below 1.
    """

    host_bytes: int = 4 << 30
    disk_path: str | None = None
    disk_bytes: int | None = None
    host_codec: str | None = None
    disk_codec: str | None = None
    profile: str | None = None
    certificates: tuple[str, ...] = ()
    allow_uncertified: bool = False
    chunk_tokens: int = 256
    model_id: str | None = None
    salt: str = ""
    load_mode: LoadMode = "async"
    load_timeout_s: float = 10.0
    save_pending_bytes: int = 1 << 30
    fusion_ratio: float | Literal["certified"] = "certified"
    fusion_slice_tokens: int = 512
    check_layer: int = 1
    lead_ids: tuple[int, ...] = ()
    separator_ids: tuple[int, ...] = ()
    match_tokens: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ServingSettings:
        """From JSON.

        Raises
        ------
        ValueError : a name is not known, or a value is not of its kind or out of its range.
        """
        known = [field.name for field in fields(cls)]
        _expect_known(config, known, "kv_connector_extra_config")
        values = dict(config)
        for name in ("host_bytes", "disk_bytes", "save_pending_bytes"):
            if values.get(name) is not None:
                values[name] = parse_bytes(values[name], name)
        for name in ("disk_path", "host_codec", "disk_codec", "profile", "model_id", "salt"):
            value = values.get(name)
            if name in values and not (isinstance(value, str) or (value is None and name != "salt")):
                raise ValueError(f"{name} is {value!r}; expected text")
        paths = values.get("certificates", ())
        if not isinstance(paths, Sequence) or isinstance(paths, str) or not all(isinstance(p, str) for p in paths):
            raise ValueError(f"certificates is {paths!r}; expected a list of files")
        values["certificates"] = tuple(paths)
        if not isinstance(values.get("allow_uncertified", False), bool):
            raise ValueError(f"allow_uncertified is {values['allow_uncertified']!r}; expected true or false")
        for name in ("lead_ids", "separator_ids"):
            ids = values.get(name, ())
            if not isinstance(ids, Sequence) or not all(type(token) is int and token >= 0 for token in ids):
                raise ValueError(f"{name} is {ids!r}; expected a list of token ids")
            values[name] = tuple(ids)
        settings = cls(**values)
        if settings.disk_codec is not None and settings.disk_path is None:
            raise ValueError("disk_codec is given without disk_path; name the folder that it is for")
        if settings.load_mode not in get_args(LoadMode):
            raise ValueError(f"load_mode is {settings.load_mode!r}; expected one of {', '.join(get_args(LoadMode))}")
        for name in ("host_bytes", "chunk_tokens", "save_pending_bytes", "fusion_slice_tokens"):
            _expect_number(getattr(settings, name), name, 1, whole=True)
        _expect_number(settings.match_tokens, "match_tokens", 0, whole=True)
        _expect_number(settings.check_layer, "check_layer", 1, whole=True)
        _expect_number(settings.load_timeout_s, "load_timeout_s", 0.0)
        if settings.fusion_ratio != "certified":
            _expect_number(settings.fusion_ratio, "fusion_ratio", 0.0, 1.0)
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """`kv_transfer_params["kvloom"]` of one request.

    Attributes
    ----------
    load : look for stored KV of this prompt.
    save : store the KV of this request.
    documents : `(start, stop)` spans of the prompt, in tokens, ascending and without overlap, whose KV may have been
        computed anywhere. Given, the request is fused.
    ratio : share of the tokens of the documents that is recomputed; None for the settings' `fusion_ratio`.
    """

    load: bool = True
    save: bool = True
    documents: tuple[tuple[int, int], ...] = ()
    ratio: float | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any] | None, prompt_tokens: int) -> RequestOptions:
        """From JSON; without the word `kvloom` in it, the defaults.

        Raises
        ------
        ValueError : as for `ServingSettings.of`, or a document is not within the prompt of `prompt_tokens`.
        """
        options = (params or {}).get("kvloom")
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise ValueError(f"kv_transfer_params['kvloom'] is {options!r}; expected an object")
        _expect_known(options, [field.name for field in fields(cls)], "kv_transfer_params['kvloom']")
        for name in ("load", "save"):
            if not isinstance(options.get(name, True), bool):
                raise ValueError(f"{name} is {options[name]!r}; expected true or false")
        if options.get("ratio") is not None:
            _expect_number(options["ratio"], "ratio", 0.0, 1.0)
        documents = _spans(options.get("documents", ()), prompt_tokens)
        return cls(**{**options, "documents": documents})


def documents_between(token_ids: Sequence[int], separator_ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`[start, stop)` of what lies between two neighbouring separators and is not empty; separators do not overlap."""
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


def parse_bytes(value: object, name: str) -> int:
    """A size: an integer, or text with a unit (`"512MiB"`, `"1.5GiB"`).

    Raises
    ------
    ValueError : it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{name} is {value!r}; expected bytes, or text like '32GiB' (B, KiB, MiB, GiB, TiB)")
    return int(float(match[1]) * _UNITS[match[2]])


def _expect_known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{where} has {', '.join(map(repr, unknown))}; known are {', '.join(known)}")


def _expect_number(value: object, name: str, low: float, high: float = float("inf"), *, whole: bool = False) -> None:
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]
        kind = "an integer" if whole else "a number"
        raise ValueError(f"{name} is {value!r}; expected {kind} from {low:g}" + (f" to {high:g}" if high < 1e9 else ""))


def _spans(given: object, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
    expected = f"expected [start, stop) pairs of integers, ascending, within the prompt of {prompt_tokens} tokens"
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"documents is {given!r}; {expected}")
    spans, end = [], 0
    for pair in given:
        is_pair = isinstance(pair, Sequence) and len(pair) == 2 and all(type(bound) is int for bound in pair)
        if not is_pair or not end <= pair[0] < pair[1] <= prompt_tokens:
            raise ValueError(f"documents has {pair!r}; {expected}")
        spans.append((pair[0], pair[1]))
        end = pair[1]
    return tuple(spans)
