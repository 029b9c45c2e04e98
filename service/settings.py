"""Settings of the service: from a TOML file, `KVLOOM_*` variables and flags, each of which overrides those before."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

try:
    from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
    from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
    from pydantic_settings.sources import TomlConfigSettingsSource
except ImportError as exc:
    raise ImportError("the service needs its own packages: pip install 'kvloom[service]'") from exc

_UNITS = {"": 1, "B": 1} | {f"{prefix}iB": 1 << 10 * (i + 1) for i, prefix in enumerate("KMGT")}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B|)\s*")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def parse_bytes(value: object) -> object:
    """A size given as text (`"32GiB"`) as an integer; anything else as it is, for the type to refuse."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(float(match[1]) * _UNITS[match[2]])
    if isinstance(value, str):
        raise ValueError("expected bytes, or text like '32GiB' (B, KiB, MiB, GiB, TiB)")
    return value


def _resolved(value: object) -> object:
    if isinstance(value, str | Path):
        if not str(value).strip():
            raise ValueError("expected a path, not an empty text")
        return Path(value).expanduser().absolute()
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
LocalPath = Annotated[Path, BeforeValidator(_resolved)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def default_directory() -> Path:
    """`$XDG_DATA_HOME/kvloom/service`, usually `~/.local/share/kvloom/service`."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path("~/.local/share").expanduser())
    return Path(base) / "kvloom" / "service"


class ServiceSettings(BaseSettings):
    """Every setting of `kvloom serve`. Sizes may be given as text, `"32GiB"`; paths may begin with `~`."""

    model_config = SettingsConfigDict(env_prefix="KVLOOM_", extra="forbid", frozen=True, env_nested_delimiter="__")

    directory: LocalPath = Field(
        default_factory=default_directory, description="Folder of the service: chunks on disk, tokens, logs."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs TLS.")
    port: int = Field(8700, ge=0, le=65535, description="TCP port; 0 for any that is free.")
    workers: int = Field(
        1,
        ge=0,
        le=256,
        description="Processes that accept connections and move bodies; 1 or 0 for none beside the store.",
    )
    tls_certificate: LocalPath | None = Field(None, description="Certificate chain (PEM).")
    tls_key: LocalPath | None = Field(None, description="Private key of the certificate (PEM).")
    tls_key_password: SecretStr | None = Field(None, description="Password of the private key, if it has one.")

    host_bytes: Bytes = Field(4 << 30, description="Chunks kept in memory.")
    disk_bytes: Bytes = Field(64 << 30, description="Chunks kept on disk; 0 for no disk.")
    durability: Literal["cache", "batch", "sync"] = Field("batch", description="When chunks on disk are synced.")
    tier_timeout_s: Seconds = Field(10.0, description="How long a request waits for a tier.")

    max_body_bytes: Bytes = Field(512 << 20, description="Largest request body.")
    max_upload_bytes: Bytes = Field(4 << 30, description="Bodies of chunks that are on their way in, all together.")
    max_json_bytes: Bytes = Field(1 << 20, description="Largest request body that is not a chunk.")
    max_header_bytes: Bytes = Field(16 << 10, description="Largest request header.")
    max_keys: int = Field(4096, ge=1, description="Keys in one request.")
    max_connections: int = Field(1024, ge=1, description="Open connections.")
    max_requests: int = Field(256, ge=1, description="Requests served at a time; more are refused with 503.")
    max_tenant_requests: int = Field(128, ge=1, description="Of these, requests of one tenant.")
    max_transfers: int = Field(4, ge=1, description="Chunks that move at a time; further ones wait for their turn.")
    max_pin_s: Seconds = Field(3600.0, description="Longest deadline of a pin.")
    max_pinned_keys: int = Field(65536, ge=1, description="Keys that one tenant may pin at a time.")
    header_timeout_s: Seconds = Field(10.0, description="A request's header must be complete within this time.")
    idle_timeout_s: Seconds = Field(20.0, description="A body may pause for this long.")
    request_timeout_s: Seconds = Field(120.0, description="A body must be complete within this time.")
    keep_alive_s: Seconds = Field(30.0, description="An idle connection is kept for this long.")
    drain_timeout_s: Seconds = Field(30.0, description="On SIGTERM, open requests have this long to end.")
    tenant_requests_per_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Requests a second of one tenant, in the mean of ten seconds; none for no limit."
    )
    tenant_reserve_ratio: Share = Field(0.0, description="Share of every tier that no other tenant evicts below.")
    tenant_limit_ratio: Share = Field(1.0, description="Share of every tier that one tenant takes at most.")
    latency_quantum_s: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Look-ups answer at whole multiples of this time, so that timing tells less; 0 for at once."
    )
    shared_memory_bytes: Bytes = Field(256 << 20, description="Shared memory for one client on this host; 0 for none.")
    shared_chunk_bytes: Bytes = Field(
        1 << 30,
        description="Chunks in memory that clients of their tenant on this host map; 0 for none.",
    )
    shared_memory_clients: int = Field(16, ge=1, description="Clients that may hold shared memory at a time.")

    remote_tiers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Tiers on other machines that may be attached: URL by name."
    )

    models: dict[str, LocalPath] = Field(
        default_factory=dict, description="Models of the embedded engine: folder by name."
    )
    recompute_ratio: Share = Field(0.15, description="Share of document tokens that fusion recomputes.")
    max_new_tokens: int = Field(512, ge=1, description="Most tokens of one completion.")
    max_documents: int = Field(100_000, ge=1, description="Documents that one tenant may register.")

    events_endpoint: str | None = Field(
        None, description="ZeroMQ address on which KV events are published, such as tcp://127.0.0.1:5557."
    )
    events_tenant: str = Field("default", description="Whose KV events are published.")
    telemetry_endpoint: str | None = Field(None, description="OTLP/HTTP address for traces.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["text", "json"] = Field("text", description="Form of the log.")
    audit: bool = Field(True, description="Write who did what to audit.jsonl in the directory.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; give both or neither")
        if self.tenant_reserve_ratio > self.tenant_limit_ratio:
            raise ValueError(
                f"tenant_reserve_ratio is {self.tenant_reserve_ratio}, above tenant_limit_ratio "
                f"{self.tenant_limit_ratio}; expected reserve <= limit"
            )
        for name in self.models:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
                raise ValueError(f"models has {name!r}; expected letters, digits, dots, dashes, at most 64")
        return self

    @property
    def uses_tls(self) -> bool:
        return self.tls_certificate is not None

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What a constructor is given counts, and nothing else: `load_settings` reads the other sources."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings, and where each value came from: `flag`, `KVLOOM_NAME`, a file, or `default`."""

    settings: ServiceSettings
    origins: Mapping[str, str]

    def lines(self) -> list[str]:
        """`name = value  # origin` for each setting, a file that says the same; unset and secret ones are comments."""
        return [_line(name, getattr(self.settings, name), origin) for name, origin in self.origins.items()]


def load_settings(file: Path | None = None, flags: Mapping[str, Any] | None = None) -> LoadedSettings:
    """The effective settings. `KVLOOM_CONFIG` names a file if `file` is None.

    Raises
    ------
    ValueError : a name is unknown, a value is not of its kind, or the file cannot be read; names what and where.
    """
    if file is None and os.environ.get("KVLOOM_CONFIG"):
        file = Path(os.environ["KVLOOM_CONFIG"])
    given: dict[str, Any] = {}
    origins = dict.fromkeys(ServiceSettings.model_fields, "default")
    sources: list[tuple[Mapping[str, Any], str]] = []
    if file is not None:
        file = file.expanduser()
        try:
            sources.append((TomlConfigSettingsSource(ServiceSettings, file)(), str(file)))
        except (OSError, ValueError) as exc:
            raise ValueError(f"cannot read settings from {file}: {exc}") from exc
        if not file.is_file():
            raise ValueError(f"cannot read settings from {file}: no such file")
    sources.append((EnvSettingsSource(ServiceSettings)(), "environment"))
    sources.append(({name: value for name, value in (flags or {}).items() if value is not None}, "flag"))
    for values, origin in sources:
        for name, value in values.items():
            if name not in origins:
                raise ValueError(f"{origin} has {name!r}; known settings are {', '.join(origins)}")
            given[name] = value
            origins[name] = f"KVLOOM_{name.upper()}" if origin == "environment" else origin
    try:
        settings = ServiceSettings(**given)
    except ValidationError as exc:
        raise ValueError("; ".join(_problem(error, origins) for error in exc.errors())) from exc
    return LoadedSettings(settings, origins)


def _problem(error: Any, origins: Mapping[str, str]) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    text = str(error["msg"]).removeprefix("Value error, ")
    if not name:
        return text
    shown = "***" if "password" in name else repr(error["input"])
    return f"{name} is {shown} ({origins.get(name, 'given')}): {text}"


def _line(name: str, value: object, origin: str) -> str:
    if value is None:
        return f"# {name} is not set  # {origin}"
    if isinstance(value, SecretStr):
        return f"# {name} is secret  # {origin}"
    if isinstance(value, dict) and any(isinstance(each, SecretStr) for each in value.values()):
        return f"# {name} is secret: {', '.join(value)}  # {origin}"
    if name.endswith("_bytes") and isinstance(value, int):
        return f'{name} = "{_size(value)}"  # {origin}'
    return f"{name} = {_toml(value)}  # {origin}"


def _size(nbytes: int) -> str:
    """The shortest text that `parse_bytes` reads as this size."""
    unit, factor = max(
        ((unit, factor) for unit, factor in _UNITS.items() if unit and not nbytes % factor), key=lambda pair: pair[1]
    )
    return f"{nbytes // factor}{unit}" if nbytes else "0B"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, int | float):
        return repr(value)
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
