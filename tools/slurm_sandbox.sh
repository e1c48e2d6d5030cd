#!/bin/bash
# A SLURM cluster of several nodes on this one host, for tests and for trying scripts on a laptop.
#
#   slurm_sandbox.sh up STATE_DIR [NODES=2] [CPUS_PER_NODE=4] [BASE_PORT=17000]
#   slurm_sandbox.sh node STATE_DIR NAME        (starts the slurmd of one node again)
#   slurm_sandbox.sh down STATE_DIR
#
# After `up`, `source STATE_DIR/env.sh` makes sbatch, srun and squeue mean this cluster.
# It wants Debian's slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins and munge; no systemd, root or not (as an
# ordinary user every daemon runs as that user, and only that user can submit). Everything (config, key, sockets, logs,
# spool, pids) lives under STATE_DIR; /etc and /run are untouched. No CPU or memory limit is enforced.
# All nodes have NodeAddr 127.0.0.1 and a port each. Environment variables of `up`:
#   UTS=1        (root only) inside a job `hostname` says n1, n2, ... and those names resolve: a private UTS and mount
#                namespace for each node, in which the host's /etc/hosts is covered, not changed
#   GPUS=K       nodes declare K make-believe GPUs, so that --gpus-per-node=K is accepted
#   GPU_FILES    their device files, counted from 0 (/dev/tty, say: then CUDA_VISIBLE_DEVICES is set as on a real node)
#   ANY_ADDR=1   do not bind to loopback alone (so anyway where `hostname` does not resolve to 127.0.0.1)
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
usage() {
    sed -n 's/^#   slurm_sandbox/  slurm_sandbox/p' "$0" >&2
    exit 2
}

up() { # STATE_DIR NODES CPUS PORT
    [ ! -e "$1/pids" ] || { echo "already up? ($1/pids exists; run: slurm_sandbox.sh down $1)" >&2; exit 1; }
    local nodes=${2:-2}
    mkdir -p "$1"/{munge,ctld,log,pid}
    state=$(realpath "$1")
    chmod 0755 "$state" "$state/munge"
    [ -e "$state/munge/key" ] || (umask 077; head -c 128 /dev/urandom >"$state/munge/key")
    write_config "$nodes" "${3:-4}" "${4:-17000}"
    printf 'export SLURM_CONF=%s\n' "$state/slurm.conf" >"$state/env.sh"
    printf '%s\n' "${UTS:-}" >"$state/uts"
    : >"$state/pids"
    # --force: munged otherwise refuses a socket below a 0700 directory (mktemp -d, pytest's tmp_path)
    start munged munged --foreground --force --key-file="$state/munge/key" --socket="$state/munge/sock" \
        --pid-file="$state/munge/pid" --seed-file="$state/munge/seed" --num-threads=2
    wait_until 50 munge -n -S "$state/munge/sock" || { cat "$state/log/munged.out" >&2; exit 1; }
    export SLURM_CONF=$state/slurm.conf
    start slurmctld slurmctld -D -f "$state/slurm.conf"
    for i in $(seq "$nodes"); do start_node "n$i"; done
    wait_until 150 all_up "$nodes" || { echo "nodes did not come up; see $state/log" >&2; sinfo >&2 || true; exit 1; }
    sinfo
}

