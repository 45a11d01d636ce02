#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# The tests in stages, one line each; what a stage prints is kept in out/tests and shown where it fails.
#     tests/run.sh quick            what make test runs: every claim of the core, once each
#     tests/run.sh rest             what make test-all adds: programs, compilers, MPICH, model libraries, CUDA tensors
#     tests/run.sh beside           those of the rest that only compute; the rest runs them beside the others
#     tests/run.sh mpi-3 torchrun   some stages by name; PYTEST_WORDS="-k masks" goes to each
# BIN is the folder of the commands of the environment, BIN_MPICH of that with MPICH.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
BIN=${BIN:-$(dirname "$(command -v python)")}
BIN_MPICH=${BIN_MPICH:-$PWD/.venv-mpich/bin}
BIN_ZOO=${BIN_ZOO:-$PWD/.venv-zoo/bin}
LOGS=${LOGS:-out/tests}
read -ra more <<<"--color=no ${PYTEST_WORDS:-}"
export PATH="$BIN:$PATH" PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE # every process would compile 165 modules of tests and tools, which takes it 2.4 s
mkdir -p "$LOGS" || exit 1

several=tests/multiprocess
# What depends on the number of ranks: shares, bits, groups, what is counted in messages.
counted=$(echo $several/test_{exactness,same_bits,groups,transports,collectives,call_identity,threads,world,average_gradients,joining,joining_errors}.py)
counted="$counted $several/test_drift.py::test_drift_is_what_one_process_computes_from_all_local_batches"
# On one host the ranks exchange through shared memory; mpi-2, mpich and gloo go through those libraries.
# What another MPI library may do otherwise: besides those, torch.distributed connected under its launcher, errors,
# derivatives of any order, and random programs. Masks, modes, checkpoints and wrappers send by the same transport.
library="$counted $(echo $several/test_{bad_input,ddp,random_programs,second_derivatives}.py)"
# What is computed on a device or moved to it. Not conversion, threads, the names of calls and most of join(), which the
# CPU's stages prove; of join() joining_optimizer stays, of calls random_programs.
device=$(echo $several/test_{average_gradients,bad_input,bad_kinds,checkpointing,collectives,combinations,ddp,deferred_errors,exactness,groups}.py)
device="$device $(echo $several/test_{drift,drift_training,joining_optimizer,masks,modes,random_programs,recalibrate,renorm,same_bits}.py)"
device="$device $(echo $several/test_{second_derivatives,transports,world,wrappers}.py)"
# CUDA tensors over gloo, where a rank with a fault raises alone, and the others later.
gloo=$(echo $several/test_{deferred_errors,exactness,ddp,bad_input,collectives,masks,groups,world,average_gradients,modes}.py)
gloo="$gloo $several/test_combinations.py::test_a_repeated_forward_goes_where_the_first_one_went"
brief="not slow and not program and not faults and not hosts and not slurm"

stages() { # the stages of each set, and those that are named
    for word in "$@"; do
        case $word in
            quick) echo one mpi-3 mpi-2 mpi-4 torchrun ;;
            rest) echo faults compiled compiled-torchrun hosts slurm mpich gloo programs-of-ranks programs ;;
            beside) echo kernels zoo zoo-mpi-3 zoo-mpi-2 fake-gpu fake-gpu-mpi fake-gpu-torchrun ;;
            *) echo "$word" ;;
        esac
    done
}

warm() { # a process that has imported torch: its forks are ranks and programs of all stages, see tests/warm
    [ -n "${SYNCBN_TEST_WARM:-}" ] && return
    coproc python -m tests.warm
    read -r SYNCBN_TEST_WARM <&"${COPROC[0]}" || exit 1
    export SYNCBN_TEST_WARM
}

ranks() { # ranks N LAUNCHER WORDS...: pytest on every rank
    local n=$1 launcher=$2 python=python
    shift 2
    [ "$launcher" = mpirun ] && set -- --with-mpi "$@"
    [ -z "${own:-}" ] && python=$SYNCBN_TEST_WARM/python
    PYTHON=$python PYTHON_EXEC=$python NPROC=$n timeout --foreground -k 10 1800 "launch/$launcher.sh" -m pytest "${more[@]}" "$@"
}

# Ranks that are processes of their own: in another environment.
own_ranks() {
    own=1 ranks "$@"
}

compiling() { # ranks ...: one thread needs no pool of processes
    TORCHINDUCTOR_COMPILE_THREADS=1 ranks "$@"
}

