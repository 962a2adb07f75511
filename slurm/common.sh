# What the job scripts share: settings, pre-flight, the start of all ranks, requeueing. Source it; run nothing.
# shellcheck shell=bash
#
# Settings, from the environment:
#   HPT_ROOT       the repository; default: the folder that sbatch was called in
#   HPT_PYTHON     the interpreter; default: $HPT_ROOT/.venv/bin/python
#   CONTAINER      an image for enroot/pyxis (srun --container-image); default: none
#   APPTAINER      an image for apptainer; default: none
#   MOUNTS         further folders a container sees, with commas
#   MIN_DISK_GIB   free space that every node must have in the run's folder (50)
#   ROLLOUT_NODES  the job's last nodes, so many, run `hpt serve`, the others train (0: engines and training share
#                  all; hpt_moe.sh: 4)
#   ROLLOUT_HOSTS  the addresses of those nodes, with commas; default: their names
#   PREFLIGHT      0 leaves the checks of the nodes out (1)
#   SRUN_OPTIONS   further options of every srun
# Options of every script: --help; --dry-run prints what would be launched; everything else goes to hpt.

set -euo pipefail

HPT_ROOT=${HPT_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
HPT_PYTHON=${HPT_PYTHON:-$HPT_ROOT/.venv/bin/python}
# A script whose --nodes count nodes that serve says how many in OWN_ROLLOUT_NODES.
ROLLOUT_NODES=${ROLLOUT_NODES:-${OWN_ROLLOUT_NODES:-0}}
DRY_RUN=
ARGUMENTS=()

# Take --dry-run and --help out of the arguments; the rest is in ARGUMENTS.
parse_arguments() {
  local argument
  for argument in "$@"; do
    case $argument in
      --dry-run) DRY_RUN=1 ;;
      -h | --help)
        sed -n '2,${/^#SBATCH/q; s/^# //p}' "$0"
        exit
        ;;
      *) ARGUMENTS+=("$argument") ;;
    esac
  done
  [[ $ROLLOUT_NODES =~ ^(0|[1-9][0-9]*)$ ]] ||
    refuse "ROLLOUT_NODES is '$ROLLOUT_NODES', expected how many of the job's nodes serve rollouts: 0 or above"
}

# End with one line that says why.
refuse() {
  echo "error: $*" >&2
  exit 2
}

# Print a command as it could be typed.
show() {
  printf '%q ' "$@"
  echo
}

# Put together srun with the container's options, and the command after "--", in LAUNCH.
prepare() {
  LAUNCH=(srun --kill-on-bad-exit=1)
  local -a extra=()
  [ -z "${SRUN_OPTIONS:-}" ] || read -ra extra <<<"$SRUN_OPTIONS"
  LAUNCH+=("${extra[@]}")
  if [ -n "${CONTAINER:-}" ]; then
    LAUNCH+=("--container-image=$CONTAINER" "--container-workdir=$HPT_ROOT"
      "--container-mounts=$HPT_ROOT:$HPT_ROOT${MOUNTS:+,$MOUNTS}")
  fi
  while [ "$1" != -- ]; do
    LAUNCH+=("$1")
    shift
  done
  shift
  if [ -n "${APPTAINER:-}" ]; then
    LAUNCH+=(apptainer exec --nv --bind "$HPT_ROOT${MOUNTS:+,$MOUNTS}" "$APPTAINER")
  fi
  LAUNCH+=("$@")
}

# Run it, or print it.
on_nodes() {
  prepare "$@"
  if [ -n "$DRY_RUN" ]; then show "${LAUNCH[@]}"; else "${LAUNCH[@]}"; fi
}

# hpt_mega.slurm in this script's own place, or in the container on one node.
ask() {
  LAUNCH=("$HPT_PYTHON" -m hpt_mega.slurm "$@")
  [ -z "${CONTAINER:-}${APPTAINER:-}" ] || [ -n "$DRY_RUN" ] || prepare --nodes=1 --ntasks=1 -- "${LAUNCH[@]}"
  "${LAUNCH[@]}"
}

# The same outside a job, before anything is submitted; not where only a container has hpt.
check() {
  [ -z "${SLURM_JOB_ID:-}" ] || return 0
  if [ -z "$DRY_RUN" ]; then
    [ -z "${CONTAINER:-}${APPTAINER:-}" ] && command -v "$HPT_PYTHON" >/dev/null || return 0
  fi
  ask "$@"
}

