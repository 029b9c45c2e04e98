"""The model that is measured: the bundled one, or a local folder."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..connectors.hf import loading
from .environment import BUNDLED_MODEL


def load_model(
    folder: Path | None, *, dtype: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `connectors.hf.loading.load_model`; no folder means the bundled model."""
    return loading.load_model(BUNDLED_MODEL if folder is None else folder, dtype=dtype, device=device)


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
