"""Names of what shapes the KV of one request beside model and tokens, and whose it is: the salt of its keys."""

from __future__ import annotations

from typing import Any

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
    """The tokens that stand before the documents of a prompt as its model knows it: what the chat template puts in front
    of the user's text, with BOS and system prompt, otherwise the BOS, otherwise none.

    None also where a template changes or refuses what it is given.
    """
    mark = "kvloom-documents"
    if getattr(tokenizer, "chat_template", None):
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
        except Exception:  # noqa: BLE001  a template is a program of the model's author
            return lead_of(tokenizer)
        before, found, _ = str(text).partition(mark)
        if found and before:
            return tuple(tokenizer(before, add_special_tokens=False).input_ids)
    return lead_of(tokenizer)
