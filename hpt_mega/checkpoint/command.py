"""The verb `hpt convert`: its options, its progress bar, and how its errors reach the user.

What it calls is in convert.py; tools/convert_*.py are this verb under other names.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from hpt_mega.arguments import at_least
from hpt_mega.ending import FAILED, concluded

if TYPE_CHECKING:
    from hpt_mega.checkpoint.convert import Progress, Summary


def add_directions(verb: argparse.ArgumentParser) -> None:
    """Give the verb's parser its two directions."""
    directions = verb.add_subparsers(title="directions", required=True, metavar="DIRECTION")
    configure_hf_to_megatron(
        directions.add_parser("hf-to-megatron", help="a Hugging Face folder to a Megatron checkpoint")
    )
    configure_megatron_to_hf(
        directions.add_parser("megatron-to-hf", help="a Megatron checkpoint to a Hugging Face folder")
    )


def configure_hf_to_megatron(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a Hugging Face folder as a Megatron torch_dist checkpoint. It reads at any layout; a job at "
        "the one given here reads whole files."
    )
    parser.epilog = "example: hpt convert hf-to-megatron --hf models/llama --out ckpt/llama --tp 2 --pp 2"
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="folder with config.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    for option, meaning in (
        ("tp", "tensor-parallel ranks"),
        ("pp", "pipeline stages"),
        ("vpp", "model chunks a stage"),
        ("ep", "expert-parallel ranks"),
        ("etp", "tensor-parallel ranks of an expert"),
    ):
        parser.add_argument(f"--{option}", type=at_least(1), default=1, metavar="N", help=meaning)
    _add_common(parser)
    parser.set_defaults(run=_hf_to_megatron)


def configure_megatron_to_hf(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a Megatron checkpoint (torch_dist, or legacy mp_rank_XX) as a Hugging Face folder. Config, "
        "dtype and tokenizer come from the checkpoint."
    )
    parser.epilog = "example: hpt convert megatron-to-hf --megatron ckpt/llama --out models/llama-again"
    parser.add_argument(
        "--megatron", type=Path, required=True, metavar="DIR", help="as Megatron's --load takes it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="config and tokenizer, for a checkpoint that brings none along"
    )
    _add_common(parser)
    parser.set_defaults(run=_megatron_to_hf)


def run_tool(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Run one direction as a program of its own."""
    options = parser.parse_args(arguments)
    return concluded(lambda: int(options.run(options)))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=at_least(1),
        default=1,
        metavar="N",
        help="that share the work; each needs memory for the largest parameter (default: 1)",
    )
    parser.add_argument("--verify", action="store_true", help="read both sides anew and compare every tensor")
    parser.add_argument(
        "--check-logits",
        action="store_true",
        help="compare with transformers on a prompt (both models whole, in fp32)",
    )


def _hf_to_megatron(options: argparse.Namespace) -> int:
    from hpt_mega.checkpoint.convert import hf_to_megatron
    from hpt_mega.checkpoint.layout import TargetLayout

    layout = TargetLayout(**{field.name: getattr(options, field.name) for field in fields(TargetLayout)})

    def finished(folder: Path) -> None:
        _check(options, hf=options.hf, megatron=folder)

    return _report(
        lambda progress: hf_to_megatron(
            options.hf, options.out, layout, progress, finished, options.processes
        )
    )


def _megatron_to_hf(options: argparse.Namespace) -> int:
    from hpt_mega.checkpoint.convert import megatron_to_hf

    def finished(folder: Path) -> None:
        _check(options, hf=folder, megatron=options.megatron)

    return _report(
        lambda progress: megatron_to_hf(
            options.megatron, options.out, options.hf, progress, finished, options.processes
        )
    )


def _check(options: argparse.Namespace, *, hf: Path, megatron: Path) -> None:
    from hpt_mega.checkpoint.convert import verify

    if options.verify:
        verify(hf, megatron)
        print("verified: every tensor is equal, bit by bit", file=sys.stderr)
    if options.check_logits:
        from hpt_mega.checkpoint.logits import check_logits

        print(f"logits differ from transformers' by {check_logits(hf, megatron):.1e}", file=sys.stderr)


def _report(convert: Callable[[Progress], Summary]) -> int:
    """Run a conversion under a progress bar; say what was done, or what is wrong."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: torch's fresh memory costs less time
    try:
        with _bar() as progress:
            done = convert(progress)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if done.left_out:
        print(
            f"left out, as no part of the trained model: {len(done.left_out)} tensors of the layers that "
            f"predict further tokens ({done.left_out[0]}, ...)",
            file=sys.stderr,
        )
    resumed = f", {done.resumed} of them before a kill" if done.resumed else ""
    speed = done.nbytes / 1e9 / done.seconds
    print(
        f"{done.out}: {done.parameters} parameters{resumed}, {done.nbytes / 1e9:.3f} GB in "
        f"{done.seconds:.2f} s ({speed:.2f} GB/s)"
    )
    return 0


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda done, total: bar.update(task, advance=done, total=total)
