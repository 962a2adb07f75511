#!/usr/bin/env bash
# A real Slurm of several nodes on this machine, without systemd, with GPUs that are only counted:
#   cluster.sh start FOLDER [NODES] [PORT], then export SLURM_CONF=FOLDER/slurm.conf; cluster.sh stop FOLDER
# Needs root and Debian's slurmctld, slurmd, slurm-client, munge. Touches nothing outside FOLDER.
set -euo pipefail
what=$1 base=$2 nodes=${3:-3} port=${4:-26817}
export SLURM_CONF=$base/slurm.conf

stop() {
  local -a pids
  timeout 10 scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
  for _ in $(seq 100); do
    [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || break
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    sleep 0.2
  done
  mapfile -t pids < <(cat "$base"/run/*.pid 2>/dev/null)
  for _ in $(seq 50); do
    kill "${pids[@]}" 2>/dev/null || return 0
    sleep 0.2
  done
}

configure() {
  local host node
  host=$(hostname -s)
  cat <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$base/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool-%n
SlurmctldPidFile=$base/run/slurmctld.pid
SlurmdPidFile=$base/run/slurmd-%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=15
KillWait=5
JobRequeue=1
GresTypes=gpu
END
  for ((node = 0; node < nodes; node++)); do
    echo "NodeName=node$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 100 + node)) CPUs=64" \
      "SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=200000 Gres=gpu:h100:8"
  done
  echo "PartitionName=test Nodes=node[0-$((nodes - 1))] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO"
}

start() {
  local node up=0
  mkdir -p "$base"/{log,run,state}
  head -c 1024 /dev/urandom >"$base/munge.key"
  chmod 600 "$base/munge.key"
  munged --force --key-file="$base/munge.key" --socket="$base/run/munge.socket" \
    --pid-file="$base/run/munged.pid" --log-file="$base/log/munged.log" --seed-file="$base/run/munge.seed"
  configure >"$SLURM_CONF"
  for node in {0..7}; do [ -e "$base/gpu$node" ] || mknod "$base/gpu$node" c 1 3; done # /dev/null's twins
  printf 'AutoDetect=off\nNodeName=node[0-%d] Name=gpu Type=h100 File=%s/gpu[0-7]\n' $((nodes - 1)) "$base" \
    >"$base/gres.conf"
  printf 'CgroupAutomount=no\nConstrainCores=no\n' >"$base/cgroup.conf"
  slurmctld -c -f "$SLURM_CONF"
  for ((node = 0; node < nodes; node++)); do
    mkdir -p "$base/spool-node$node"
    slurmd -f "$SLURM_CONF" -N "node$node"
  done
  for _ in $(seq 300); do
    up=$(sinfo --noheader --Node --format='%N %t' 2>/dev/null | grep -c ' idle$' || true)
    [ "$up" != "$nodes" ] || return 0
    sleep 0.2
  done
  tail -n 5 "$base"/log/*.log >&2
  echo "error: $up of $nodes nodes are up" >&2
  return 1
}

"$what"
