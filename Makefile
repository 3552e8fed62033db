# Every target makes its own virtual environment from the pinned versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# What pip installs is compiled afterwards, on all cores at once.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable
COMPILE := $(BIN)/python -m compileall -q -j 0 .venv/lib

.PHONY: sweep test check bench audit setup clean

sweep: setup  ## sweep the embedded default, then decide
	@$(BIN)/python sweeps/kl_ablation.py --num-samples 20
	@$(BIN)/python analysis/pick_beta.py

test: setup  ## the whole test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready-bench  ## measurements, as tables, several hours
	$(BIN)/python -m tests.benchmarks.bench_kl
	$(BIN)/python -m tests.benchmarks.bench_step
	$(BIN)/python -m tests.benchmarks.bench_memory
	$(BIN)/python -m tests.benchmarks.bench_tiny_world
	$(BIN)/python -m tests.benchmarks.bench_search --quick
	$(BIN)/python -m tests.benchmarks.bench_choice
	$(BIN)/python -m tests.benchmarks.bench_stopping
	$(BIN)/python -m tests.benchmarks.bench_plan
	$(BIN)/python -m tests.benchmarks.bench_sweep
	$(BIN)/python -m tests.benchmarks.bench_faults
	$(BIN)/python -m tests.benchmarks.bench_soak

audit: .venv-audit/ready  ## known vulnerabilities of the pinned versions, asked of the Python Packaging Advisory Database
	@.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off \
		>.venv-audit/report 2>.venv-audit/errors; status=$$?; cat .venv-audit/report; \
	test $$status -eq 0 || test -s .venv-audit/report || \
		echo "error: nothing was audited: $$(tail -n 1 .venv-audit/errors); see .venv-audit/errors" >&2; \
	exit $$status

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[test]'
	$(COMPILE) >/dev/null || true
	touch $@

.venv/ready-bench: .venv/ready
	$(INSTALL) '.[bench]'
	$(COMPILE) >/dev/null || true
	touch $@

.venv-audit/ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'
	touch $@

clean:  ## remove the environment and caches, never runs/
	rm -rf .venv .venv-audit .pytest_cache .ruff_cache .hypothesis *.egg-info