# errexit is off where a caller asks how this ended, hence the returns.
# Every node says what it is; one process compares and names what is missing or unequal. Then NCCL is timed.
preflight() {
  local run_dir=$1 folder=$1/preflight
  [ "${PREFLIGHT:-1}" != 0 ] || return 0
  [ -n "$DRY_RUN" ] || { rm -rf "$folder" && mkdir -p "$folder"; }
  on_nodes --ntasks-per-node=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    -- "$HPT_PYTHON" -m hpt_mega.slurm node "$folder" "$run_dir" || return
  if [ -n "$DRY_RUN" ]; then
    show "$HPT_PYTHON" -m hpt_mega.slurm compare "$folder"
  else
    ask compare "$folder" --nodes "$SLURM_JOB_NUM_NODES" --disk "${MIN_DISK_GIB:-50}" || return
  fi
  if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    on_nodes --ntasks="$SLURM_NTASKS" -- "$HPT_PYTHON" -m hpt_mega.slurm allreduce
  fi
}

# hpt train with these overrides, one task a rank; saves, requeues and resumes when the time limit nears.
run_training() {
  local argument run_dir port code=0 STOP=
  for argument in "$@"; do
    [[ $argument != -* ]] || refuse "unknown option $argument; expected --dry-run, --help or KEY=VALUE"
  done
  trap 'STOP=1' USR1 # until there are ranks to pass it on to
  stand_in
  split_nodes "$@"
  run_dir=$(check run-dir --tasks "$TRAINING_TASKS" "$@")
  enter_job
  run_dir=${run_dir:-$(ask run-dir --tasks "$TRAINING_TASKS" "$@")}
  port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
  MASTER_ADDR=${MASTER_ADDR:-$(job_nodes | sed -n 1p)}
  # tensor parallelism's communication overlaps with products only where a GPU has one queue
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  export MASTER_ADDR MASTER_PORT=$port OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
  [ -n "$DRY_RUN" ] || { mkdir -p "$run_dir/logs" && rm -f "$run_dir"/logs/{failure_rank*.json,stopped}; }
  preflight "$run_dir" || { echo "error: pre-flight failed; nothing was trained" >&2 && return 3; }
  serve_rollouts "$run_dir" "$@"

  local command=("$HPT_PYTHON" -m hpt_mega.slurm rank "$@" "${SERVED[@]}" resume=auto)
  local options=("${TRAINING[@]}" --output="$run_dir/logs/rank%t.log" --open-mode=append)
  if [ -n "$DRY_RUN" ]; then
    on_nodes "${options[@]}" -- "${command[@]}"
    return
  fi
  if [ -n "$STOP" ]; then
    echo "asked to stop before training began"
    touch "$run_dir/logs/stopped"
  else
    prepare "${options[@]}" -- "${command[@]}"
    "${LAUNCH[@]}" 2>"$run_dir/logs/srun.log" &
    local child=$!
    # srun passes the signal on to every rank
    trap 'echo "asked to stop: saving at the end of the step"; kill -USR1 "$child" 2>/dev/null || true' USR1
    wait_for "$child" || code=$?
  fi
  trap '' USR1 # nothing is left to save
  end_servers
  finish "$run_dir" "$code"
}

# In a job: go to the repository. Outside: stand-ins for Slurm's variables, as this script's options give them.
stand_in() {
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    cd "$HPT_ROOT"
    return
  fi
  # nodes that serve are asked for beside those that train
  SLURM_JOB_NUM_NODES=$(($(sbatch_value nodes 1) + ROLLOUT_NODES - ${OWN_ROLLOUT_NODES:-0}))
  SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * $(sbatch_value ntasks-per-node 1)))
  SLURM_GPUS_ON_NODE=$(sbatch_value gpus-per-node "")
}

# Outside a job: submit this script and end as sbatch did, or with --dry-run say so and go on.
enter_job() {
  [ -z "${SLURM_JOB_ID:-}" ] || return 0
  local -a more=()
  if [ "$ROLLOUT_NODES" != "${OWN_ROLLOUT_NODES:-0}" ]; then more=(--nodes="$SLURM_JOB_NUM_NODES"); fi
  local submit=(sbatch "${more[@]}" "$0" "${ARGUMENTS[@]}")
  if [ -n "$DRY_RUN" ]; then
    show "${submit[@]}"
    return
  fi
  "${submit[@]}"
  exit
}

# The value of an #SBATCH option of this script.
sbatch_value() {
  local found
  found=$(sed -n "s/^#SBATCH --$1=//p" "$0" | head -n 1)
  echo "${found:-$2}"
}

# The job's nodes, one a line.
job_nodes() {
  if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    scontrol show hostnames "$SLURM_JOB_NODELIST"
  else
    printf 'NODE%d\n' $(seq 0 $((${SLURM_JOB_NUM_NODES:-1} - 1)))
  fi
}

