#!/usr/bin/env bash
# hpt convert on a node: sbatch slurm/convert.sh hf-to-megatron --hf DIR --out DIR --tp 8 --pp 4
# A conversion that was killed goes on where it was; so does this job when it is requeued.
#SBATCH --job-name=hpt_convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
: "${HPT_ROOT:=${SLURM_SUBMIT_DIR:-$PWD}}"
# shellcheck source=slurm/common.sh
source "$HPT_ROOT/slurm/common.sh" 2>/dev/null || {
  echo "error: HPT_ROOT is $HPT_ROOT, which has no slurm/common.sh; set it to the repository, or call this there" >&2
  exit 2
}
parse_arguments "$@"
stand_in
check parse convert "${ARGUMENTS[@]}"
enter_job
on_nodes --ntasks=1 -- "$HPT_PYTHON" -m hpt_mega.cli convert "${ARGUMENTS[@]}"
