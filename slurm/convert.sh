#!/usr/bin/env bash
# hpt convert on a node: sbatch slurm/convert.sh hf-to-megatron --hf DIR --out DIR --tp 8 --pp 4
# A conversion that was killed goes on where it was; so does this job when it is requeued.
#SBATCH --job-name=hpt_convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# shellcheck source=slurm/common.sh
source "${HPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
parse_arguments "$@"
enter_job || exit 0
on_nodes --ntasks=1 -- "$HPT_PYTHON" -m hpt_mega.cli convert "${ARGUMENTS[@]}"