# Leaves srun's options of the trainer's nodes in TRAINING, of those that serve in SERVING, and in SERVED the
# overrides by which the trainer finds the servers; the last two are empty where ROLLOUT_NODES is 0. How many
# tasks train is in TRAINING_TASKS.
split_nodes() {
  local -a nodes hosts urls
  local listed training port=$((10000 + ${SLURM_JOB_ID:-0} % 10000)) count=$ROLLOUT_NODES
  TRAINING_TASKS=${SLURM_NTASKS:-1}
  TRAINING=(--ntasks="$TRAINING_TASKS") SERVING=() SERVED=()
  [ "$count" != 0 ] || return 0
  listed=$(job_nodes)
  mapfile -t nodes <<<"$listed"
  training=$((${#nodes[@]} - count))
  [ "$training" -ge 1 ] ||
    refuse "ROLLOUT_NODES is $count and the job has ${#nodes[@]} nodes; none is left to train"
  local names=("${nodes[@]:training}") tasks=$((SLURM_NTASKS / ${#nodes[@]}))
  TRAINING_TASKS=$((training * tasks))
  TRAINING=(--nodes="$training" --nodelist="$(joined "${nodes[@]:0:training}")"
    --ntasks="$TRAINING_TASKS" --ntasks-per-node="$tasks")
  SERVING=(--nodes="$count" --nodelist="$(joined "${names[@]}")" --ntasks="$count" --ntasks-per-node=1)
  IFS=, read -ra hosts <<<"${ROLLOUT_HOSTS:-$(joined "${names[@]}")}"
  mapfile -t urls < <(printf "http://%s:$port\n" "${hosts[@]}")
  [[ " $* " == *" rollout="* ]] || SERVED+=(rollout=vllm)
  [[ " $* " == *" rollout.server.gpu_memory_share="* ]] || SERVED+=(rollout.server.gpu_memory_share=0.9)
  SERVED+=("rollout.server.urls=[$(joined "${urls[@]}")]")
  SERVER=(--host 0.0.0.0 --port "$port")
}

# Words with commas between them.
joined() {
  local IFS=,
  echo "$*"
}

# Start a server on each node of SERVING, with a key that only this job knows; its srun is in SERVERS.
serve_rollouts() {
  local run_dir=$1
  shift
  SERVERS=
  [ "${#SERVING[@]}" != 0 ] || return 0
  local command=("$HPT_PYTHON" -m hpt_mega.cli serve "$@" "${SERVED[@]}" "${SERVER[@]}")
  local options=("${SERVING[@]}" --output="$run_dir/logs/serve%t.log" --open-mode=append)
  HPT_ROLLOUT_KEY=$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')
  export HPT_ROLLOUT_KEY
  if [ -n "$DRY_RUN" ]; then
    on_nodes "${options[@]}" -- "${command[@]}"
    return
  fi
  prepare "${options[@]}" -- "${command[@]}"
  "${LAUNCH[@]}" 2>"$run_dir/logs/serve-srun.log" &
  SERVERS=$!
}

# The servers run until they are ended; what is left of them after 30 s ends with the job.
end_servers() {
  [ -n "$SERVERS" ] || return 0
  local seconds
  kill "$SERVERS" 2>/dev/null || true
  for ((seconds = 0; seconds < 30; seconds++)); do
    kill -0 "$SERVERS" 2>/dev/null || break
    sleep 1
  done
  kill -KILL "$SERVERS" 2>/dev/null || true
  wait_for "$SERVERS" || true
}

# Wait for a child to end, through signals; returns its exit code.
wait_for() {
  local code=0
  while true; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2>/dev/null || break
  done
  # above 128 may be that of a signal which came just as the child ended; its own is still known
  if [ "$code" -gt 128 ]; then
    code=0
    wait "$1" || code=$?
  fi
  return "$code"
}

# A rank killed from outside may have lost its node, which Slurm notices later than srun. Slurm then ends this
# script and requeues the job; where it does not, the rank was killed for another reason, such as its memory.
await_node_failure() {
  local seconds
  seconds=$(scontrol show config | sed -n 's/^SlurmdTimeout *= \([0-9]*\).*/\1/p')
  seconds=$((${seconds:-300} + 30))
  echo "a rank was killed: waiting $seconds s for Slurm to find its node lost and requeue this job"
  sleep "$seconds"
}

# Done, to be continued, or failed: in the last case one report names the rank that failed first.
finish() {
  local run_dir=$1 code=$2
  if [ "$code" = 0 ] && [ -e "$run_dir/logs/stopped" ]; then
    echo "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends this script
  elif [ "$code" = 0 ]; then
    echo "done: $run_dir"
  else
    ask failures "$run_dir/logs" >&2
    if grep -qE "Killed|[Nn]ode failure|unreachable" "$run_dir/logs/srun.log"; then await_node_failure; fi
  fi
  return "$code"
}
