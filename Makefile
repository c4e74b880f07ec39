# `make demo` and `make test` work from a fresh clone: the environment is made on the first call.
PYTHON ?= python3
# Tests run in this many processes, each on one thread.
JOBS ?= 2
# Extra words for the pip call that installs torch, such as an index that has CPU-only wheels.
TORCH_PIP_ARGS ?=
# Extra words for the demo or the benchmark: make demo FLAGS="--seed 1", make bench FLAGS=policy_loss
FLAGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(RUN) -m rlcore demo $(FLAGS)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --benchmark-disable

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.installed-bench
	OMP_NUM_THREADS=1 $(RUN) -m rlcore bench $(FLAGS)
	OMP_NUM_THREADS=1 $(RUN) -m pytest benchmarks

gpu: $(VENV)/.installed
	PYTHON=$(RUN) bash benchmarks/gpu.sh

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks

# torch goes first and alone, then the triton that ships with it; both are pinned, so that what
# follows finds them in place and replaces neither.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_PIP_ARGS) torch
	$(PIP) 'triton; platform_system == "Linux"'
	$(PIP) 'setuptools>=77' -e '.[test,report]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) -e '.[bench]'
	touch $@
