#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Several "hosts" on one Linux machine, for tests of jobs that span hosts. Needs root, iproute2 and util-linux. Each
# host has a network (eth0, 10.77.0.N), a name, /dev/shm, /tmp, /etc/hosts and System V IPC of its own.
#
#     hosts.sh up N [bridge|wire]     hosts h1..hN, and x, a stranger on the same network (10.77.0.99)
#                                     bridge: the kernel's; wire: wire.c, which delays, drops and limits the rate
#     hosts.sh in HOST COMMAND...     runs a command there, with this environment
#     hosts.sh login HOST WORDS...    as ssh would: a fresh environment, WORDS joined for sh (a launch agent for mpirun)
#     hosts.sh sshd                   a plain sshd on each host (package openssh-server, or SSHD=path)
#     hosts.sh cable HOST out|in      pulls the cable: the switch's end goes down, the host's loses its carrier
#     hosts.sh drop HOST on|off       loses every frame from and to a host, in silence
#     hosts.sh shape DELAY_US LOSS_PERCENT MBIT     of every link, one way from host to host (wire only; 0 0 0 for none)
#     hosts.sh pids HOST              what runs there
#     hosts.sh crash HOST             power off: first the silence, then kill -9 of all that runs there
#     hosts.sh down                   ends what runs on the hosts, and the hosts
#
# HOSTS_PREFIX                      of the names of the network namespaces: another one for each set of hosts
# HOSTS_RUN                         a folder for the state of this set; the hosts see it
# HOSTS_SHARE=folder:folder         folders below /tmp that the hosts see too, as over NFS; all others they see anyway
# HOSTS_OWNER=pid                   when this process is gone, however it ended, the hosts go down
# ETC_HOSTS=names|bare|debian       /etc/hosts: knows all (default) | only localhost | own name is 127.0.1.1 besides
# DOCKER0=1                         each host has a second interface with the same 172.17.0.1/16
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PRE=${HOSTS_PREFIX:?}
RUN=${HOSTS_RUN:?}
NET=10.77.0
SW=$PRE-sw

address() { case $1 in x) echo $NET.99 ;; h*) echo "$NET.${1#h}" ;; *) echo "$1" ;; esac; }

enter() {
    local h=$1
    shift
    exec nsenter -t "$(<"$RUN/$h.pid")" -n -u -m -i --wdns="$PWD" -- "$@"
}

write_hosts() { # write_hosts HOST N
    local known
    echo "127.0.0.1 localhost"
    case ${ETC_HOSTS:-names} in
        names) for known in $(seq -f h%g 1 "$2") x; do echo "$(address "$known") $known"; done ;;
        debian)
            echo "127.0.1.1 $1"
            for known in $(seq -f h%g 1 "$2"); do [ "$known" = "$1" ] || echo "$(address "$known") $known"; done
            ;;
        bare) ;;
    esac
}

