#!/usr/bin/env bash
# tests/engines/sglang.sh FOLDER: a virtual environment with stock SGLang and with this checkout of kvloom.
# PYTHON is the interpreter to start from. What is downloaded comes to about 1 GB; the engine runs without a GPU, by what
# tests/engines/sglang/cpu puts in place of kernels. It needs a C++ compiler, ninja and OpenSSL's headers.
set -euo pipefail
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
version=0.5.23
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)

# SGLang asks for CUDA's builds of torch and of its kernels. Its own code runs without them, with torch's processor build;
# so it is installed alone, and then what the engine of a plain language model imports.
"${pip[@]}" install --quiet "$(grep '^torch==' "$root/constraints.txt")"
"${pip[@]}" install --quiet --no-deps "sglang==$version" torchvision==0.28.0
"${pip[@]}" install --quiet "$(grep '^torch==' "$root/constraints.txt")" aiohttp apache-tvm-ffi compressed-tensors==0.17.0 dill \
  einops fastapi gguf grpcio huggingface_hub ipython loguru mistral_common msgspec ninja numpy openai opentelemetry-api \
  opentelemetry-exporter-otlp opentelemetry-sdk orjson partial-json-parser pillow psutil pybase64 pydantic python-multipart \
  pyzmq requests safetensors sentencepiece setproctitle tiktoken tokenizers tqdm traitlets 'transformers>=5.16.1,<5.20' \
  uvicorn uvloop xgrammar==0.2.8

# torchvision's build for CUDA cannot load its operators here, and does not import without two of them.
"$folder/bin/python" - <<'PYTHON'
import importlib.util, pathlib

path = pathlib.Path(importlib.util.find_spec("torchvision").origin)
text = path.read_text()
if "_processor_operators" not in text:
    path.write_text(
        "import torch as _torch\n"
        '_processor_operators = _torch.library.Library("torchvision", "FRAGMENT")\n'
        'for _name in ("nms", "qnms"):\n'
        '    _processor_operators.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
        + text
    )
PYTHON
cp -r "$root/tests/engines/sglang/cpu" "$work/cpu"
"${pip[@]}" install --quiet --no-deps "$work/cpu"

# kvloom without the versions that its own tests are pinned to: the engine's come first.
"${pip[@]}" install --quiet blake3 xxhash safetensors typer rich prometheus-client zstandard matplotlib faiss-cpu \
  pytest pytest-timeout hypothesis
"${pip[@]}" install --quiet --no-deps --editable "$root"
"$folder/bin/python" -c 'import importlib.metadata as m; print("SGLang", m.version("sglang"), "is installed")'