write_config() { # NODES CPUS PORT
    local host memory plugins addresses=NoCtldInAddrAny
    host=$(hostname -s)
    memory=${SLURM_NODE_MEM:-$(awk -v n="$1" '/MemTotal/{print int($2/1024/n)}' /proc/meminfo)}
    plugins=$(ls -d /usr/lib/*/slurm-wlm | head -1)
    # NoInAddrAny binds slurmd and srun to the address of their own hostname: right only where that is NodeAddr
    if [ -z "${ANY_ADDR:-}" ] && [ "$(getent ahostsv4 "$(hostname)" | awk 'NR==1{print $1}')" = 127.0.0.1 ]; then
        addresses+=,NoInAddrAny
    else
        echo "note: $(hostname) is not 127.0.0.1 here; slurmd and srun listen on 0.0.0.0 (munge-authenticated)" >&2
    fi
    cat >"$state/slurm.conf" <<CONF
ClusterName=loop
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$3
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# a requeued job starts when its credential has expired: 5 s is the least that is accepted, 120 the default
AuthInfo=socket=$state/munge/sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=$addresses
PluginDir=$plugins
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool-%n
SlurmctldPidFile=$state/pid/slurmctld.pid
SlurmdPidFile=$state/pid/slurmd-%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
# nothing that needs cgroups, a database or a mail program
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$state/log/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
PropagateResourceLimits=NONE
# scheduling: quick, CPUs as consumable, declared (not probed) hardware
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0,nohold_on_prolog_fail
SlurmdParameters=config_overrides
ReturnToService=2
# short timers so that tests of failure do not wait minutes
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=3
InactiveLimit=0
MinJobAge=300
OverTimeLimit=0
EnforcePartLimits=ALL
WaitTime=0
CompleteWait=0
JobRequeue=1
CONF
    for i in $(seq "$1"); do
        printf 'NodeName=n%d NodeHostname=%s NodeAddr=127.0.0.1 Port=%d CPUs=%d RealMemory=%d %sState=UNKNOWN\n' \
            "$i" "$host" $(($3 + i)) "$2" "$memory" "${GPUS:+Gres=gpu:$GPUS }"
        echo "127.0.0.1 n$i" >&3
    done >>"$state/slurm.conf" 3>"$state/names"
    cat /etc/hosts "$state/names" >"$state/hosts"
    if [ -n "${GPUS:-}" ]; then
        mkdir -p "$state/dev"
        for i in $(seq 0 $((GPUS - 1))); do : >"$state/dev/gpu$i"; done
        echo "Name=gpu File=${GPU_FILES:-$state/dev/gpu}[0-$((GPUS - 1))]" >"$state/gres.conf"
        echo "GresTypes=gpu" >>"$state/slurm.conf"
    fi
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO" >>"$state/slurm.conf"
}

start() { # NAME COMMAND... : in its own session, in the foreground, its pid recorded
    local name=$1
    shift
    setsid "$@" >>"$state/log/$name.out" 2>&1 </dev/null &
    echo "$! $name" >>"$state/pids"
}

start_node() { # NAME
    mkdir -p "$state/spool-$1"
    if [ "$(cat "$state/uts")" = 1 ]; then
        start "slurmd-$1" unshare --uts --mount --propagation private sh -c \
            "hostname $1; mount --bind $state/hosts /etc/hosts; exec slurmd -D -N $1 -f $state/slurm.conf"
    else
        start "slurmd-$1" slurmd -D -N "$1" -f "$state/slurm.conf"
    fi
}

node() { # STATE_DIR NAME
    [ $# = 2 ] && [ -e "$1/pids" ] || usage
    state=$(realpath "$1")
    export SLURM_CONF=$state/slurm.conf
    start_node "$2"
}

wait_until() { # TENTHS COMMAND... : until it succeeds, at most so many times and 0.2 s
    local tries=$1
    shift
    for _ in $(seq "$tries"); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.2
    done
    return 1
}

all_up() { [ "$(timeout 5 sinfo -h -N -t idle,mixed,alloc -o %N | sort -u | wc -l)" = "$1" ]; }
queue_empty() { [ -z "$(timeout 5 squeue -h)" ]; }
all_gone() { while read -r pid _; do mine "$pid" && return 1; done <"$state/pids"; return 0; }
mine() { grep -qzF -- "$state" "/proc/$1/cmdline" 2>/dev/null; } # still the daemon that was started: pids come again

down() { # STATE_DIR
    [ -e "$1/pids" ] || { echo "not up"; exit 0; }
    set +e
    state=$(realpath "$1")
    export SLURM_CONF=$state/slurm.conf
    for job in $(timeout 5 squeue -h -o %A 2>/dev/null | sort -u); do timeout 5 scancel "$job"; done
    wait_until 50 queue_empty
    tac "$state/pids" | while read -r pid _; do mine "$pid" && kill -TERM "$pid"; done
    wait_until 50 all_gone
    while read -r pid name; do mine "$pid" && { echo "KILL $name $pid"; kill -KILL "$pid"; }; done <"$state/pids"
    kill_leftovers
    rm -f "$state/pids"
}

kill_leftovers() { # of jobs of this cluster: known by SLURM_CONF and a job id in their environment
    local file pid
    for file in /proc/[0-9]*/environ; do
        pid=${file#/proc/}
        pid=${pid%/environ}
        grep -qzxF -- "SLURM_CONF=$state/slurm.conf" "$file" 2>/dev/null || continue
        grep -qza '^SLURM_JOB_ID=' "$file" 2>/dev/null && [ "$pid" != $$ ] || continue
        echo "KILL leftover $pid: $(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c1-80)"
        kill -KILL "$pid"
    done
}

case ${1:-} in
up | down | node)
    [ $# -ge 2 ] || usage
    "$@"
    ;;
*) usage ;;
esac
