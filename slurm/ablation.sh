#!/usr/bin/env bash
# A sweep as a job array, and a report when all have ended; values with commas are swept, as Hydra's --multirun:
#   bash slurm/ablation.sh runs/ablation experiment=demo parallel=single algorithm=hpt,grpo,luffy seed=1,2
# AT_ONCE limits how many run together.
# SBATCH_OPTIONS holds options for every job of the array, for instance "--nodes=2 --ntasks-per-node=8".
#SBATCH --job-name=hpt_ablation
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# shellcheck source=slurm/common.sh
source "${HPT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
parse_arguments "$@"
folder=${ARGUMENTS[0]:?give a folder for the runs, then the sweep}
cd "$HPT_ROOT"

if [ "${ARGUMENTS[1]:-}" = --report ]; then
  ask ablation-report "$folder"
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  mapfile -t overrides < <(ask job "$folder" "$SLURM_ARRAY_TASK_ID")
  run_training "${overrides[@]}"
else
  count=$(ask sweep "$folder" "${ARGUMENTS[@]:1}")
  read -ra options <<<"${SBATCH_OPTIONS:-}"
  array=(sbatch --parsable --output="$folder/job%a.out" "${options[@]}" --array="0-$((count - 1))${AT_ONCE:+%$AT_ONCE}"
    slurm/ablation.sh "$folder")
  if [ -n "$DRY_RUN" ]; then
    show "${array[@]}"
    show sbatch --dependency=afterany:JOB slurm/ablation.sh "$folder" --report
    exit 0
  fi
  job=$("${array[@]}")
  report=$(sbatch --parsable --dependency="afterany:$job" --output="$folder/report.out" \
    --error="$folder/report.out" slurm/ablation.sh "$folder" --report)
  echo "jobs ${job}_[0-$((count - 1))], report $report: $folder"
fi
