"""The model that is measured: the bundled one, or a local folder."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..connectors.hf import loading
from .environment import BUNDLED_MODEL


def load_model(
    folder: Path | None, *, dtype: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `connectors.hf.loading.load_model`; no folder means the bundled model.

    For commands: from here on, transformers shows no warnings and no progress bars of its own in this process.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return loading.load_model(BUNDLED_MODEL if folder is None else folder, dtype=dtype, device=device)


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
