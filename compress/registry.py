"""Codecs by name, for the command line and for settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeAlias

from ..calibration.model_profile import Profile
from ..core import Codec
from .raw import RawCodec

Make: TypeAlias = Callable[[Profile | None], Codec]


def codec_by_name(name: str, profile: Profile | None = None) -> Codec:
    """The codec of that name, in its recommended setting.

    Parameters
    ----------
    name : one of `CODECS`. A sum is a composition, the outer codec first: `lossless+nuq4` packs the bytes of `nuq4`,
        and `lowrank4+nuq4` joins low-rank keys (their factor in 4 bits) with its values.
    profile : of the model, for codecs that need one.

    Raises
    ------
    ValueError : no codec has that name any more, none ever had, or it needs a profile and there is none.
    """
    if name in WITHDRAWN:
        raise ValueError(f"codec {name!r} is withdrawn: {WITHDRAWN[name]}; known: {', '.join(CODECS)}")
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; known: {', '.join(CODECS)}")
    return CODECS[name](profile)


def _wanted(profile: Profile | None, name: str) -> Profile:
    if profile is None:
        raise ValueError(
            f"codec {name!r} needs a profile of the model; make one with "
            "`kvloom calibrate MODEL --text FILE -o profile.safetensors` and name it with --profile"
        )
    return profile


def _class(module: str, name: str) -> Any:
    # Imported when it is asked for: some codecs need packages that others do without.
    return getattr(import_module(f".{module}", __package__), name)


def _nuq(bits: int) -> Make:
    # At 2 bits, tokens unlike the profile's text lose more than others, and answers hang on them: more of them stay
    # exact, which takes no byte where the text is like the profile's.
    options = {"clipped_limit": 0.05} if bits == 2 else {}
    return lambda profile: _class("nuq.nuq", "NuqCodec")(_wanted(profile, f"nuq{bits}"), bits=bits, **options)


def _grouped(bits: int) -> Make:
    return lambda _: _class("grouped", "GroupedCodec")(bits=bits)


def _lowrank(name: str, factor_bits: int | None, values: Make) -> Make:
    return lambda profile: _class("lowrank", "LowRankCodec")(
        values(_wanted(profile, name)), factor_bits=factor_bits, profile=_wanted(profile, name)
    )


def _lossless(inner: Make) -> Make:
    return lambda profile: _class("lossless", "LosslessCodec")(inner(profile))


_NUQ: dict[str, Make] = {f"nuq{bits}": _nuq(bits) for bits in (4, 3, 2)}

CODECS: Mapping[str, Make] = {
    "raw": lambda _: RawCodec(),
    "lossless": _lossless(lambda _: RawCodec()),
    **{f"int{bits}": _grouped(bits) for bits in (8, 4, 2)},
    "fp8": lambda _: _class("fp8", "Fp8Codec")(),
    **_NUQ,
    "transform": lambda profile: _class("transform.transform", "TransformCodec")(_wanted(profile, "transform")),
    "lowrank": _lowrank("lowrank", None, lambda _: RawCodec()),
    **{f"lowrank4+{name}": _lowrank(f"lowrank4+{name}", 4, make) for name, make in _NUQ.items()},
    **{f"lossless+{name}": _lossless(make) for name, make in _NUQ.items()},
}
"""Every codec that has a name, and what makes it."""

WITHDRAWN: Mapping[str, str] = {
    "kv4": "it cost a real model 11 % of perplexity at 4.5 bits; use int4 or nuq4, which cost a tenth of that"
}
"""Names that earlier releases had, and what to use instead."""
