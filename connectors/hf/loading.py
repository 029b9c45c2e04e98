"""A model and its tokenizer from a local folder."""

from __future__ import annotations

from pathlib import Path

import torch

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
except ImportError as error:
    raise ImportError('kvloom.connectors.hf.loading needs transformers: pip install "kvloom[transformers]"') from error


def load_model(
    folder: Path, *, dtype: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode and its tokenizer. Nothing is downloaded, and no code of the folder is run.

    Parameters
    ----------
    folder : with config.json, weights as safetensors, and the tokenizer.
    dtype : `auto` for the precision of the weights, or a name of torch's; None for float32 on a CPU, where it is exact,
        and `auto` on a GPU.
    device : None for CUDA if there is a device, otherwise the CPU.

    Raises
    ------
    ValueError : there is no such model, or it cannot be loaded.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"no model in {folder}; expected a local Hugging Face folder with config.json and weights")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype or ("float32" if device == "cpu" else "auto"),
            attn_implementation="sdpa",
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load the model in {folder}: {error}") from error
    torch.nn.Module.to(model, device)
    return model.eval(), tokenizer
