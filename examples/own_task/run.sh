#!/usr/bin/env bash
# HPT on questions, demonstrations and a reward of one's own: examples/own_task/run.sh [KEY=VALUE...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "${HPT:-.venv/bin/hpt}" train run_dir=runs/own_task \
  data.tasks=[] \
  data.train_file="$here/train.jsonl" data.train_questions=60 \
  data.heldout_file="$here/heldout.jsonl" data.heldout_questions=20 \
  reward.kind=units.near \
  trainer.steps=12 "$@"
