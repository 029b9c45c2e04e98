"""What users may set of kvloom in an engine: the connector's settings, and the options of one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ByteSize, Field
from pydantic.dataclasses import dataclass

from ...blend.method import ENGINE_CHOICES, EngineChoice
from .store_settings import (
    CHECKED,
    Count,
    FolderPath,
    NonNegative,
    Ratio,
    Size,
    Spans,
    StoreSettings,
    Switch,
    TokenIds,
    checked,
)

LoadMode: TypeAlias = Literal["async", "layerwise"]
LoadChoice: TypeAlias = Literal["auto", "always"]


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class ServingSettings(StoreSettings):
    """`kv_connector_extra_config` of vLLM: what is below, beside `StoreSettings`.

    Attributes
    ----------
    host_bytes : size of the host tier, for all workers of this engine together.
    chunk_tokens : tokens of a stored chunk. A shorter prefix is not stored.
    load_mode : `async`: a request waits while its KV is loaded, and other requests go on. `layerwise`: a request
        computes at once, and each layer of its step waits for the KV of that layer.
    load_or_recompute : `auto`: of a stored prefix, a request loads what is expected to be there sooner than if it were
        computed, by what loading and computing have cost here lately. `always`: all of it, and everything is stored.
    save_pending_bytes : most bytes of KV that wait to be stored, for each worker. Further chunks are not stored.
    fusion_ratio : share of the tokens of documents that a fused request recomputes, unless the request sets it; 1 is
        exact. `"certified"` takes the smallest share that a certificate permits for this model, and 1 without one.
    fusion_slice_tokens : tokens that one step of the engine computes of a fusion, beside its other work.
    fusion_select : how these tokens are chosen: by their `deviation`, or that of their `values` alone, so that all
        questions share a fusion; by what the `question` attends to, the fastest; or by two of them (`first`: the first
        tokens of every document; `borders`: the last ones, too). Fusions that know their question are shared with
        nothing but equal prompts. None takes the certificate's, and `deviation` without one.
    check_layer : layer whose keys and values are compared for the deviation. None takes the certificate's, and 2
        without one.
    lead_ids : tokens that begin every prompt; None for the BOS if the tokenizer puts one in front of a text. A document
        is stored when it follows them at the start of a prompt, and is found in any context.
    separator_ids : tokens between documents. In a request without `documents`, the text between two separators is a
        document. Empty for none.
    journal_path : folder in which the outcomes of the last requests are kept, for `kvloom explain`; None for
        `disk_path`, and nothing is kept where there is none.
    journal_requests : how many at least; 0 for none.
    match_tokens : documents of at least so many tokens are recognised by their text, anywhere in a prompt that names
        no documents. 0 turns this off. Only requests with a ratio below 1 are searched.
    """

    host_bytes: Size = ByteSize(4 << 30)
    chunk_tokens: Count = 256
    load_mode: Annotated[LoadMode, Field(description="one of async, layerwise")] = "async"
    load_or_recompute: Annotated[LoadChoice, Field(description="one of auto, always")] = "auto"
    save_pending_bytes: Size = ByteSize(1 << 30)
    fusion_ratio: Annotated[Ratio | Literal["certified"], Field(description="a number from 0 to 1, or 'certified'")] = (
        "certified"
    )
    fusion_slice_tokens: Count = 512
    fusion_select: Annotated[EngineChoice, Field(description=f"one of {', '.join(ENGINE_CHOICES)}")] | None = None
    check_layer: Count | None = None
    lead_ids: TokenIds | None = None
    separator_ids: TokenIds = ()
    match_tokens: NonNegative = 0
    journal_path: FolderPath | None = None
    journal_requests: NonNegative = 10_000

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
        "found_tokens",
        "loaded_tokens",
        "computed_tokens",
        "load_s",
        "seconds_saved",
        "failed",
        "fused",
        "saved_chunks",
        "decision",
        "expected_load_s",
        "expected_compute_s",
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
