#!/usr/bin/env bash
# tests/engines/frameworks.sh FOLDER: a virtual environment with LangChain and its standard tests, LlamaIndex, Haystack, and
# this checkout of kvloom. PYTHON is the interpreter to start from. About 600 MB beside torch.
set -euo pipefail
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet "$(grep '^torch==' "$root/constraints.txt")"
"${pip[@]}" install --quiet --editable "$root[rag,langchain,llamaindex,haystack]" langchain-tests==1.1.9 hypothesis pytest pytest-timeout \
  -c "$root/constraints.txt"
"$folder/bin/python" - <<'PYTHON'
from importlib.metadata import version

print(", ".join(f"{name} {version(name)}" for name in ("langchain-core", "llama-index-core", "haystack-ai")), "are installed")
PYTHON
