"""Tiers on other machines by URL: one text names the engine, where it is, and how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pydantic import ByteSize, TypeAdapter, ValidationError

from ..core import Tier

Options: TypeAlias = Mapping[str, str]

_SHARED = ("prefix", "capacity", "in_flight", "recheck_s")
_KNOWN: Mapping[str, tuple[str, ...]] = {
    "http": ("token_file",),
    "https": ("token_file",),
    "redis": ("password_file", "ttl_s", *_SHARED),
    "rediss": ("password_file", "ttl_s", *_SHARED),
    "unix": ("password_file", "ttl_s", "db", *_SHARED),
    "s3": ("endpoint", "region", "credentials_file", "multipart", *_SHARED),
    "mooncake": ("metadata", "local_hostname", "protocol", "devices", "replicas", "segment", "staging", *_SHARED),
}
SCHEMES = tuple(_KNOWN)
_SIZE = TypeAdapter(ByteSize)


def open_tier(
    url: str,
    *,
    name: str = "remote",
    timeout_s: float = 5.0,
    token_file: str | None = None,
    ca_file: str | None = None,
) -> Tier:
    """The tier that a URL names. It connects when it is first used, and may be down until then.

        http://host:8700?token_file=PATH          a kvloom service (https, too)
        redis://[user:password@]host:6379/0       Redis or Valkey (rediss for TLS, unix for a socket)
        s3://bucket/prefix?endpoint=URL&region=R  S3, or what speaks its protocol at the endpoint
        mooncake://host:50051?replicas=2          a Mooncake cluster, by its master

    Further options follow `?`, joined by `&`: `prefix`, `capacity`, `in_flight` (sizes as `"32GiB"`), `recheck_s` for
    all but a service; `password_file`, `ttl_s` for Redis; `credentials_file` (access key and secret, a line each),
    `multipart` for S3; `metadata`, `local_hostname`, `protocol`, `devices`, `segment`, `staging` for Mooncake.

    Parameters
    ----------
    name : of the tier.
    timeout_s : longest time that an engine is waited for.
    token_file, ca_file : of a kvloom service: its token, instead of the option, and the certificates (PEM) to trust.

    Raises
    ------
    ValueError : it is no such URL, or an option is unknown or wrong. The message never shows a password.
    ImportError : the client of that engine is not installed; says what to install.
    OSError : a file that an option names cannot be read.
    """
    parts = urlsplit(url)
    options = _options(url)
    if parts.scheme in ("http", "https"):
        from ..kvstore.tiers.remote.tier import RemoteTier

        token_file = token_file or options.get("token_file")
        if token_file is None:
            raise ValueError(f"{shown(url)} needs a token; add ?token_file=PATH")
        address = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
        return RemoteTier(address, token_file=token_file, ca_file=ca_file, name=name, timeout_s=timeout_s)
    if token_file is not None:
        raise ValueError(f"a token file is for a kvloom service, not for {shown(url)}")

    from ..kvstore.tiers.distributed.tier import Sharing

    prefix = options.get("prefix") or "kvloom/"
    if parts.scheme == "s3":
        prefix = "/".join(part for part in (parts.path.strip("/"), prefix) if part)
    usual = Sharing(name=name)
    sharing = Sharing(
        name=name,
        prefix=prefix,
        capacity_bytes=_size(options, "capacity", None),
        in_flight_bytes=_size(options, "in_flight", usual.in_flight_bytes) or 0,
        recheck_s=_number(options, "recheck_s", usual.recheck_s) or 0.0,
        timeout_s=timeout_s,
    )
    if parts.scheme == "s3":
        from ..kvstore.tiers.distributed.object_tier import ObjectStoreTier, s3_store

        if not parts.netloc:
            raise ValueError(f"{shown(url)} names no bucket; expected s3://bucket/prefix")
        access_key_id, secret_access_key = _credentials(options.get("credentials_file"))
        store = s3_store(
            parts.netloc,
            endpoint=options.get("endpoint"),
            region=options.get("region"),
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            timeout_s=timeout_s,
        )
        return ObjectStoreTier(store, sharing=sharing, multipart_bytes=_size(options, "multipart", 32 << 20) or 0)
    if parts.scheme == "mooncake":
        from ..kvstore.tiers.distributed.mooncake_tier import MooncakeOptions, MooncakeTier

        default = MooncakeOptions()
        mooncake = MooncakeOptions(
            metadata=options.get("metadata", default.metadata),
            local_hostname=options.get("local_hostname"),
            protocol=options.get("protocol", default.protocol),
            devices=options.get("devices", default.devices),
            replicas=int(_number(options, "replicas", 1) or 0),
            segment_bytes=_size(options, "segment", 0) or 0,
            staging_bytes=_size(options, "staging", default.staging_bytes) or 0,
        )
        return MooncakeTier(parts.netloc, options=mooncake, sharing=sharing)

    from ..kvstore.tiers.distributed.redis_tier import RedisTier

    kept = f"db={options['db']}" if "db" in options else ""
    address = urlunsplit((parts.scheme, parts.netloc, parts.path, kept, ""))
    if parts.scheme == "unix" and not parts.netloc:
        address = f"unix://{parts.path}" + (f"?{kept}" if kept else "")
    password_file = options.get("password_file")
    return RedisTier(address, password_file=password_file, ttl_s=_number(options, "ttl_s", None), sharing=sharing)


def check_url(url: str) -> str:
    """The URL, if `open_tier` could read it; for settings, before anything is opened.

    Raises
    ------
    ValueError : as `open_tier`.
    """
    _options(url)
    return url


def shown(url: str) -> str:
    """A URL without user, password and options."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _options(url: str) -> Options:
    """Options of a URL with a known scheme, each known and given once."""
    parts = urlsplit(url)
    if parts.scheme not in _KNOWN:
        raise ValueError(f"{shown(url)!r} is no tier; expected a URL that begins with one of {', '.join(SCHEMES)}")
    if not (parts.netloc or parts.scheme == "unix"):
        raise ValueError(f"{shown(url)!r} names no host; expected {parts.scheme}://host...")
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    known = _KNOWN[parts.scheme]
    for name, text in pairs:
        if name not in known:
            raise ValueError(f"{shown(url)} has the option {name!r}; known are {', '.join(known)}")
        if not text:
            raise ValueError(f"{shown(url)} has an empty option {name!r}")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"{shown(url)} has an option twice")
    return dict(pairs)


def _size(options: Options, name: str, default: int | None) -> int | None:
    if name not in options:
        return default
    try:
        return int(_SIZE.validate_python(options[name]))
    except ValidationError:
        raise ValueError(f"option {name} is {options[name]!r}; expected bytes, or text like '32GiB'") from None


def _number(options: Options, name: str, default: float | None) -> float | None:
    if name not in options:
        return default
    try:
        return float(options[name])
    except ValueError:
        raise ValueError(f"option {name} is {options[name]!r}; expected a number") from None


def _credentials(path: str | None) -> tuple[str | None, str | None]:
    """Access key and secret, a line each, of a file; None for those of the environment."""
    if path is None:
        return None, None
    lines = Path(path).expanduser().read_text().split()
    if len(lines) != 2:
        raise ValueError(f"credentials_file {path} has {len(lines)} lines; expected an access key and a secret")
    return lines[0], lines[1]
