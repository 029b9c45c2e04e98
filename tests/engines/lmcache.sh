#!/usr/bin/env bash
# tests/engines/lmcache.sh FOLDER: a virtual environment with stock LMCache and with this checkout of kvloom.
# PYTHON is the interpreter to start from. What is downloaded comes to about 600 MB; nothing needs a GPU.
set -euo pipefail
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
version=${LMCACHE_VERSION:-0.5.6}

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)

# LMCache asks for CUDA's packages. Its own code runs without them, with torch's processor build; so it is installed
# alone, and then what its server and its storage import.
"${pip[@]}" install --quiet "$(grep '^torch==' "$root/constraints.txt")"
"${pip[@]}" install --quiet --no-deps "lmcache==$version"
"${pip[@]}" install --quiet "$(grep '^torch==' "$root/constraints.txt")" aiofile aiofiles aiohttp cachetools cryptography \
  fastapi grpcio httptools httpx huggingface_hub msgspec numba numpy nvtx opentelemetry-api opentelemetry-exporter-otlp \
  opentelemetry-exporter-prometheus opentelemetry-sdk prometheus-client psutil py-cpuinfo pydantic pyyaml pyzmq redis \
  requests safetensors sortedcontainers transformers uvicorn

# kvloom without the versions that its own tests are pinned to: LMCache's come first.
"${pip[@]}" install --quiet blake3 xxhash safetensors typer rich prometheus-client zstandard faiss-cpu \
  pytest pytest-timeout hypothesis
"${pip[@]}" install --quiet --no-deps --editable "$root"
"$folder/bin/python" -c 'import importlib.metadata as m; print("LMCache", m.version("lmcache"), "is installed")'
