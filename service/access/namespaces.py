"""What is settled for namespaces: quotas, and how long their chunks live."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...kvstore.placement.quota import Quota, check_quotas
from ..settings import ServiceSettings
from .json_file import JsonFile
from .tenants import TenantFile


@dataclass(frozen=True, slots=True)
class NamespaceRules:
    """Rules of one namespace. `ttl_s`: chunks put into it expire so many seconds later at the latest; None for never.

    The ratios are of every tier; None counts with the tenant.
    """

    ttl_s: float | None = None
    reserve_ratio: float | None = None
    limit_ratio: float | None = None

    @property
    def quota(self) -> Quota | None:
        if self.reserve_ratio is None and self.limit_ratio is None:
            return None
        return Quota(self.reserve_ratio or 0.0, 1.0 if self.limit_ratio is None else self.limit_ratio)


class NamespaceFile:
    """Rules by namespace of the store, in a file that all workers share. Every method may be called from any thread."""

    def __init__(self, file: JsonFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._rules: dict[str, NamespaceRules] = {}
        self._load()

    def get(self, name: str) -> NamespaceRules:
        with self._lock:
            return self._rules.get(name, NamespaceRules())

    def all(self) -> dict[str, NamespaceRules]:
        with self._lock:
            self._load()
            return dict(self._rules)

    def set(self, name: str, rules: NamespaceRules | None) -> None:
        """None forgets them."""
        with self._lock, self._file.changing():
            self._load()
            if rules is None:
                self._rules.pop(name, None)
            else:
                self._rules[name] = rules
            self._file.write({name: asdict(rules) for name, rules in self._rules.items()})

    def expiry(self, name: str) -> float | None:
        """Unix time at which a chunk that is put now expires by the rules of its namespace."""
        ttl_s = self.get(name).ttl_s
        return None if ttl_s is None else time.time() + ttl_s

    def _load(self) -> None:
        content: Any = self._file.news()
        if content is not None:
            self._rules = {name: NamespaceRules(**fields) for name, fields in content.items()}


def quotas_of(settings: ServiceSettings, tenants: TenantFile, rules: Mapping[str, NamespaceRules]) -> dict[str, Quota]:
    """The quotas of the store: of each pool what its tenants have together, and of namespaces with their own.

    Raises
    ------
    ValueError : the reserves are more than everything.
    """
    quotas: dict[str, Quota] = {}
    for tenant in tenants.all():
        reserve = settings.tenant_reserve_ratio if tenant.reserve_ratio is None else tenant.reserve_ratio
        limit = settings.tenant_limit_ratio if tenant.limit_ratio is None else tenant.limit_ratio
        known = quotas.get(tenant.pool)
        if known is not None:
            reserve, limit = min(1.0, known.reserve_ratio + reserve), min(1.0, known.limit_ratio + limit)
        quotas[tenant.pool] = Quota(reserve, max(limit, reserve))
    for name, each in rules.items():
        if each.quota is not None:
            quotas[name] = each.quota
    check_quotas(quotas)
    return quotas
