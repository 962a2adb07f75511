#!/usr/bin/env bash
# HPT on Qwen2.5-7B, one node of 8 H100: sbatch slurm/hpt_7b.sh [KEY=VALUE...]
# Look first: hpt dryrun experiment=hpt_7b; bash slurm/hpt_7b.sh --dry-run. Settings: slurm/common.sh.
# The engine decodes on the training GPUs (colocated); a step, its evaluation and a save must fit into
# the hour between the signal and the time limit.
#SBATCH --job-name=hpt_7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@3600
#SBATCH --output=slurm-%x-%j.out
: "${HPT_ROOT:=${SLURM_SUBMIT_DIR:-$PWD}}"
# shellcheck source=slurm/common.sh
source "$HPT_ROOT/slurm/common.sh" 2>/dev/null || {
  echo "error: HPT_ROOT is $HPT_ROOT, which has no slurm/common.sh; set it to the repository, or call this there" >&2
  exit 2
}
parse_arguments "$@"
run_training experiment=hpt_7b "${ARGUMENTS[@]}"
