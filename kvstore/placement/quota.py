"""What a namespace is sure of in every tier, and what it may take at most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MOST_NAMESPACE_BYTES = 255  # of UTF-8; tiers keep the namespace with every chunk


@dataclass(frozen=True, slots=True)
class Quota:
    """Shares of the capacity of each tier that has one.

    The quota of a namespace `team` covers `team/...` as well, except namespaces that have a quota of their own.

    Attributes
    ----------
    reserve_ratio : no chunk of another namespace evicts this one below it. It is no room kept empty: what the namespace
        does not use, others may, until it does.
    limit_ratio : what its chunks take at most; at the limit a put evicts the namespace's own chunks.

    Raises
    ------
    ValueError : not 0 <= reserve_ratio <= limit_ratio <= 1.
    """

    reserve_ratio: float = 0.0
    limit_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.reserve_ratio <= self.limit_ratio <= 1:
            raise ValueError(
                f"reserve_ratio is {self.reserve_ratio}, limit_ratio is {self.limit_ratio}; "
                "expected 0 <= reserve_ratio <= limit_ratio <= 1"
            )


def check_namespace(namespace: str) -> None:
    """Raises `ValueError` for what no tier can keep as the name of a namespace."""
    if not isinstance(namespace, str) or len(_utf8(namespace)) > MOST_NAMESPACE_BYTES:
        raise ValueError(f"namespace is {namespace!r:.80}; expected at most {MOST_NAMESPACE_BYTES} bytes of UTF-8")


def check_quotas(quotas: Mapping[str, Quota]) -> None:
    """Raises `ValueError` for a bad namespace, or for reserves that a tier cannot hold together."""
    for namespace in quotas:
        check_namespace(namespace)
    reserved = math.fsum(quota.reserve_ratio for quota in quotas.values())
    if reserved > 1 + 1e-9:  # ten times 0.1 is fine
        raise ValueError(f"reserves are {reserved:.6g} of every tier in total; expected at most 1")


def _utf8(namespace: str) -> bytes:
    try:
        return namespace.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"namespace is {namespace!r:.80}; expected text that UTF-8 can say") from exc
