#!/usr/bin/env bash
# The checks that need a GPU, each with a verdict and a reason, as one JSON file.
#
#   tools/gpu_smoke.sh [OUT.json]        (default: runs/gpu_smoke.json)
#
# Exit code 0 where no check failed; a check that this machine cannot run is skipped, with the reason. HPT_PYTHON names
# the interpreter, LIMIT the seconds a check may take. Of its checks only the first has been run on a GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:-runs/gpu_smoke.json}
python=${HPT_PYTHON:-python}
limit=${LIMIT:-1800}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$(dirname "$out")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore

"$python" -m hpt_mega.cli doctor --json >"$scratch/doctor.json" || echo '{}' >"$scratch/doctor.json"
for check in nccl te_against_local fp8_against_bf16 vllm_rollout; do
    echo "== $check" >&2
    begun=$SECONDS
    timeout --kill-after=30 "$limit" "$python" tools/gpu_smoke.py "$check" "$scratch/$check" \
        >"$scratch/$check.log" 2>&1
    code=$?
    "$python" tools/gpu_smoke.py verdict "$scratch" "$check" "$code" "$((SECONDS - begun))" >&2
done
"$python" tools/gpu_smoke.py report "$scratch" "$out"
