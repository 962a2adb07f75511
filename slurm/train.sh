#!/usr/bin/env bash
# Any experiment on any nodes: sbatch --nodes=2 --ntasks-per-node=8 slurm/train.sh experiment=demo trainer.steps=50
# Without submitting: bash slurm/train.sh --dry-run experiment=demo
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
