"""What users may set of kvloom in LMCache: `adapter_params` of `--l2-adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from ..serving.store_settings import CHECKED, StoreSettings, checked

_OF_CODECS = ("host_codec", "disk_codec", "profile", "certificates", "allow_uncertified")


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class LMCacheSettings(StoreSettings):
    """`StoreSettings` without codecs: only LMCache knows what its objects mean, so they are stored as they are.

    `model_id` tells apart what one model name stands for (other weights, another cache layout); `load_timeout_s` is the
    longest time that one load of LMCache may take, whose later objects are misses.
    """

    @model_validator(mode="after")
    def _expect_no_codec(self) -> Self:
        for name in _OF_CODECS:
            if getattr(self, name):
                raise ValueError(f"{name} is given; objects of LMCache are stored as they are, use LMCache's own serde")
        return self

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> LMCacheSettings:
        """Settings from `adapter_params`.

        Raises
        ------
        ValueError : a name is unknown, a value is of the wrong kind or out of range, two settings contradict each
            other, or no tier is named. The message is one line.
        """
        return checked(cls, params, "adapter_params")
