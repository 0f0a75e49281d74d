# Each target makes the environment that it needs; nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-floor lint format docs wheel bench scale fuzz torture mutation \
	coverage forms clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-12s %s\n", $$1, $$2}'

demo: $(VENV)/demo ## the workflow on real data: pretrain, capture, adapt, fold, verify, export
	$(BIN)/python examples/demo.py $(ARGS)

# One thread per worker: OpenMP's idle threads spin, and would slow down the other worker.
test test-all test-floor: export OMP_NUM_THREADS = 1

test: $(VENV)/test ## the tests, without the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-all: $(VENV)/test ## all tests, including the slow sweeps over all models
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-floor: $(FLOOR)/test ## the tests on the oldest supported torch and torchvision
	$(FLOOR)/bin/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

lint: $(VENV)/lint ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/docs ## the pages in docs/ as HTML in build/docs; warnings are errors
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs build/docs

wheel: $(VENV)/test ## build the wheel, install it into an empty environment, and run the quickstart
	rm -rf build/wheel && $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv --clear build/wheel/env
	build/wheel/env/bin/python -m pip install --quiet build/wheel/fxlora-*.whl
	cd build/wheel && env/bin/python ../../examples/quickstart.py

format: $(VENV)/lint ## fix and format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test ## the benchmarks behind the README's numbers (minutes)
	$(BIN)/python benchmarks/fold.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/layer_forms.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/capture_memory.py
	$(BIN)/python benchmarks/capture_cost.py

scale: $(VENV)/test ## how the time of every step grows with the number of layers (minutes)
	$(BIN)/python benchmarks/scale.py --kind preln bare weight traced $(ARGS)

coverage: $(VENV)/coverage ## every model of torchvision, timm's families, transformers' architectures (hours)
	$(BIN)/python benchmarks/coverage.py --json coverage.json $(ARGS)

torture: $(VENV)/test ## the table of docs/results/torture.md: PEFT and fxlora on 199 patterns (minutes)
	$(BIN)/python benchmarks/torture.py --format github $(ARGS)

mutation: $(VENV)/test ## the table of docs/results/mutation.md: damage that verify notices (minutes)
	$(BIN)/python benchmarks/mutation.py --format github $(ARGS)

fuzz: $(VENV)/test ## mutants of adapter folders, rules and plans: refused by type, or right (minutes)
	$(BIN)/python benchmarks/fuzz.py $(ARGS)

forms: $(VENV)/coverage ## the form that each weight of coverage's models takes, and why (an hour)
	$(BIN)/python benchmarks/forms.py --json forms.json $(ARGS)

clean: ## remove the environments and the demo's output
	rm -rf .venv .venv-floor demo-output build *.egg-info

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo $(VENV)/test $(VENV)/lint $(VENV)/docs $(VENV)/coverage: $(VENV)/%: $(VENV)/pyvenv.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

$(FLOOR)/test: pyproject.toml
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check \
		"torch==2.11.*" "torchvision==0.26.*" --editable ".[test]"
	@touch $@
