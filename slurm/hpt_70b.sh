#!/usr/bin/env bash
# HPT on Llama-3.1-70B, 8 nodes of 8 H100: sbatch slurm/hpt_70b.sh [KEY=VALUE...]
# Look first: hpt dryrun experiment=hpt_70b; bash slurm/hpt_70b.sh --dry-run. Settings: slurm/common.sh.
# vLLM shares the GPUs of each replica's first node (colocated); on two nodes of its own (disaggregated):
#   ROLLOUT_NODES=2 sbatch --nodes=10 slurm/hpt_70b.sh
#SBATCH --job-name=hpt_70b
#SBATCH --nodes=8
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
run_training experiment=hpt_70b "${ARGUMENTS[@]}"
