#!/usr/bin/env bash
# tests/engines/frameworks.sh FOLDER: a virtual environment with LangChain and its standard tests, LlamaIndex, Haystack, their
# OpenAI clients, and this checkout of kvloom with its service. PYTHON is the interpreter to start from. About 600 MB beside torch.
set -euo pipefail
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet "$(grep '^torch==' "$root/constraints.txt")"
"${pip[@]}" install --quiet --editable "$root[rag,service,langchain,llamaindex,haystack]" langchain-tests==1.1.9 langchain-openai==1.7.4 \
  hypothesis pytest pytest-timeout -c "$root/constraints.txt"
# Their OpenAI client asks for openai below 3, which LangChain's does not; what is called is the same.
"${pip[@]}" install --quiet --no-deps llama-index-llms-openai==0.8.3 llama-index-llms-openai-like==0.8.1
# The oldest transformers that is supported and the newest one, with the packages that only one of them accepts. Each is put
# first on PYTHONPATH for a few tests: `make test-engines`.
rm -rf "$folder/transformers-oldest" "$folder/transformers-newest"
"${pip[@]}" install --quiet --no-deps --target "$folder/transformers-oldest" transformers==5.0.0 tokenizers==0.22.2 huggingface-hub==1.3.0
"${pip[@]}" install --quiet --no-deps --target "$folder/transformers-newest" transformers==5.24.0
"$folder/bin/python" - <<'PYTHON'
from importlib.metadata import version

print(", ".join(f"{name} {version(name)}" for name in ("langchain-core", "llama-index-core", "haystack-ai")), "are installed")
PYTHON
