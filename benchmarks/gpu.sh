#!/usr/bin/env bash
# On a machine with a GPU: prove the kernels natively (no interpreter), then measure them beside
# their floors. Goes stage by stage, stops where a stage would not fit in LIMIT seconds, and goes on
# from there when called again: two calls of ten minutes do all of it. A failed stage is run again.
#   PYTHON=python3 RESULTS=benchmarks/results LIMIT=570 bash benchmarks/gpu.sh
# PYTHON has torch >= 2.11, its triton, and what `pip install -e ".[test]"` brings. DEVICE=cpu walks
# through the stages without a GPU, on small cases, to try the script itself.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-benchmarks/results}
LIMIT=${LIMIT:-570}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET RLCORE_BACKEND
mkdir -p "$RESULTS"
"$PYTHON" - "$DEVICE" <<'CHECK' || exit 1
import sys, torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("make gpu needs a CUDA device")
CHECK
name=$("$PYTHON" -c "
import sys, torch
from rlcore.bench.run import default_output
print(default_output(torch.device(sys.argv[1])).stem)" "$DEVICE")
json=$RESULTS/$name.json
progress=$RESULTS/.$name.stages
touch "$progress"
status=0

left() { echo $((LIMIT - SECONDS)); }

# stage NAME SECONDS COMMAND...: once, if so many seconds are left; 124 is a stage cut at its limit
stage() {
    local stage=$1 needed=$2
    shift 2
    grep -qx "$stage" "$progress" && return
    if (($(left) < needed)); then
        echo "== $stage: $(left) s left, it may take $needed; call again"
        exit 75
    fi
    echo "== $stage"
    if timeout "$(left)" "$@"; then
        echo "$stage" >>"$progress"
    else
        echo "== $stage failed with status $?"
        status=1
    fi
}

tests() {
    local files=()
    for file in "$@"; do files+=("tests/test_$file.py"); done
    # in parallel, as compiling takes the time; a limit, because the scans' tiles wait for each other
    OMP_NUM_THREADS=1 timeout 240 "$PYTHON" -m pytest "${files[@]}" -q -p no:cacheprovider \
        -n "${JOBS:-$(nproc)}" --dist worksteal
}

# every kernel under the checkers, each allocation by itself so that its bounds are seen
sanitize() {
    local checker
    if ! checker=$(command -v compute-sanitizer) || [[ $DEVICE != cuda ]]; then
        echo "compute-sanitizer is not here: left out"
        return
    fi
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 "$checker" --tool $tool --error-exitcode 9 \
            --kernel-name-exclude kernel_substring=at:: "$PYTHON" -m rlcore doctor || return
    done
}

bench() { "$PYTHON" -m rlcore bench "$@" --device "$DEVICE"; }

if [[ $DEVICE == cuda ]]; then
    sets=(gpu scaling) large=(large)
    row_tests=(token_logprob policy_loss policy_loss_properties float64 bad_input ops mutants)
    other_tests=(linear_head linear_plan linear_ops linear_preference linear_categorical_kl)
    other_tests+=(linear_low_precision compiled_heads natural_gradient search_heads)
    other_tests+=(categorical categorical_kernels scan scan_kernels surrogates)
else
    sets=(check) large=(gae/forward/float32/B=8,T=200)
    row_tests=(layers) other_tests=(doctor)
fi
export -f tests sanitize
export PYTHON DEVICE
stage doctor 30 "$PYTHON" -m rlcore doctor
stage row-tests 60 bash -c 'tests "$@"' - "${row_tests[@]}"
stage other-tests 60 bash -c 'tests "$@"' - "${other_tests[@]}"
stage large 60 "$PYTHON" -m rlcore bench "${large[@]}" --device "$DEVICE" --no-memory \
    --contestants rlcore-triton rlcore-torch --output "$RESULTS/.$name.large.json"
stage sanitizer 30 bash -c sanitize
[[ $DEVICE == cpu ]] || stage designs 120 "$PYTHON" benchmarks/head_design_times.py \
    "$RESULTS/$name-designs.json"
# it stops by itself and leaves what it has; 40 s are for the case in flight
finish_bench() {
    bench "${sets[@]}" --output "$json" --resume --limit-seconds $(($(left) - 40)) || status=1
    "$PYTHON" -c "
import sys
from rlcore.bench.results.results import load
sys.exit(not load(sys.argv[1]).finished)" "$json" || return
    echo bench >>"$progress"
    "$PYTHON" -m rlcore bench report "$json" || echo "no report: matplotlib is missing"
}
if ! grep -qx bench "$progress" && ! finish_bench; then
    echo "== bench: cases are left; call again"
    exit 75
fi
shape=forward+backward/bfloat16/N=8192,V=151936,B=8,T=1024
[[ $DEVICE == cpu ]] || stage compiled 150 "$PYTHON" -m rlcore bench --compile \
    --cases policy_loss/$shape token_logprob/$shape cross_entropy/$shape \
    --output "$RESULTS/$name-compiled.json"
[[ $status == 0 ]] && echo "all stages are done: remove $progress to begin again"
exit "$status"
