#!/usr/bin/env bash
# hpt eval on a node's GPUs: sbatch slurm/eval.sh model=runs/hpt_7b/hf 'benchmarks=[aime24,amc23,math500]'
# Answers are kept as they come; a requeued job asks only what is left.
#SBATCH --job-name=hpt_eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# shellcheck source=slurm/common.sh
source "${HPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
parse_arguments "$@"
enter_job || exit 0
on_nodes --ntasks=1 -- "$HPT_PYTHON" -m hpt_mega.cli eval "${ARGUMENTS[@]}"
