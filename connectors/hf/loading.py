"""A model and its tokenizer from a local folder."""

from __future__ import annotations

from pathlib import Path

import torch

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
except ImportError as error:
    raise ImportError('kvloom.connectors.hf.loading needs transformers: pip install "kvloom[transformers]"') from error

DEVICES = ("cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    folder: Path, *, dtype: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode and its tokenizer. Nothing is downloaded, and no code of the folder is run.

    Parameters
    ----------
    folder : with config.json, weights as safetensors, and the tokenizer.
    dtype : one of `DTYPES`, `auto` for the model's own; None for float32 on a CPU, where it is exact, and the model's
        own on a GPU.
    device : one of `DEVICES`; None for a GPU if there is one.

    Raises
    ------
    ValueError : there is no usable Hugging Face folder, no such dtype, or no such device.
    """
    if device is not None and device.partition(":")[0] not in DEVICES:
        raise ValueError(f"device is {device!r}; expected one of {', '.join(DEVICES)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"no model in {folder}; expected a local Hugging Face folder with config.json and weights")
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no GPU; expected cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype or ("auto" if cuda else "float32"),
            attn_implementation="sdpa",
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load the model in {folder}: {error}") from error
    torch.nn.Module.to(model, device or ("cuda" if cuda else "cpu"))
    return model.eval(), tokenizer
