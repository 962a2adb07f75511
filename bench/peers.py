"""A GRPO step beside TRL's GRPOTrainer and a plain transformers loop: bench/results/peers.md and peers.json.

    pip install --no-deps trl==1.16.0
    python bench/peers.py --out bench/results/peers.md [--models smollm2 5m] [--rounds 3] [--steps 4]

Every contender is a process of its own with all cores, started turn by turn in each round; the first step,
which warms up, is not counted. All ask the same questions for the same number of samples, of the same model
in the same dtype, with the same grader, and make one AdamW update; no KL term, no evaluation, no checkpoint.
A reward that splits nearly every group lets all train on all samples: groups of equal rewards have no
gradient, and ours would leave them out. Training is a step without its rollout; ours without the grading,
the others' with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hpt_mega.config import Config, compose

ROOT = Path(__file__).parents[1]
MICROBATCH = 16  # sequences of a forward and backward, TRL and loop
QUESTIONS = 8
SAMPLES = 8
DEADLINE_S = 1800.0


@dataclass
class Measured:
    """What a contender did after its first step: a number a step each, and its largest process."""

    step_s: list[float] = field(default_factory=list)
    rollout_s: list[float] = field(default_factory=list)
    train_s: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)  # sampled
    peak_mib: float = 0.0

    def add(self, other: Measured) -> None:
        for name in ("step_s", "rollout_s", "train_s", "tokens"):
            getattr(self, name).extend(getattr(other, name))
        self.peak_mib = max(self.peak_mib, other.peak_mib)


def overrides(model: str, folder: Path) -> list[str]:
    """The run, as `hpt train` takes it; the peers read the same config. The 5 M model is made there."""
    common = [
        "parallel=single",
        f"trainer.questions_per_step={QUESTIONS}",
        f"rollout.rollouts_per_question={SAMPLES}",
        "trainer.eval_every=0",
        "trainer.save_every=0",
        "trainer.export_hf=false",
        "data.heldout_questions=1",
        "evaluation.samples=1",
        "optimizer.lr=1e-5",
        "reward.kind=peers.even",  # groups of equal rewards have no gradient, and ours leaves them out
    ]
    if model == "smollm2":
        return ["experiment=demo", *common]
    _make_5m(folder)
    return [
        "experiment=lab/train",
        *common,
        f"model.path={folder / 'model'}",
        f"data.train_file={folder / 'questions.jsonl'}",
        "data.train_questions=256",
        f"data.heldout_file={folder / 'heldout.jsonl'}",
    ]


def even(response: str, answer: str) -> float:
    """A reward that nearly every group has both values of."""
    return float(len(response) % 2 == 0)


def _make_5m(folder: Path) -> None:
    """A model of 5 M random weights, and questions for it."""
    from hpt_mega.lab import exercises, models

    models.save(folder / "model", "llama", "5m", seed=1)
    portions = [[exercises.Portion("chain", 4, count)] for count in (256, 8)]
    for name, drawn in zip(("questions", "heldout"), exercises.draw(portions, seed=1), strict=True):
        exercises.write(folder / f"{name}.jsonl", drawn, lambda one: one.worked)


def ours(algorithm: Sequence[str]) -> Callable[[list[str], int, Path], Measured]:
    def run(settings: list[str], steps: int, folder: Path) -> Measured:
        run_dir = folder / "run"
        command = [sys.executable, "-m", "hpt_mega.cli", "train", *settings, *algorithm]
        measured = Measured()
        measured.peak_mib = finish([*command, f"trainer.steps={steps + 1}", f"run_dir={run_dir}"], folder)
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["step"] >= 2:
                timing = record["timing"]
                idle = timing.get("eval", 0.0) + timing.get("checkpoint", 0.0)  # of the last step
                measured.step_s.append(timing["step"] - idle)
                measured.rollout_s.append(timing["rollout"])
                measured.train_s.append(timing["train"])
                measured.tokens.append(record["tokens_rollout"])
        return measured

    return run


def peer(name: str) -> Callable[[list[str], int, Path], Measured]:
    """A contender of this file, in a process of its own."""

    def run(settings: list[str], steps: int, folder: Path) -> Measured:
        out = folder / "out.json"
        command = [sys.executable, __file__, "--contender", name, "--steps", str(steps), "--out", str(out)]
        peak_mib = finish([*command, *settings], folder)
        return Measured(**json.loads(out.read_text()) | {"peak_mib": peak_mib})

    return run


CONTENDERS = {
    "ours, GRPO": ours(["algorithm=grpo"]),
    "ours, HPT": ours(["algorithm=hpt"]),
    "TRL, GRPO": peer("trl"),
    "transformers loop, GRPO": peer("loop"),
}


def reward_path() -> dict[str, str]:
    """The environment variable by which reward workers find `even`."""
    folder = str(Path(__file__).parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))}


def finish(command: Sequence[str], folder: Path) -> float:
    """Run a contender to its end; the peak resident memory of the largest process of its tree, MiB."""
    peak, end, log = 0, time.monotonic() + DEADLINE_S, folder / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, env=os.environ | reward_path(), stdout=sink, stderr=subprocess.STDOUT
        )
    while process.poll() is None:
        if time.monotonic() > end:
            process.kill()
            raise SystemExit(f"not done within {DEADLINE_S:g} s: {' '.join(command)}")
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            peak = max([peak, *(one.memory_info().rss for one in (parent, *parent.children(recursive=True)))])
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{log.read_text()[-2000:]}")
    return peak / 2**20


class Clock:
    """Charges the parts of steps to a Measured; the first step is left out."""

    def __init__(self) -> None:
        self.measured = Measured()
        self._step = self._rollout = self._tokens = 0.0
        self._began: float | None = None
        self._first = True

    def begin(self) -> None:
        self._began, self._rollout, self._tokens = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def rollout(self) -> Any:
        began = time.perf_counter()
        yield
        self._rollout += time.perf_counter() - began

    def sampled(self, tokens: float) -> None:
        self._tokens += tokens

    def end(self) -> None:
        assert self._began is not None
        if not self._first:
            took = time.perf_counter() - self._began
            self.measured.step_s.append(took)
            self.measured.rollout_s.append(self._rollout)
            self.measured.train_s.append(took - self._rollout)
            self.measured.tokens.append(self._tokens)
        self._first = False


def questions(cfg: Config) -> tuple[Any, list[Any]]:
    """The tokenizer and the questions of a run."""
    from transformers import AutoTokenizer

    from hpt_mega.data.questions import load_questions

    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path, padding_side="left")
    return tokenizer, list(load_questions(cfg.data, tokenizer).train)


def grader(cfg: Config) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """Our own, for all contenders."""
    from hpt_mega.rewards.pool import RewardPool

    pool = RewardPool(cfg.reward.kind)
    return lambda texts, answers: [verdict.reward for verdict in pool.verdicts(texts, answers)]


def trl(cfg: Config, steps: int) -> Measured:
    """TRL's own trainer, without gradient checkpointing, which costs time, and without a reference model."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock()
    tokenizer, asked = questions(cfg)
    count, samples = cfg.trainer.questions_per_step, cfg.rollout.rollouts_per_question
    rows = [{"prompt": tokenizer.decode(q.prompt_tokens), "answer": q.answer} for q in asked]

    class Timed(GRPOTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            with clock.rollout():
                made = super()._generate(prompts)
            clock.sampled(sum(map(len, made[1])))
            return made

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    grade = grader(cfg)

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return grade(completions, answer)

    with tempfile.TemporaryDirectory() as folder:
        Timed(
            model=cfg.model.path,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                model_init_kwargs={"dtype": dtype(cfg)},
                gradient_checkpointing=False,
                per_device_train_batch_size=MICROBATCH,
                gradient_accumulation_steps=count * samples // MICROBATCH,
                num_generations=samples,
                max_completion_length=cfg.rollout.max_new_tokens,
                temperature=cfg.rollout.temperature,
                beta=0.0,
                learning_rate=cfg.optimizer.lr,
                max_steps=steps + 1,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Steps()],
        ).train()

    return clock.measured


