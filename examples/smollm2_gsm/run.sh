#!/usr/bin/env bash
# HPT, GRPO and SFT on word problems, of a real 135M model with rollouts by vLLM: examples/smollm2_gsm/run.sh
# [KEY=VALUE...]. Killed, the same command goes on. First `make .venv/.vllm`.
set -euo pipefail
cd "$(dirname "$0")/../.."
hpt="${HPT:-.venv/bin/hpt}"
for algorithm in hpt grpo sft; do
  rollouts=4
  if [ "$algorithm" = sft ]; then rollouts=0; fi # it would not train on them
  "$hpt" train algorithm="$algorithm" run_dir=runs/smollm2_gsm/"$algorithm" resume=auto \
    rollout=vllm parallel=single precision=native \
    "data.tasks=[{name: gsm_symbolic, label: word problem}]" \
    data.train_questions=600 data.heldout_questions=96 data.max_prompt_tokens=112 \
    data.max_demonstration_tokens=64 rollout.max_new_tokens=72 \
    "data.instruction='Work step by step. End with \\boxed{answer}.'" \
    optimizer.lr=1e-4 optimizer.schedule=constant \
    trainer.steps=30 trainer.questions_per_step=16 rollout.rollouts_per_question="$rollouts" \
    trainer.eval_every=10 trainer.save_every=5 trainer.keep_checkpoints=1 trainer.export_hf=false "$@"
done
exec "$hpt" report runs/smollm2_gsm
