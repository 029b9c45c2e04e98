"""Frameworks' own tests are partly coroutines, and expect that all of them are run as such."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.has_plugin("asyncio"):
        config.option.asyncio_mode = "auto"
