"""Settings from file, environment and flags: which counts, where it came from, and what is refused."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvloom.cli.app import app
from kvloom.service.settings import ServiceSettings, load_settings


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ServiceSettings.model_fields:
        monkeypatch.delenv(f"KVLOOM_{name.upper()}", raising=False)
    monkeypatch.delenv("KVLOOM_CONFIG", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def test_flags_override_the_environment_and_that_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "service.toml"
    file.write_text('host_bytes = "1GiB"\nport = 1\nmax_keys = 7\n[models]\ntiny = "~/tiny"\n')
    monkeypatch.setenv("KVLOOM_PORT", "2")
    monkeypatch.setenv("KVLOOM_MAX_KEYS", "8")
    loaded = load_settings(file, {"port": 3, "host": None})
    assert (loaded.settings.host_bytes, loaded.settings.port, loaded.settings.max_keys) == (1 << 30, 3, 8)
    assert loaded.settings.models == {"tiny": Path("~/tiny").expanduser()}
    assert loaded.origins["host_bytes"] == str(file) and loaded.origins["port"] == "flag"
    assert loaded.origins["max_keys"] == "KVLOOM_MAX_KEYS" and loaded.origins["host"] == "default"
    monkeypatch.setenv("KVLOOM_CONFIG", str(file))
    assert load_settings().settings.host_bytes == 1 << 30


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"port": "99999"}, "port is '99999'"),
        ({"host_bytes": "12 elephants"}, "host_bytes is '12 elephants'"),
        ({"durability": "often"}, "durability is 'often'"),
        ({"no_such": 1}, "known settings are directory, host, port"),
        ({"tls_certificate": "a.pem"}, "tls_certificate and tls_key belong together"),
        ({"tenant_reserve_ratio": 0.5, "tenant_limit_ratio": 0.1}, "expected reserve <= limit"),
        ({"models": {"a b": "x"}}, "models has 'a b'"),
        ({"directory": ""}, "directory is ''"),
    ],
)
def test_what_is_refused_is_named(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        load_settings(None, given)


def test_a_file_with_unknown_names_or_none_at_all(tmp_path: Path) -> None:
    file = tmp_path / "service.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ValueError, match="has 'prot'; known settings are"):
        load_settings(file)
    file.write_text("prot = = 1\n")
    with pytest.raises(ValueError, match="cannot read settings"):
        load_settings(file)
    with pytest.raises(ValueError, match="no such file"):
        load_settings(tmp_path / "none.toml")


def test_show_prints_a_file_that_says_the_same_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pem", "b.pem"):
        monkeypatch.setenv("KVLOOM_TLS_CERTIFICATE" if name == "a.pem" else "KVLOOM_TLS_KEY", str(tmp_path / name))
    monkeypatch.setenv("KVLOOM_TLS_KEY_PASSWORD", "hunter2")
    shown = CliRunner().invoke(app, ["config", "show", "--port", "5", "--set", "models.tiny=/models/tiny"])
    assert shown.exit_code == 0 and "hunter2" not in shown.output
    lines = shown.output.splitlines()
    assert "# tls_key_password is secret  # KVLOOM_TLS_KEY_PASSWORD" in lines and "port = 5  # flag" in lines
    assert 'models = {"tiny" = "/models/tiny"}  # flag' in lines and 'host_bytes = "4GiB"  # default' in lines
    again = tmp_path / "again.toml"
    again.write_text(shown.output)
    first = load_settings(None, {"port": 5, "models": {"tiny": "/models/tiny"}}).settings
    for name in ("TLS_CERTIFICATE", "TLS_KEY", "TLS_KEY_PASSWORD"):
        monkeypatch.delenv(f"KVLOOM_{name}")
    loaded = load_settings(again)
    assert {*loaded.origins.values()} == {"default", str(again)}
    assert loaded.settings.model_dump(exclude={"tls_key_password"}) == first.model_dump(exclude={"tls_key_password"})
