"""The commands of the service. Light: what serves is imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

token_app = typer.Typer(name="token", help="Tokens of the service.", no_args_is_help=True)
config_app = typer.Typer(name="config", help="Settings of the service.", no_args_is_help=True)

Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings file (TOML).")]
Directory = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the service.")]
Host = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Address to listen on; default 127.0.0.1.")]
Port = Annotated[int | None, typer.Option(help="TCP port; 0 for any that is free; default 8700.")]
Workers = Annotated[int | None, typer.Option(help="Processes that accept connections; default 1: this one alone.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; see `kvloom config show`.")
]


def serve(
    config: Config = None,
    directory: Directory = None,
    host: Host = None,
    port: Port = None,
    workers: Workers = None,
    set_: Settings = None,
) -> None:
    """Serve chunks and documents over HTTP, on this machine alone unless told otherwise."""
    from .server import serve as run
    from .settings import load_settings

    loaded = load_settings(config, _flags(directory, host, port, workers, set_))
    run(loaded.settings, say=typer.echo)


@config_app.command("show")
def show_config(
    config: Config = None,
    directory: Directory = None,
    host: Host = None,
    port: Port = None,
    workers: Workers = None,
    set_: Settings = None,
) -> None:
    """Print the settings that `kvloom serve` would use with these options, and where each comes from."""
    from .settings import load_settings

    for line in load_settings(config, _flags(directory, host, port, workers, set_)).lines():
        typer.echo(line)


@token_app.command("create")
def create_token(
    tenant: Annotated[str, typer.Option(help="Whose chunks it gives access to.")] = "default",
    scope: Annotated[list[str] | None, typer.Option(help="read, write or admin; may be repeated.")] = None,
    days: Annotated[float | None, typer.Option(help="Days after which it ends.")] = None,
    config: Config = None,
    directory: Directory = None,
) -> None:
    """Make a token and show it once; a running service accepts it within a second."""
    token = _tokens(config, directory).create(
        tenant, scope or ["read", "write"], ttl_s=None if days is None else days * 86400
    )
    typer.echo(token)


@token_app.command("list")
def list_tokens(config: Config = None, directory: Directory = None) -> None:
    """List tokens by ID; their secrets are kept nowhere."""
    for each in _tokens(config, directory).entries():
        until = "never ends" if each.expires_at_s is None else f"ends at {each.expires_at_s:.0f}"
        typer.echo(f"{each.id}  tenant {each.tenant}  {','.join(each.scopes)}  {until}")


@token_app.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="ID")], config: Config = None, directory: Directory = None
) -> None:
    """Revoke a token; a running service refuses it within a second."""
    if not _tokens(config, directory).revoke(token_id):
        raise ValueError(f"no token {token_id!r}; `kvloom token list` shows what there is")


def _tokens(config: Path | None, directory: Path | None):  # type: ignore[no-untyped-def]
    from .access.credentials import TokenFile
    from .settings import load_settings

    settings = load_settings(config, {"directory": directory}).settings
    settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return TokenFile(settings.directory / "tokens.json")


def _flags(
    directory: Path | None, host: str | None, port: int | None, workers: int | None, others: list[str] | None
) -> dict[str, object]:
    flags: dict[str, object] = {"directory": directory, "host": host, "port": port, "workers": workers}
    for text in others or []:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--set is {text!r}; expected NAME=VALUE")
        outer, dot, inner = name.partition(".")
        if dot:
            known = flags.setdefault(outer, {})
            if not isinstance(known, dict):
                raise ValueError(f"--set gives {outer} both as a whole and in parts")
            known[inner] = value
        else:
            flags[name] = value
    return flags