make_host() { # make_host HOST N
    local h=$1
    write_hosts "$h" "$2" >"$RUN/$h.hosts"
    mkdir "$RUN/$h.tmp"
    # shellcheck disable=SC2016 # the inner shell expands them
    RUN=$RUN HOST=$h SHARE=${HOSTS_SHARE:-} setsid unshare --net --uts --ipc --mount -- bash -ec '
        hostname "$HOST"
        mount -t tmpfs -o size=64m tmpfs /dev/shm
        mount -t tmpfs tmpfs "$RUN/$HOST.tmp"
        IFS=:
        for folder in $SHARE "$RUN"; do case $folder in /tmp/*)
            mkdir -p "$RUN/$HOST.tmp/${folder#/tmp/}"
            mount --bind "$folder" "$RUN/$HOST.tmp/${folder#/tmp/}"
        esac; done
        mount --bind "$RUN/$HOST.hosts" /etc/hosts
        mount --bind "$RUN/resolv.conf" /etc/resolv.conf
        mount --move "$RUN/$HOST.tmp" /tmp
        ip link set lo up
        touch "$RUN/$HOST.ready"
        exec sleep infinity' </dev/null >"$RUN/$h.log" 2>&1 &
    echo $! >"$RUN/$h.pid"
}

await() { # await HOST
    for _ in $(seq 200); do [ -e "$RUN/$1.ready" ] && break; sleep 0.02; done
    [ -e "$RUN/$1.ready" ] || { cat "$RUN/$1.log" >&2; exit 1; }
    ip netns attach "$PRE-$1" "$(<"$RUN/$1.pid")"
}

up() {
    local n=$1 kind=${2:-bridge} h all=()
    [ ! -e "$RUN/kind" ] || { echo "These hosts are up already: hosts.sh down" >&2; exit 1; }
    mkdir -p "$RUN"
    echo "$kind" >"$RUN/kind"
    for h in $(seq -f h%g 1 "$n") x; do all+=("$h"); done
    echo "${all[*]}" >"$RUN/all"
    echo "nameserver 127.0.0.1" >"$RUN/resolv.conf" # nobody listens there: an unknown name is refused at once
    if [ -n "${HOSTS_OWNER:-}" ]; then
        setsid bash -c "tail --pid=$HOSTS_OWNER -f /dev/null; exec '$HERE/hosts.sh' down" </dev/null >/dev/null 2>&1 &
        echo $! >"$RUN/keeper.pid"
    fi
    for h in "${all[@]}"; do make_host "$h" "$n"; done
    for h in "${all[@]}"; do await "$h"; done
    ip netns add "$SW"
    if [ "$kind" = bridge ]; then
        ip -n "$SW" link add br0 type bridge
        ip -n "$SW" link set br0 up
        for h in "${all[@]}"; do
            ip -n "$SW" link add "$h" type veth peer name eth0 netns "$PRE-$h"
            ip -n "$SW" link set "$h" master br0 up
        done
    else
        gcc -O2 -o "$RUN/wire" "$HERE/wire.c"
        setsid ip netns exec "$SW" "$RUN/wire" "$RUN/wire.ctl" "${all[@]}" </dev/null >"$RUN/wire.log" 2>&1 &
        echo $! >"$RUN/wire.pid"
        for _ in $(seq 200); do [ -p "$RUN/wire.ctl" ] && break; sleep 0.02; done
        for h in "${all[@]}"; do ip -n "$SW" link set "$h" netns "$PRE-$h" name eth0; done
    fi
    for h in "${all[@]}"; do
        ip -n "$PRE-$h" address add "$(address "$h")/24" dev eth0
        ip -n "$PRE-$h" link set eth0 up
        if [ -n "${DOCKER0:-}" ]; then
            ip -n "$PRE-$h" link add docker0 type bridge
            ip -n "$PRE-$h" address add 172.17.0.1/16 dev docker0
            ip -n "$PRE-$h" link set docker0 up
        fi
    done
}

note_cut() { # note_cut HOST on|off: whether the others hear of what happens there
    if [ "$2" = on ]; then touch "$RUN/$1.cut"; else rm -f "$RUN/$1.cut"; fi
}

cable() {
    note_cut "$1" "$([ "$2" = out ] && echo on || echo off)"
    if [ "$(<"$RUN/kind")" = bridge ]; then
        ip -n "$SW" link set "$1" "$([ "$2" = out ] && echo down || echo up)"
    else
        ip -n "$PRE-$1" link set eth0 carrier "$([ "$2" = out ] && echo off || echo on)"
    fi
}

drop() {
    note_cut "$1" "$2"
    if [ "$(<"$RUN/kind")" = wire ]; then
        echo "drop $1 $([ "$2" = on ] && echo 1 || echo 0)" >"$RUN/wire.ctl"
    elif [ "$2" = on ]; then # a port of no bridge: it forwards nothing, and the host notices nothing
        ip -n "$SW" link set "$1" nomaster
    else
        ip -n "$SW" link set "$1" master br0
    fi
}

# Without sshd and its sessions: one whose peer has fallen silent stays until sshd's own ClientAliveInterval ends it.
pids() {
    local pid
    for pid in $(ip netns pids "$PRE-$1"); do
        [ "$pid" = "$(<"$RUN/$1.pid")" ] || [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = sshd ] || echo "$pid"
    done
}

down() {
    local h
    [ -e "$RUN/all" ] || exit 0
    for h in $(<"$RUN/all"); do
        for _ in 1 2 3; do ip netns pids "$PRE-$h" 2>/dev/null | xargs -r kill -9 2>/dev/null || true; done
        kill -9 "$(<"$RUN/$h.pid")" 2>/dev/null || true
        ip netns del "$PRE-$h" 2>/dev/null || true
    done
    [ ! -e "$RUN/wire.pid" ] || kill -9 "$(<"$RUN/wire.pid")" 2>/dev/null || true
    ip netns del "$SW" 2>/dev/null || true
    local keeper=""
    [ ! -e "$RUN/keeper.pid" ] || keeper=$(<"$RUN/keeper.pid")
    rm -rf "$RUN"
    [ -z "$keeper" ] || kill -- "-$keeper" 2>/dev/null || true # it may be the one that runs this
}

start_sshd() { # the package's user and folder are made here too: nothing of the machine's own is changed
    local h sshd=${SSHD:-/usr/sbin/sshd} options="-f /dev/null -h $RUN/key -o StrictModes=no -o UsePAM=no"
    options+=" -o AuthorizedKeysFile=$RUN/key.pub -o PasswordAuthentication=no"
    [ -e "$RUN/key" ] || ssh-keygen -q -t ed25519 -N '' -f "$RUN/key"
    cp /etc/passwd "$RUN/passwd"
    getent passwd sshd >/dev/null || echo "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin" >>"$RUN/passwd"
    for h in $(<"$RUN/all"); do
        (enter "$h" bash -c "mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd &&
            mount --bind $RUN/passwd /etc/passwd &&
            exec $sshd $options -o PidFile=none -o ListenAddress=$(address "$h")")
    done
    echo "-i $RUN/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR" >"$RUN/ssh_args"
}

login() { # login HOST WORDS...: HOST may be an address
    local h=$1 known status
    shift
    for known in $(<"$RUN/all"); do [ "$h" != "$(address "$known")" ] || h=$known; done
    [ -e "$RUN/$h.pid" ] || { echo "ssh: Could not resolve hostname $h" >&2; exit 255; }
    local path=${LOGIN_PATH:-/usr/local/bin:/usr/bin:/bin}
    (enter "$h" env -i HOME="$HOME" USER=root SHELL=/bin/sh PATH="$path" sh -c "cd; $*") && status=0 || status=$?
    [ ! -e "$RUN/$h.cut" ] && [ ! -e "$RUN/$(hostname).cut" ] || exec sleep infinity # ssh hears nothing of the end
    exit "$status"
}

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
    up | down | cable | drop | pids | login) "$command" "$@" ;;
    sshd) start_sshd ;;
    in) enter "$@" ;;
    shape) echo "shape $*" >"$RUN/wire.ctl" ;;
    crash)
        drop "$1" on
        pids "$1" | xargs -r kill -9
        ;;
    *) sed -n '3,25s/^# \{0,1\}//p' "$HERE/hosts.sh" && exit 2 ;;
esac
