#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# A Slurm of one machine, for tests: munged, slurmctld and slurmd, as root, without systemd, cgroups or accounting.
# Debian: apt-get install -y slurm-wlm munge
#     tests/slurm/cluster.sh up FOLDER      starts it; FOLDER, which may not exist, holds all that it writes
#     export SLURM_CONF=FOLDER/slurm.conf   is what srun, sbatch and the others need
#     tests/slurm/cluster.sh down FOLDER    ends its jobs and its three daemons; WHILE=PID does so when that process ends
set -euo pipefail
[ $# = 2 ] || { sed -n '5,7s/^# *//p' "$0" >&2; exit 2; }
folder=$(realpath -m "$2")
SLOTS=${SLOTS:-8} # tasks at a time, whatever the number of cores
export SLURM_CONF=$folder/slurm.conf PATH=$PATH:/usr/sbin

port() { # a free one; another process may take it before the daemon does, and then `up` fails
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

write_configuration() {
    mkdir -p "$folder"/{state,spool,log,munge}
    chmod 700 "$folder/munge"
    (umask 077 && dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none)
    local memory
    memory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    cat >"$SLURM_CONF" <<CONF
ClusterName=syncbn
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(port)
SlurmdPort=$(port)
# Its PMIx makes folders in /tmp by the number of a job: one that was left must not be in the way of another cluster.
FirstJobId=$((1000 + RANDOM))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
# CPUs that are not there: a slot is a process of a test, not a core.
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=3
OverTimeLimit=0
ReturnToService=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$SLOTS RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=1:00:00 State=UP
CONF
}

up() {
    write_configuration
    munged --force --key-file "$folder/munge/key" --socket "$folder/munge/socket" --pid-file "$folder/munge/pid" \
        --log-file "$folder/log/munged" --seed-file "$folder/munge/seed" --num-threads 2
    slurmctld -c
    slurmd
    for _ in $(seq 100); do
        if [ "$(sinfo -h -o %T 2>/dev/null)" = idle ]; then
            if [ -n "${WHILE:-}" ]; then # nothing of it may hold the caller's pipes
                (while kill -0 "$WHILE"; do sleep 1; done; down) >/dev/null 2>&1 </dev/null &
            fi
            return
        fi
        sleep 0.1
    done
    echo "the node did not become idle within 10 s:" >&2
    tail -n 20 "$folder"/log/* >&2
    down
    return 1
}

down() {
    scancel --user="$(id -un)" --signal=KILL 2>/dev/null || true
    local file
    for file in "$folder"/{slurmd,slurmctld,munge/}*pid; do
        [ -e "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
}

case $1 in
    up | down) "$1" ;;
    *) echo "cluster.sh needs up or down; received $1." >&2 && exit 2 ;;
esac
