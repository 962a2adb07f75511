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
: "${HPT_ROOT:=${SLURM_SUBMIT_DIR:-$PWD}}"
# shellcheck source=slurm/common.sh
source "$HPT_ROOT/slurm/common.sh" 2>/dev/null || {
  echo "error: HPT_ROOT is $HPT_ROOT, which has no slurm/common.sh; set it to the repository, or call this there" >&2
  exit 2
}
parse_arguments "$@"
run_training experiment=hpt_70b "${ARGUMENTS[@]}"
