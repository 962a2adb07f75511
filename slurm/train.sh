#!/usr/bin/env bash
# Any experiment on any nodes, a task a rank: sbatch --nodes=2 --ntasks-per-node=1 slurm/train.sh experiment=demo
# Without submitting: bash slurm/train.sh --dry-run experiment=demo parallel=single
#SBATCH --job-name=hpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=slurm-%x-%j.out
: "${HPT_ROOT:=${SLURM_SUBMIT_DIR:-$PWD}}"
# shellcheck source=slurm/common.sh
source "$HPT_ROOT/slurm/common.sh" 2>/dev/null || {
  echo "error: HPT_ROOT is $HPT_ROOT, which has no slurm/common.sh; set it to the repository, or call this there" >&2
  exit 2
}
parse_arguments "$@"
run_training "${ARGUMENTS[@]}"
