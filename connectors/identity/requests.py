"""Names of what shapes the KV of one request beside model and tokens, and whose it is: the salt of its keys."""

from __future__ import annotations

from typing import Any

_PLACE = "KVLOOMPLACE"  # stands for what a user says while a chat template is taken apart
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
    """The chat template's text before and behind the words of a single user; None without a template, or if the words
    do not stand in it exactly once.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    said = [{"role": "user", "content": _PLACE}]
    try:
        text = str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    except Exception:  # noqa: BLE001  a template is a program of its author's, which may raise anything
        return None
    opening, found, closing = text.partition(_PLACE)
    return (opening, closing) if found and _PLACE not in closing else None