def dtype(cfg: Config) -> str:
    return {"bf16": "bfloat16", "fp32": "float32"}[cfg.precision.dtype]


def loop(cfg: Config, steps: int) -> Measured:
    """What one writes in an hour: generate, grade, normalise within groups, one update."""
    import torch
    from transformers import AutoModelForCausalLM

    clock, grade = Clock(), grader(cfg)
    tokenizer, asked = questions(cfg)
    count, samples = cfg.trainer.questions_per_step, cfg.rollout.rollouts_per_question
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=getattr(torch, dtype(cfg)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optimizer.lr, weight_decay=0.0)
    for step in range(steps + 1):
        batch = asked[step * count : (step + 1) * count]
        clock.begin()
        with clock.rollout(), torch.no_grad():
            given = tokenizer.pad({"input_ids": [list(q.prompt_tokens) for q in batch]}, return_tensors="pt")
            made_BS = model.generate(
                **given,
                do_sample=True,
                temperature=cfg.rollout.temperature,
                top_k=0,
                num_return_sequences=samples,
                max_new_tokens=cfg.rollout.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        start = given["input_ids"].shape[1]
        ended_BT = (made_BS[:, start:] == tokenizer.eos_token_id).cumsum(1)
        mask_BT = (ended_BT == 0) | ((ended_BT == 1) & (made_BS[:, start:] == tokenizer.eos_token_id))
        clock.sampled(float(mask_BT.sum()))
        texts = tokenizer.batch_decode(made_BS[:, start:], skip_special_tokens=True)
        reward = torch.tensor(grade(texts, [q.answer for q in batch for _ in range(samples)]))
        group = reward.view(count, samples)
        advantage_B = ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-6)).flatten()
        prompt_mask = given["attention_mask"].repeat_interleave(samples, 0)
        optimizer.zero_grad()
        for first in range(0, len(made_BS), MICROBATCH):
            part = slice(first, first + MICROBATCH)
            seen = torch.cat([prompt_mask[part], mask_BT[part].long()], 1)
            logits = model(
                made_BS[part], attention_mask=seen, logits_to_keep=made_BS.shape[1] - start + 1
            ).logits
            logp = torch.log_softmax(logits[:, :-1].float(), -1)
            logp = logp.gather(-1, made_BS[part, start:, None]).squeeze(-1)
            ratio = torch.exp(logp - logp.detach())
            loss = -(ratio * advantage_B[part, None] * mask_BT[part]).sum() / mask_BT.sum()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.end()
    return clock.measured