# One after the other where ranks share the cores; side by side, one for each core, where tests are of one process.
# Programs mostly wait for others, so three at a time; hosts too. Of faults the seconds count.
# shellcheck disable=SC2086 # lists of files
stage() {
    case $1 in
        one) timeout --foreground -k 10 900 python -m pytest -n 2 -m "$brief and not builds and not nvrtc" --ignore $several --ignore tests/zoo "${more[@]}" ;;
        mpi-3) ranks 3 mpirun -m "$brief" $several ;;
        mpi-2) SYNCBN_TEST_TRANSPORT=mpi ranks 2 mpirun -m "$brief" $counted ;;
        mpi-4) ranks 4 mpirun -m "$brief" $counted ;;
        torchrun) ranks 2 torchrun -m "$brief" $several ;;
        programs) timeout --foreground -k 10 1500 python -m pytest -n 3 --dist loadgroup --durations 25 -m "program and not builds and not faults and not hosts and not slurm" --ignore $several --ignore tests/zoo "${more[@]}" ;;
        programs-of-ranks) ranks 3 mpirun -m program $several ;;
        kernels) timeout --foreground -k 10 3000 python -m pytest -n 2 --dist loadgroup --durations 15 -m "builds or ((nvrtc or slow) and not program and not faults and not hosts and not slurm)" --ignore $several --ignore tests/zoo "${more[@]}" ;;
        compiled) compiling 2 mpirun -m slow $several ;;
        compiled-torchrun) # what compiled proves of graphs over MPI and gloo is not proved anew under another launcher
            compiling 2 torchrun -m slow "$several/test_compile_order.py::test_every_split_of_a_batch_equals_one_process[inductor-2]" \
                $several/test_call_identity.py
            ;;
        mpich) SYNCBN_TEST_TRANSPORT=mpi PATH="$BIN_MPICH:$PATH" own_ranks 3 mpirun -m "$brief" $library ;;
        gloo) SYNCBN_TEST_TRANSPORT=torch ranks 2 torchrun -m "$brief" $library ;;
        faults) BIN_MPICH=$BIN_MPICH timeout --foreground -k 10 600 python -m pytest -n 0 -m faults tests/waits tests/transports "${more[@]}" ;;
        hosts) timeout --foreground -k 10 600 python -m pytest -n 2 --dist loadfile -m hosts --durations 10 tests/hosts "${more[@]}" ;; # skips most without root
        slurm) timeout --foreground -k 10 300 python -m pytest -n 0 -m slurm tests/slurm "${more[@]}" ;;
        zoo) SYNCBN_TEST_WARM='' PATH="$BIN_ZOO:$PATH" timeout --foreground -k 10 1800 python -m pytest -n 2 "${more[@]}" tests/zoo ;;
        zoo-mpi-3) PATH="$BIN_ZOO:$PATH" own_ranks 3 mpirun tests/zoo/test_exact.py ;;
        zoo-mpi-2) PATH="$BIN_ZOO:$PATH" own_ranks 2 mpirun -k "efficientnet or GCN or 3d" tests/zoo/test_exact.py ;;
        fake-gpu)
            SYNCBN_TEST_DEVICE=fake-cuda timeout --foreground -k 10 1800 python -m pytest -n 2 -m "not program" "${more[@]}" \
                tests/kernels/cuda/test_fake_cuda.py tests/test_layer.py tests/convert tests/calls/test_derivatives.py tests/benchmarks
            ;;
        fake-gpu-mpi) SYNCBN_TEST_DEVICE=fake-cuda ranks 2 mpirun -m "$brief" $device ;;
        fake-gpu-torchrun) SYNCBN_TEST_DEVICE=fake-cuda ranks 2 torchrun -m "$brief" $gloo ;;
        *) echo "tests/run.sh needs quick, rest or names of stages; received $1." >&2 && return 2 ;;
    esac
}

[ $# -gt 0 ] || { sed -n "3,9s/^# \{0,1\}//p" tests/run.sh >&2; exit 2; }
# Ranks that wait leave a quarter of the cores idle; programs, which leave least, come last. The lowest priority takes nothing
# from jobs whose seconds are tested. A session of its own can be ended as a whole, and has a priority of its own (autogroup).
if [ "$*" = rest ]; then
    echo "beside the others, where they leave a core idle: $(stages beside)"
    SYNCBN_TEST_WARM='' setsid nice -n 19 \
        sh -c '{ echo 19 >/proc/self/autogroup; } 2>/dev/null; exec tests/run.sh beside' >"$LOGS/beside.out" 2>&1 &
    beside=$!
    trap 'kill -- -$beside 2>/dev/null' EXIT
fi
trap 'exit 130' INT # once the stage has ended, which hears Ctrl-C too, as timeout is in the foreground
began=$SECONDS tests=0 names=$(stages "$@")
warm
for name in $names; do
    started=$SECONDS
    printf '%-20s' "$name"
    stage "$name" >"$LOGS/$name.log" 2>&1
    status=$?
    said=$(grep -aoE '([0-9]+ (passed|failed|skipped|errors?|deselected|warnings?)(, )?)+' "$LOGS/$name.log" | tail -n 1)
    passed=$(grep -oE '[0-9]+ passed' <<<"$said" | grep -oE '[0-9]+')
    if [ $status -ne 0 ] || [ -z "$passed" ]; then
        printf 'FAILED with status %s after %4d s: %s\n\n' "$status" $((SECONDS - started)) "$said"
        tail -n 150 "$LOGS/$name.log"
        echo "tests/run.sh: $name failed; all that it printed is in $LOGS/$name.log"
        exit 1
    fi
    tests=$((tests + passed))
    printf '%5d s   %s\n' $((SECONDS - started)) "${said%, }"
done
if [ -n "${beside:-}" ]; then
    wait "$beside"
    status=$?
    cat "$LOGS/beside.out"
    [ $status -eq 0 ] || exit 1
    tests=$((tests + $(tail -n 1 "$LOGS/beside.out" | grep -oE '^[0-9]+')))
    names="$names $(stages beside)"
fi
echo "$tests tests passed in $((SECONDS - began)) s: ${names//$'\n'/ }"
