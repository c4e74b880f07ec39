#!/usr/bin/env bash
# On a machine with a GPU: prove the kernels natively (no interpreter), then measure them against
# their floors. Runs under the interpreter's python, whatever torch >= 2.11 and triton >= 3.6 it has.
#   PYTHON=python3 RESULTS=benchmarks/results bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "make gpu needs a CUDA device"'
"$PYTHON" -m pytest tests/test_token_logprob.py tests/test_policy_loss.py tests/test_ops.py \
    tests/test_mutants.py tests/test_compile_gate.py -p no:cacheprovider
"$PYTHON" benchmarks/gpu.py --output "$RESULTS"
