#!/usr/bin/env bash
# HPT on Qwen3-235B-A22B, 32 nodes of 8 H100 that train and 4 that serve: sbatch slurm/hpt_moe.sh [KEY=VALUE...]
# Look first: hpt dryrun experiment=hpt_moe; bash slurm/hpt_moe.sh --dry-run. Settings: slurm/common.sh.
# A vLLM server takes a whole node, and each replica needs one: parallel.dp is how many nodes serve at least.
#SBATCH --job-name=hpt_moe
#SBATCH --nodes=36
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#SBATCH --output=slurm-%x-%j.out
OWN_ROLLOUT_NODES=4 # of the 36
: "${HPT_ROOT:=${SLURM_SUBMIT_DIR:-$PWD}}"
# shellcheck source=slurm/common.sh
source "$HPT_ROOT/slurm/common.sh" 2>/dev/null || {
  echo "error: HPT_ROOT is $HPT_ROOT, which has no slurm/common.sh; set it to the repository, or call this there" >&2
  exit 2
}
parse_arguments "$@"
run_training experiment=hpt_moe "${ARGUMENTS[@]}"
