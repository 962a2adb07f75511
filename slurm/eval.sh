#!/usr/bin/env bash
# hpt eval on a node's GPUs, a replica on each:
#   sbatch slurm/eval.sh model=runs/hpt_7b/hf parallel.dp=8 'benchmarks=[aime24,amc23,math500]'
# Answers are kept as they come; a requeued job asks only what is left.
#SBATCH --job-name=hpt_eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
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
check parse eval "${ARGUMENTS[@]}"
enter_job
on_nodes --ntasks=1 -- "$HPT_PYTHON" -m hpt_mega.cli eval "${ARGUMENTS[@]}"
