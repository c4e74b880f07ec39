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
row_kernels=(token_logprob policy_loss policy_loss_properties bad_input ops mutants compile_gate)
others=(linear_head linear_ops categorical categorical_kernels scan_kernels surrogates)
files() { printf 'tests/test_%s.py ' "$@"; }
status=0
# shellcheck disable=SC2046
"$PYTHON" -m pytest $(files "${row_kernels[@]}") -p no:cacheprovider || status=$?
# a time limit, because the scans' tiles wait for each other
# shellcheck disable=SC2046
timeout 240 "$PYTHON" -m pytest $(files "${others[@]}") -p no:cacheprovider || status=$?
"$PYTHON" benchmarks/gpu.py --output "$RESULTS"
exit "$status"
