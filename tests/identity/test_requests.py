"""Salts: nothing for nothing, and different as soon as one part differs; lead tokens."""

from itertools import product

from kvloom.connectors.identity.requests import chunk_salt, lead_of

from ..support.models import make_tokenizer


def test_every_part_counts() -> None:
    assert chunk_salt() == b""
    names = ("tenant", "epoch", "cache_salt", "adapter", "decoding")
    values = (b"", b"a", b"b", b"ab", b"\0", b"tenant")
    one = {chunk_salt(**{name: value}) for name, value in product(names, values)}
    assert len(one) == 1 + len(names) * (len(values) - 1)
    two = {chunk_salt(tenant=a, adapter=b) for a, b in product(values, values)}
    assert len(two) == len(values) ** 2


def test_parts_may_be_put_together_in_order() -> None:
    """Where one half of an engine knows some and the other half the rest."""
    assert chunk_salt(tenant=b"t", epoch=b"e") + chunk_salt(cache_salt=b"c", decoding=b"d") == chunk_salt(
        tenant=b"t", epoch=b"e", cache_salt=b"c", decoding=b"d"
    )


def test_lead_tokens_are_the_tokenizers() -> None:
    assert lead_of(make_tokenizer(bos=True)) == (0,)
    assert lead_of(make_tokenizer(bos=False)) == ()
