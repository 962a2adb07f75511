"""Rollout tokens/s: the embedded engine, vLLM's CPU build and transformers' generate, on the same prompts.

    PYTHONPATH=. python bench/rollout_speed.py --out bench/results/rollout_speed.md

64 questions of the demo x 8 samples of 64 tokens, none ended early, at temperature 1 over the whole
vocabulary; each engine with all cores, turn by turn. transformers returns no log-probabilities, the others
do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpt_mega.config import ParallelConfig, compose
from hpt_mega.data.questions import load_questions
from hpt_mega.launch import single_rank_environment
from hpt_mega.megatron import runtime
from hpt_mega.rollout.engine import SamplingParams
from hpt_mega.rollout.megatron import MegatronEngine
from hpt_mega.rollout.vllm import ServerSettings, VLLMServer
from tests.megatron.tiny import build_policy, config

Generate = Callable[[Sequence[Sequence[int]], SamplingParams], object]


def embedded(model: Path, dtype: str, sequences: int) -> Generate:
    policy = build_policy(model, config(ParallelConfig(pp=1), dtype=dtype), train=False)
    vocabulary = policy.shape.vocab_size
    return MegatronEngine(
        policy.model.eval(), policy.layout, vocab_size=vocabulary, max_sequences=sequences
    ).generate


def transformers(model: Path, dtype: torch.dtype) -> Generate:
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def generate(prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> object:
        longest = max(len(prompt) for prompt in prompts)
        tokens_BS = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask_BS = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return peer.generate(
            tokens_BS,
            attention_mask=mask_BS,
            do_sample=True,
            top_k=0,
            num_return_sequences=sampling.n,
            min_new_tokens=sampling.max_new_tokens,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=0,
        )

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--dtypes", nargs="+", default=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ |= single_rank_environment()
    questions = load_questions(compose(["experiment=demo"]).data, AutoTokenizer.from_pretrained(given.model))
    prompts = [question.prompt_tokens for question in questions.train[: given.prompts]]
    sampling = SamplingParams(n=given.samples, max_new_tokens=given.tokens)
    sequences, length = len(prompts) * given.samples, max(map(len, prompts)) + given.tokens
    lines = [
        "# Rollout speed",
        "",
        f"SmolLM2-135M, {len(prompts)} prompts x {given.samples} samples x {given.tokens} tokens, "
        f"{torch.get_num_threads()} threads, {given.rounds} rounds, turn by turn; tokens/s.",
        "",
        "| dtype | engine | min | median | max | of transformers |",
        "|---|---|---|---|---|---|",
    ]
    for dtype, torch_dtype in (
        (name, {"bf16": torch.bfloat16, "fp32": torch.float32}[name]) for name in given.dtypes
    ):
        vllm_dtype = str(torch_dtype).removeprefix("torch.")
        settings = ServerSettings(given.model, vllm_dtype, length, sequences, 1, 0, 4, 0.5, False)
        with tempfile.TemporaryDirectory() as folder:
            server = VLLMServer("bench", settings, Path(folder) / "vllm.log", 1800.0)
            try:
                server.start(600.0)
                engines = {
                    "embedded": embedded(given.model, dtype, sequences),
                    "vLLM": server.client.generate,
                    "transformers": transformers(given.model, torch_dtype),
                }
                rates = measure(engines, prompts, sampling, given.rounds)
            finally:
                server.close()
                runtime.shutdown()
        peer = statistics.median(rates["transformers"])
        for name, found in rates.items():
            middle = statistics.median(found)
            lines.append(
                f"| {dtype} | {name} | {min(found):.0f} | {middle:.0f} | {max(found):.0f} | "
                f"{middle / peer:.2f}x |"
            )
            print(lines[-1], flush=True)
        given.out.write_text("\n".join(lines) + "\n")


def measure(
    engines: dict[str, Generate], prompts: Sequence[Sequence[int]], sampling: SamplingParams, rounds: int
) -> dict[str, list[float]]:
    """Tokens/s by engine, a number a round."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    warm_up = SamplingParams(n=sampling.n, max_new_tokens=2)
    for generate in engines.values():
        generate(prompts, warm_up)
    for _ in range(rounds):
        for name, generate in engines.items():
            began = time.perf_counter()
            generate(prompts, sampling)
            seconds = time.perf_counter() - began
            rates[name].append(len(prompts) * sampling.n * sampling.max_new_tokens / seconds)
            print(name, f"{rates[name][-1]:.0f}", flush=True)
    return rates


if __name__ == "__main__":
    main()
