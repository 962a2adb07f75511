#!/usr/bin/env bash
# HPT on Qwen3-235B-A22B, 32 nodes of 8 H100: sbatch slurm/hpt_moe.sh [KEY=VALUE...]
# Look first: hpt dryrun experiment=hpt_moe; bash slurm/hpt_moe.sh --dry-run. Settings: slurm/common.sh.
# The engine decodes on the training GPUs (colocated). With ROLLOUT_NODES (slurm/common.sh) a server is brought
# the weights of one replica, which must hold all experts: lower parallel.ep first.
#SBATCH --job-name=hpt_moe
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=slurm-%x-%j.out
# shellcheck source=slurm/common.sh
source "${HPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
parse_arguments "$@"
run_training experiment=hpt_moe "${ARGUMENTS[@]}"
