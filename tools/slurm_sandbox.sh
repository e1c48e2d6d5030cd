#!/bin/bash
# A SLURM cluster of several nodes on this one host, for tests and for trying scripts on a laptop.
#
#   slurm_sandbox.sh up STATE_DIR [NODES=2] [CPUS_PER_NODE=4] [BASE_PORT=17000]
#   slurm_sandbox.sh node STATE_DIR NAME        (starts the slurmd of one node again)
#   slurm_sandbox.sh down STATE_DIR
#
# After `up`, `source STATE_DIR/env.sh` points sbatch, srun and squeue to this cluster.
# Exit status: 0 done, 2 your mistake (one line says which), 1 anything else.
#
# It needs Debian's slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins and munge; `up` names what is missing.
# It needs no systemd and no root. As an ordinary user every daemon runs as that user, and only that user can submit.
# Everything (config, key, sockets, logs, spool, pids) is under STATE_DIR; /etc and /run are untouched.
# No CPU or memory limit is enforced.
# All nodes have NodeAddr 127.0.0.1. The controller listens on BASE_PORT, node nK on BASE_PORT + K.
#
# Nodes have names of their own: inside a job `hostname` prints n1, n2, ... and those names resolve. Each node has a
# private UTS and mount namespace, in which the host's /etc/hosts is covered, not changed. Namespaces need root and a
# working `unshare`. Elsewhere `up` says so in one line, and all nodes have the host's name. Outside of jobs the names
# do not resolve.
#
# Environment variables of `up`:
#   UTS=0        no namespaces; UTS=1 fails if they are not possible
#   GPUS=K       nodes declare K make-believe GPUs, so that --gpus-per-node=K is accepted
#   GPU_FILES    their device files, counted from 0 (/dev/tty, say: then CUDA_VISIBLE_DEVICES is set as on a real node)
#   ANY_ADDR=1   do not bind to loopback alone (the default if `hostname` does not resolve to 127.0.0.1)
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
PACKAGES="slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
# NAME HOSTS_FILE COMMAND... follow: the command in a UTS and mount namespace of its own
# shellcheck disable=SC2016 # the inner shell expands it
NAMESPACE=(unshare --uts --mount --propagation private sh -c
    'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"' sh)

usage() {
    sed -n 's/^#   slurm_sandbox/  slurm_sandbox/p' "$0"
}

refuse() { # MESSAGE: the caller's mistake
    echo "slurm_sandbox: $1" >&2
    exit 2
}

up() { # STATE_DIR [NODES] [CPUS] [PORT]
    local nodes=${2:-2} cpus=${3:-4} port=${4:-17000}
    check_arguments "$nodes" "$cpus" "$port"
    check_installed
    state=$(realpath -m "$1")
    [[ $state != *[[:space:]]* && ${#state} -le 96 ]] ||
        refuse "STATE_DIR: $state has a space or more than 96 characters, which SLURM or munge do not take"
    [ ! -e "$state/pids" ] || all_gone || refuse "$1: already up; first run: slurm_sandbox.sh down $1"
    check_ports "$nodes" "$port"
    choose_names
    mkdir -p "$state"/{munge,ctld,log,pid}
    printf '%s\n' "$named" >"$state/uts"
    chmod 0755 "$state" "$state/munge"
    [ -e "$state/munge/key" ] || (umask 077; head -c 128 /dev/urandom >"$state/munge/key")
    write_config "$nodes" "$cpus" "$port"
    printf 'export SLURM_CONF=%s\n' "$state/slurm.conf" >"$state/env.sh"
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

check_arguments() { # NODES CPUS PORT
    [[ $1 =~ ^[1-9][0-9]{0,2}$ ]] || refuse "NODES: '$1' is not a number from 1 to 999"
    [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || refuse "CPUS_PER_NODE: '$2' is not a number from 1 to 9999"
    [[ $3 =~ ^[1-9][0-9]{0,4}$ && $(($3 + $1)) -le 65535 ]] ||
        refuse "BASE_PORT: '$3' is not a port, or BASE_PORT + NODES is above 65535"
}

check_installed() { # sets `plugins`
    local missing=() program folder
    for program in slurmctld slurmd sinfo squeue scancel srun munged munge setsid; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    plugins=
    for folder in /usr/lib/*/slurm-wlm; do
        [ ! -e "$folder/auth_munge.so" ] || plugins=$folder
    done
    [ -n "$plugins" ] || missing+=("/usr/lib/*/slurm-wlm/auth_munge.so")
    [ ${#missing[@]} = 0 ] || refuse "not installed: ${missing[*]}; on Debian or Ubuntu: apt-get install $PACKAGES"
}

check_ports() { # NODES PORT
    local used=() port
    for port in $(seq "$2" $(($2 + $1))); do
        ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || used+=("$port")
    done
    [ ${#used[@]} = 0 ] || refuse "ports in use: ${used[*]}; give another BASE_PORT than $2"
}

choose_names() { # sets `named`: 1 where each node gets a name of its own, else 0
    named=0
    [ "${UTS:-}" != 0 ] || return 0
    local why
    if [ "$(id -u)" != 0 ]; then
        why="names for the nodes need root"
    elif "${NAMESPACE[@]}" n1 /etc/hosts true >/dev/null 2>&1; then
        named=1
        return
    else
        why="names for the nodes need unshare --uts --mount, which is not permitted here"
    fi
    [ "${UTS:-}" != 1 ] || refuse "UTS=1: $why"
    echo "note: $why; all nodes have the name $(hostname), and n1, n2, ... do not resolve" >&2
}

write_config() { # NODES CPUS PORT
    local host memory addresses=NoCtldInAddrAny
    host=$(hostname -s)
    memory=${SLURM_NODE_MEM:-$(awk -v n="$1" '/MemTotal/{print int($2/1024/n)}' /proc/meminfo)}
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
    { cat /etc/hosts; echo; cat "$state/names"; } >"$state/hosts"
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
    local slurmd=(slurmd -D -N "$1" -f "$state/slurm.conf")
    mkdir -p "$state/spool-$1"
    if [ "$(cat "$state/uts")" = 1 ]; then
        start "slurmd-$1" "${NAMESPACE[@]}" "$1" "$state/hosts" "${slurmd[@]}"
    else
        start "slurmd-$1" "${slurmd[@]}"
    fi
}

node() { # STATE_DIR NAME
    [ -e "$1/pids" ] || refuse "$1: not up; first run: slurm_sandbox.sh up $1"
    state=$(realpath "$1")
    grep -q "^NodeName=$2 " "$state/slurm.conf" || refuse "$2: no such node; see $state/slurm.conf"
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

case "${1:-} $#" in
"up "[2-5] | "down 2" | "node 3") "$@" ;;
"-h 1" | "--help 1" | "help 1") usage ;;
*)
    usage >&2
    exit 2
    ;;
esac
