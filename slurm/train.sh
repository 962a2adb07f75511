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
# shellcheck source=slurm/common.sh
source "${HPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
parse_arguments "$@"
run_training "${ARGUMENTS[@]}"
