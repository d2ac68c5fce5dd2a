# make demo · make test · make lint · make bench: each does its own set-up in .venv
PYTHON ?= python3
# On a machine whose package index serves CUDA builds of torch, point pip at a CPU index:
#   make demo PIP_FLAGS="--index-url <your CPU index>"
PIP_FLAGS ?=
BIN := .venv/bin

# make nightly: also the honest runs that take long
.PHONY: demo test nightly lint types bench format clean

.venv/run.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "trainguard needs Python 3.11 or newer, found " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

.venv/test.stamp: .venv/run.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
	  pytest pytest-randomly pytest-timeout pytest-xdist hypothesis ruff mypy \
	  transformers accelerate lightning safetensors scikit-learn mlflow-skinny wandb submitit kubernetes-validate lightgbm xgboost-cpu jsonschema weasyprint pypdf
	@touch $@

# What others wrote and our seals are held against; without it those tests are skipped with their reason.
.venv/readers.stamp: tools/readers.sh .venv/test.stamp
	-PYTHON=$(BIN)/python PIP_FLAGS="$(PIP_FLAGS)" sh tools/readers.sh .venv-tools
	@touch $@

demo: .venv/run.stamp
	$(BIN)/trainguard demo

lint: .venv/test.stamp
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/ruff check src tests bench examples

types: .venv/test.stamp
	$(BIN)/mypy

test: lint types .venv/readers.stamp
	$(BIN)/python -m pytest -q -n 3 --dist loadgroup

nightly: .venv/test.stamp .venv/readers.stamp
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "nightly or not nightly"

bench: .venv/test.stamp
	for file in bench/bench_*.py; do $(BIN)/python $$file || exit 1; done

format: .venv/test.stamp
	$(BIN)/ruff format src tests bench examples
	$(BIN)/ruff check --fix src tests bench examples

clean:
	rm -rf .venv .venv-tools build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
