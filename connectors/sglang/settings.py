"""What users may set of kvloom in SGLang: `--hicache-storage-backend-extra-config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..serving.settings import LoadChoice
from ..serving.store_settings import CHECKED, StoreSettings, checked

# SGLang's own, which stand in the same object. It takes out others before a backend sees them.
_OF_SGLANG = frozenset({"backend_name", "module_path", "class_name", "interface_v1"})


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class SGLangSettings(StoreSettings):
    """`StoreSettings`, of which one tier at least is to be named: SGLang's host pool holds what a host tier would.

    Attributes
    ----------
    load_or_recompute : `always`: pages that are stored are loaded. `auto`: as many of them as are expected to be there
        sooner than if they were computed, by what both have cost here lately, if nothing waits.
    """

    load_or_recompute: Annotated[LoadChoice, Field(description="one of auto, always")] = "always"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SGLangSettings:
        """Settings from the extra config, SGLang's own entries left out.

        Raises
        ------
        ValueError : a name is unknown, a value is of the wrong kind or out of range, two settings contradict each
            other, or no tier is named. The message is one line.
        """
        own = {name: value for name, value in config.items() if name not in _OF_SGLANG}
        return checked(cls, own, "hicache_storage_backend_extra_config")
