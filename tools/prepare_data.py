"""Tokenises questions with demonstrations once, into a folder that training maps into memory, with a report.

The tokens are in Megatron's IndexedDataset format: prompt, demonstration and rejected response a document.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from hpt_mega.arguments import at_least
from hpt_mega.config import ColumnsConfig, ConfigError, fit, parse_settings
from hpt_mega.data.files import read_records
from hpt_mega.data.prepare import Settings, prepare

KNOWN = {
    "openr1": ColumnsConfig(answer="reward_model.ground_truth", demonstration="target", task="data_source")
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="megatron")
    started = time.monotonic()
    try:
        if not Path(options.tokenizer).is_dir():
            raise ConfigError(
                f"--tokenizer {options.tokenizer}: no such folder (looked for "
                f"{Path(options.tokenizer).absolute()}); expected a Hugging Face folder"
            )
        benchmarks = {name: _questions(name, options.split) for name in options.benchmarks}
        report = prepare(_settings(options), options.out, benchmarks)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(_summary(report))
    print(f"{options.out}: {time.monotonic() - started:.1f} s, {options.workers} workers")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/prepare_data.py --data hf:Elliott/Openr1-Math-46k-8192 "
        "--columns openr1 --drop-system --tokenizer models/Qwen2.5-Math-7B --out data/openr1 "
        "--benchmarks aime24 aime25; then hpt train model=qwen2_5_math_7b data=openr1_math",
    )
    parser.add_argument(
        "--data", required=True, metavar="FILE", help=".jsonl, .json, .parquet or hf:OWNER/NAME"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help=f"such as prompt=problem answer=reward_model.ground_truth; or {', '.join(KNOWN)}",
    )
    parser.add_argument("--split", default="train", help="of a dataset (train)")
    parser.add_argument("--template", default="chat", help="chat, qwen_math, llama_base or plain (chat)")
    parser.add_argument("--instruction", default="", help="the system message")
    parser.add_argument("--drop-system", action="store_true", help="leave the data's system messages out")
    parser.add_argument("--max-prompt-tokens", type=at_least(1), default=1024, metavar="N")
    parser.add_argument("--max-demonstration-tokens", type=at_least(1), default=8192, metavar="N")
    parser.add_argument("--rows", type=at_least(0), default=0, metavar="N", help="the first ones (0: all)")
    parser.add_argument(
        "--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N", help="processes"
    )
    parser.add_argument(
        "--benchmarks",
        nargs="*",
        default=[],
        metavar="NAME",
        help="of conf/benchmark, or files: 13-gram overlap",
    )
    parser.add_argument("--drop-overlap", action="store_true", help="leave questions that overlap out")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        source=options.data,
        tokenizer=options.tokenizer,
        columns=_columns(options.columns),
        split=options.split,
        template=options.template,
        instruction=options.instruction,
        keep_system=not options.drop_system,
        max_prompt_tokens=options.max_prompt_tokens,
        max_demonstration_tokens=options.max_demonstration_tokens,
        rows=options.rows,
        drop_overlap=options.drop_overlap,
        workers=options.workers,
    )


def _columns(given: list[str]) -> ColumnsConfig:
    """Raises ConfigError for what is neither a known mapping nor NAME=COLUMN."""
    if len(given) == 1 and given[0] in KNOWN:
        return KNOWN[given[0]]
    if unfit := [one for one in given if "=" not in one or one.split("=")[0] not in vars(ColumnsConfig())]:
        names = ", ".join(vars(ColumnsConfig()))
        known = ", ".join(KNOWN)
        raise ConfigError(f"--columns {unfit[0]}: expected NAME=COLUMN with a name of {names}, or {known}")
    return fit(ColumnsConfig, "--columns", parse_settings(given))


def _questions(name: str, split: str) -> list[str]:
    from hpt_mega.evaluation.benchmarks import describe
    from hpt_mega.evaluation.config import EvalConfig

    _, config = describe(name, EvalConfig(model="", benchmarks=[], split=split))
    return [record.prompt for record in read_records(config.source, config.columns, config.split)]


def _summary(report: dict[str, Any]) -> str:
    lines = [
        f"{report['questions']} of {report['rows']} rows; dropped: {report['dropped'] or 'none'}",
        f"without demonstration {report['without_demonstration']}, "
        f"without answer {report['without_answer']}, demonstrations cut {report['truncated_demonstrations']}",
    ]
    for name, part in report["tokens"].items():
        if part["sequences"]:
            quantiles = ", ".join(f"{key} {part[key]:.0f}" for key in part if key.startswith("p"))
            lines.append(f"{name}: {part['total']} tokens in {part['sequences']} sequences, {quantiles}")
    for name, part in report["overlap"].items():
        lines.append(f"overlap with {name}: {part['questions']} of its questions in {part['rows']} rows")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
