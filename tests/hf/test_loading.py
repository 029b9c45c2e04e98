"""Models from local folders."""

from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from kvloom.connectors.hf.loading import load_model
from kvloom.evaluation.environment import BUNDLED_MODEL


def test_loading_changes_nothing_for_the_process() -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity_info()
        transformers_logging.enable_progress_bar()
        model, tokenizer = load_model(BUNDLED_MODEL, device="cpu")
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
        assert not model.training and len(tokenizer("a loom").input_ids) > 0
    finally:
        transformers_logging.set_verbosity(before[0])
        if not before[1]:
            transformers_logging.disable_progress_bar()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int3"}, "dtype is 'int3'"), ({"device": "tpu"}, "device is 'tpu'"), ({}, "no model in")],
)
def test_what_cannot_be_loaded(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, **options)
