#!/usr/bin/env bash
# A sweep as a job array, and FOLDER/comparison.html when all have ended; values with commas are swept, as Hydra's
# --multirun:
#   bash slurm/ablation.sh runs/ablation experiment=demo parallel=single algorithm=hpt,grpo,luffy seed=1,2
# AT_ONCE limits how many run together.
# SBATCH_OPTIONS holds options for every job of the array, for instance "--nodes=2 --ntasks-per-node=8".
#SBATCH --job-name=hpt_ablation
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
: "${HPT_ROOT:=${SLURM_SUBMIT_DIR:-$PWD}}"
# shellcheck source=slurm/common.sh
source "$HPT_ROOT/slurm/common.sh" 2>/dev/null || {
  echo "error: HPT_ROOT is $HPT_ROOT, which has no slurm/common.sh; set it to the repository, or call this there" >&2
  exit 2
}
parse_arguments "$@"
[ "${#ARGUMENTS[@]}" -gt 1 ] || [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || {
  echo "usage: bash slurm/ablation.sh [--dry-run] FOLDER KEY=VALUE,VALUE...; --help says more" >&2
  exit 2
}
folder=${ARGUMENTS[0]}
cd "$HPT_ROOT"

if [ "${ARGUMENTS[1]:-}" = --report ]; then
  ask sweep-report "$folder"
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  listed=$(ask job "$folder" "$SLURM_ARRAY_TASK_ID")
  mapfile -t overrides <<<"$listed"
  run_training "${overrides[@]}"
else
  count=$(ask sweep ${DRY_RUN:+--dry-run} "$folder" "${ARGUMENTS[@]:1}")
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
