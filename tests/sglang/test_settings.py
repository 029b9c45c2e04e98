"""What users may say in SGLang's extra config."""

import pytest

from kvloom.connectors.sglang.settings import SGLangSettings

SGLANGS = {"backend_name": "kvloom", "module_path": "kvloom.connectors.sglang", "class_name": "KVLoomStorage"}


def test_sglangs_own_entries_are_its_own() -> None:
    settings = SGLangSettings.of({**SGLANGS, "interface_v1": 1, "disk_path": "/kv", "disk_bytes": "1GiB"})
    assert settings == SGLangSettings(disk_path="/kv", disk_bytes=1 << 30)  # type: ignore[arg-type]
    assert settings.host_bytes is None


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "there is no tier; give disk_path, remote_url or host_bytes"),
        ({"disk_paths": "/kv"}, "extra_config has 'disk_paths'; known are host_bytes, disk_path"),
        ({"host_bytes": 0}, "host_bytes is 0; expected bytes"),
        ({"disk_path": "/kv", "host_codec": "int8"}, "host_codec is given without host_bytes"),
        ({"disk_path": "/kv", "chunk_tokens": 64}, "has 'chunk_tokens'"),
    ],
)
def test_wrong_settings_are_named(config: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        SGLangSettings.of({**SGLANGS, **config})
    assert "\n" not in str(refused.value)
