"""Names of what shapes the KV of one request beside model and tokens, and whose it is: the salt of its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PLACE = "\u2063kvloom documents\u2063"  # stands where documents belong while a chat template is taken apart
_PARTS = ("tenant", "epoch", "cache_salt", "adapter", "decoding")


def chunk_salt(
    *,
    tenant: bytes = b"",
    epoch: bytes = b"",
    cache_salt: bytes = b"",
    adapter: bytes = b"",
    decoding: bytes = b"",
) -> bytes:
    """The salt of `kvstore.keys` for everything in one request; empty if all parts are.

    Parameters
    ----------
    tenant : the secret that the user gives to a connector.
    epoch : random bytes after a reset of the connector; before, none.
    cache_salt : the secret that a request brings.
    adapter : digest of the adapter that computes the KV; of none, none.
    decoding : parameters of approximate attention, which shapes the KV of generated tokens.
    """
    given = zip(_PARTS, (tenant, epoch, cache_salt, adapter, decoding), strict=True)
    return b"".join(_framed(name.encode()) + _framed(part) for name, part in given if part)


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part


def lead_of(tokenizer: Any) -> tuple[int, ...]:
    """The tokens in front of every context: the BOS if the tokenizer puts one in front of a text, otherwise none."""
    first = list(tokenizer("").input_ids)[:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()


def natural_lead(tokenizer: Any) -> tuple[int, ...]:
    """The tokens before the documents of a prompt as the model knows prompts: what the chat template puts before a
    user's words, the BOS and a system prompt included; without a template the BOS, if there is one.
    """
    parts = chat_parts(tokenizer)
    if parts is None or not parts[0]:
        return lead_of(tokenizer)
    return tuple(tokenizer(parts[0], add_special_tokens=False).input_ids)


def chat_parts(tokenizer: Any) -> tuple[str, str] | None:
    """The chat template's text before and behind the words of a single user; None as for `cut_chat`, or if the template
    cannot write one.
    """
    try:
        return cut_chat(tokenizer, [{"role": "user", "content": ""}])
    except Exception:  # noqa: BLE001  a template is a program of its author's, which may raise anything
        return None


def cut_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[str, str] | None:
    """A chat as the model's template writes it, up to the assistant's words, cut in front of the first user's.

    None without a template or a user, or if the template writes these words not exactly once. Raises what the template
    raises.
    """
    marked = [dict(message) for message in messages]
    first = next((message for message in marked if message["role"] == "user"), None)
    if not getattr(tokenizer, "chat_template", None) or first is None:
        return None
    first["content"] = _PLACE + first["content"]
    text = str(tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True))
    before, found, behind = text.partition(_PLACE)
    return (before, behind) if found and _PLACE not in behind else None
