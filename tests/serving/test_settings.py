"""What users may say: every wrong word is named, together with the words there are."""

from pathlib import Path
from typing import Any

import pytest

from kvloom.connectors.serving.settings import USAGE_KEYS, RequestOptions, ServingSettings, documents_between


@pytest.mark.parametrize(
    ("text", "expected"),
    [(7, 7), ("7", 7), ("12B", 12), ("1KiB", 1024), ("1.5GiB", 3 << 29), (" 32 GiB ", 32 << 30), ("2TiB", 2 << 40)],
)
def test_sizes(text: object, expected: int) -> None:
    assert ServingSettings.of({"host_bytes": text}).host_bytes == expected


@pytest.mark.parametrize("text", ["", "GiB", "1 barrel", "-1", -1, 0, True, None, 1.5, "1e3"])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match=r"^host_bytes is .*; expected bytes from 1, or text like '32GiB'$"):
        ServingSettings.of({"host_bytes": text})


def test_settings_are_read_and_have_defaults() -> None:
    config = {"host_bytes": "2MiB", "disk_path": "/cache", "disk_bytes": "1GiB", "chunk_tokens": 64, "lead_ids": [1, 2]}
    settings = ServingSettings.of(config)
    assert (settings.host_bytes, settings.disk_path, settings.disk_bytes) == (2 << 20, "/cache", 1 << 30)
    assert (settings.chunk_tokens, settings.lead_ids, settings.fusion_ratio) == (64, (1, 2), "certified")
    assert ServingSettings.of({}) == ServingSettings()
    assert ServingSettings.of({"fusion_ratio": 1}).fusion_ratio == 1.0


def test_paths_are_meant_where_they_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever folder the process goes to later."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("one.json").touch()
    settings = ServingSettings.of({"disk_path": "cache", "certificates": ["one.json"]})
    assert settings.disk_path == str(tmp_path / "cache")
    assert settings.certificates == (str(tmp_path / "one.json"),)
    assert ServingSettings.of({"disk_path": "~/kv"}).disk_path == str(tmp_path / "home" / "kv")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"host_byte": 1}, r"has 'host_byte'; known are host_bytes, disk_path"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; expected an integer from 1"),
        ({"chunk_tokens": "64"}, "chunk_tokens is '64'"),
        ({"host_bytes": 0}, "host_bytes is 0"),
        ({"disk_path": 3}, "disk_path is 3; expected the path of a folder, or null"),
        ({"disk_path": ""}, "disk_path is ''; expected the path of a folder"),
        ({"disk_path": "  "}, "disk_path is '  '; expected the path of a folder"),
        ({"salt": None}, "salt is None; expected text"),
        ({"fusion_ratio": 1.5}, "fusion_ratio is 1.5; expected a number from 0 to 1, or 'certified'"),
        ({"fusion_ratio": "sure"}, "fusion_ratio is 'sure'"),
        ({"disk_codec": "nuq4"}, "disk_codec is given without disk_path; name the folder"),
        ({"disk_bytes": "1GiB"}, "disk_bytes is given without disk_path; name the folder"),
        ({"host_codec": 4}, "host_codec is 4; expected text"),
        ({"certificates": "one.json"}, "certificates is 'one.json'; expected a list of paths"),
        (
            {"certificates": ["no such file"]},
            r"certificates is \['no such file'\]; expected a list of paths of files that",
        ),
        ({"profile": "no such file"}, "profile is 'no such file'; expected the path of a file that exists"),
        ({"allow_uncertified": "yes"}, "allow_uncertified is 'yes'; expected true or false"),
        ({"load_mode": "lazy"}, "load_mode is 'lazy'; expected one of async, layerwise"),
        ({"load_timeout_s": -1}, "load_timeout_s is -1"),
        ({"load_timeout_s": 0}, "load_timeout_s is 0; expected a number of seconds above 0"),
        ({"lead_ids": [1, -1]}, r"lead_ids is \[1, -1\]; expected a list of token ids"),
        ({"match_tokens": -1}, "match_tokens is -1; expected an integer from 0"),
    ],
)
def test_wrong_settings_are_named(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        ServingSettings.of(config)
    assert "\n" not in str(refused.value)


def test_requests_without_a_word_get_the_defaults() -> None:
    assert RequestOptions.of(None, 5) == RequestOptions.of({"do_remote_prefill": True}, 5) == RequestOptions()


def test_documents_of_a_request() -> None:
    options = RequestOptions.of({"kvloom": {"documents": [[0, 3], (3, 5)], "ratio": 0.15, "save": False}}, 5)
    assert options == RequestOptions(documents=((0, 3), (3, 5)), ratio=0.15, save=False)


def test_what_was_returned_may_be_sent_back() -> None:
    """Proxies give the `kv_transfer_params` of one engine's output to the next engine."""
    returned: dict[str, Any] = dict.fromkeys(USAGE_KEYS, 0)
    assert RequestOptions.of({"kvloom": returned}, 5) == RequestOptions()
    assert RequestOptions.of({"kvloom": {**returned, "save": False}}, 5) == RequestOptions(save=False)


@pytest.mark.parametrize(
    ("tokens", "separator", "expected"),
    [
        ([5, 9, 1, 2, 9, 3, 9, 7], [9], [(2, 4), (5, 6)]),
        ([9, 1, 9, 9, 2, 9], [9], [(1, 2), (4, 5)]),
        ([1, 9, 8, 2, 9, 3, 9, 8, 4, 9], [9, 8], [(3, 6)]),
        ([9, 9, 9, 1, 9, 9], [9, 9], [(2, 4)]),
        ([1, 9, 2], [9], []),
        ([1, 2], [9], []),
        ([1, 2, 1], [], []),
    ],
)
def test_documents_lie_between_separators(
    tokens: list[int], separator: list[int], expected: list[tuple[int, int]]
) -> None:
    assert list(documents_between(tokens, separator)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"document": []},
        {"load": 1},
        {"ratio": 2},
        {"documents": [[0, 6]]},
        {"documents": [[2, 2]]},
        {"documents": [[0, 3], [2, 4]]},
        {"documents": [[0, 1.0]]},
        {"documents": "all"},
        {"documents": [5]},
        [],
    ],
)
def test_wrong_options_are_refused(options: object) -> None:
    with pytest.raises(ValueError, match=r"expected|known are"):
        RequestOptions.of({"kvloom": options}, 5)


def test_how_fusions_choose() -> None:
    from typing import get_args

    from kvloom.blend.choosers import CHOOSERS
    from kvloom.blend.method import ENGINE_CHOICES, EngineChoice

    assert get_args(EngineChoice) == ENGINE_CHOICES
    assert "first+question" in ENGINE_CHOICES and CHOOSERS.keys() > set(ENGINE_CHOICES)
    for name in ENGINE_CHOICES:
        assert ServingSettings.of({"fusion_select": name}).fusion_select == name
    with pytest.raises(ValueError, match="fusion_select is 'random'; expected one of deviation, values"):
        ServingSettings.of({"fusion_select": "random"})