def table(model: str, found: dict[str, Measured]) -> list[str]:
    """The lines of one model: medians, and ratios of them."""
    base = statistics.median(found["ours, GRPO"].step_s)
    samples = QUESTIONS * SAMPLES
    lines = [
        f"\n## {model}\n",
        "| contender | step, s: median (lowest, highest) | of ours | samples/s | tokens a sample | rollout, "
        "tokens/s | training, tokens/s | peak RSS, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        step = statistics.median(one.step_s)
        tokens = sum(one.tokens)
        lines.append(
            f"| {name} | {step:.2f} ({min(one.step_s):.2f}, {max(one.step_s):.2f}) | {step / base:.2f}x "
            f"| {samples / step:.1f} | {tokens / len(one.tokens) / samples:.0f} "
            f"| {tokens / sum(one.rollout_s):.0f} | {tokens / sum(one.train_s):.0f} | {one.peak_mib:.0f} |"
        )
    ours_grpo = found["ours, GRPO"]
    outside = 1 - sum(ours_grpo.rollout_s + ours_grpo.train_s) / sum(ours_grpo.step_s)
    lines.append(f"\nOutside rollout and training: {outside:.1%} of our GRPO step.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("smollm2", "5m"), default=["smollm2", "5m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contender", choices=("trl", "loop"), help="used by this script itself")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    if options.contender:
        measured = {"trl": trl, "loop": loop}[options.contender](compose(options.settings), options.steps)
        options.out.write_text(json.dumps(asdict(measured)))
        return
    lines = [
        "# A step beside the peers",
        "",
        f"{QUESTIONS} questions with {SAMPLES} samples each a step, {len(os.sched_getaffinity(0))} cores, "
        f"{options.rounds} rounds of {options.steps} counted steps.",
    ]
    everything: dict[str, dict[str, Measured]] = {}
    for model in options.models:
        found = everything[model] = {name: Measured() for name in CONTENDERS}
        for number in range(options.rounds):
            for name, run in CONTENDERS.items():
                with tempfile.TemporaryDirectory() as scratch:
                    folder = Path(scratch)
                    found[name].add(run(overrides(model, folder), options.steps, folder))
                seconds = ", ".join(f"{step_s:.2f}" for step_s in found[name].step_s[-options.steps :])
                print(f"{model}, round {number + 1}, {name}: {seconds} s a step", flush=True)
            tables = [line for name, one in everything.items() for line in table(name, one)]
            options.out.write_text("\n".join([*lines, *tables]) + "\n")  # what a kill leaves
            numbers = {
                model: {name: asdict(one) for name, one in of.items()} for model, of in everything.items()
            }
            options.out.with_suffix(".json").write_text(json.dumps(numbers) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
