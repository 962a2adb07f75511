"""The command `hpt`: its verbs, their help, and how errors reach the user.

What a verb does lives in the module it calls; those are imported when the verb runs.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hpt_mega.checkpoint.command import add_directions
from hpt_mega.checkpoint.manage import configure as configure_checkpoints
from hpt_mega.config import ConfigError, compose
from hpt_mega.dryrun.command import configure as configure_dryrun
from hpt_mega.ending import CONFIG_ERROR, FAILED, concluded
from hpt_mega.evaluation.command import configure as configure_eval
from hpt_mega.lab.command import configure as configure_lab
from hpt_mega.planning.command import configure as configure_plan
from hpt_mega.rewards.command import add_grade_options
from hpt_mega.rewards.pool import KINDS
from hpt_mega.rollout.serve import configure as configure_serve

__all__ = ["CONFIG_ERROR", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 failed, 2 refused."""
    options = _options(arguments)
    return concluded(lambda: int(options.run(options)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    settings = getattr(options, "overrides", getattr(options, "settings", None))
    if settings is not None:  # argparse leaves those after an option where others stand before it
        settings += (late := [word for word in unknown if "=" in word and word[0] != "-"])
        unknown = [word for word in unknown if word not in late]
    if unknown:
        takes = "; it takes KEY=VALUE, for instance " if hasattr(options, "overrides") else ""
        example = "trainer.steps=5 or experiment=demo" if takes else ""
        parser.error(f"hpt {options.verb}: unrecognized arguments: {' '.join(unknown)}{takes}{example}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpt",
        description="Hybrid post-training: reinforcement learning where a question is solved at times, "
        "supervised fine-tuning where it never is, in one objective.",
        epilog="example: hpt train experiment=demo",
    )
    parser.add_argument("--version", action="version", version=f"hpt {version('hpt_mega')}")
    verbs = parser.add_subparsers(title="verbs", required=True, dest="verb", metavar="VERB")

    train = verbs.add_parser(
        "train",
        help="train a model",
        description="Train a model; everything a run leaves is in its run_dir.",
        epilog="example: hpt train experiment=demo parallel.pp=3 trainer.steps=50 run_dir=runs/pp3; "
        "hpt train experiment=demo resume=auto goes on with an interrupted run",
    )
    train.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides; groups and defaults are in conf/"
    )
    train.set_defaults(run=_train)

    report = verbs.add_parser(
        "report",
        help="write a run's HTML report anew, or compare runs",
        description="Of one run: write report.html and its plots from metrics.jsonl. Of several, or of a "
        "folder of them such as a lab's or a sweep's: comparison.html, comparison.md and plots.",
        epilog="example: hpt report runs/demo; hpt report runs/ablation; hpt report runs/hpt runs/grpo",
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="default: the run's folder; the one that holds all compared"
    )
    report.set_defaults(run=_report)

    algorithms = verbs.add_parser(
        "algorithms",
        help="list the algorithms with their gradients",
        description="Every algorithm as a row: the gradient of its objective, its normaliser, its paper.",
        epilog="example: hpt algorithms; hpt train experiment=demo algorithm=grpo algorithm.clip_high=0.28",
    )
    algorithms.add_argument(
        "--markdown", action="store_true", help="the page docs/algorithms.md: every row, part and option"
    )
    algorithms.set_defaults(run=_algorithms)

    convert = verbs.add_parser(
        "convert",
        help="convert a checkpoint, Hugging Face to Megatron or back",
        description="Convert a checkpoint: streamed, bit-exact, and resumed where it was killed.",
        epilog="example: hpt convert hf-to-megatron --hf models/llama --out ckpt/llama --tp 2 --verify",
    )
    add_directions(convert)

    configure_eval(verbs.add_parser("eval", help="accuracy of a model on benchmarks"))
    configure_checkpoints(verbs.add_parser("checkpoints", help="list, verify or prune a run's checkpoints"))
    configure_plan(verbs.add_parser("plan", help="which layout fits a model on GPUs, and how fast it is"))

    configure_lab(verbs.add_parser("lab", help="compare all methods on small models made here"))
    configure_serve(verbs.add_parser("serve", help="serve rollouts to a trainer on another node"))
    configure_dryrun(verbs.add_parser("dryrun", help="examine a job of any size without a GPU"))

    grade = verbs.add_parser(
        "grade",
        help="grade answers against gold ones",
        description='Grade lines {"answer": GOLD, "response": TEXT, "kind": KIND}, '
        f"KIND one of {', '.join(KINDS)}; "
        'writes {"reward": 0 | 1, "why": ...} in the same order.',
        epilog="example: hpt grade --file answers.jsonl --out rewards.jsonl --workers 8",
    )
    add_grade_options(grade)

    _add_diagnosis(verbs)
    doctor = verbs.add_parser(
        "doctor",
        help="what is installed and what each missing part would give",
        description="What is installed, which implementation each fused piece takes, what is missing.",
        epilog="example: hpt doctor --json",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_diagnosis(verbs: Any) -> None:
    diagnosis = verbs.add_parser(
        "diagnose-gradient",
        help="bias and variance of each algorithm's gradient",
        description="Bias and variance of each algorithm's gradient over resampled rollouts, against the "
        "true gradient of the expected reward, on a policy small enough to enumerate.",
        epilog="example: hpt diagnose-gradient --rows grpo rloo hpt --staleness 0 0.2 --out runs/gradient",
    )
    diagnosis.add_argument("--rows", nargs="+", metavar="ROW", help="algorithms by name; default: all")
    diagnosis.add_argument("--questions", type=int, default=6, help="from half solved to hardly ever (6)")
    diagnosis.add_argument("--rollouts", type=int, default=8, help="of each question (8)")
    diagnosis.add_argument("--resamplings", type=int, default=400, help="gradients a row is judged by (400)")
    diagnosis.add_argument(
        "--staleness", type=float, nargs="+", default=[0.0], help="how far the rollouts' policy is off (0)"
    )
    diagnosis.add_argument(
        "--own-normaliser", action="store_true", help="each row's own, not sums over tokens for all"
    )
    diagnosis.add_argument("--seed", type=int, default=0)
    diagnosis.add_argument("--out", type=Path, metavar="DIR", help="also write table.md and plot.png there")
    diagnosis.set_defaults(run=_diagnose_gradient)


def _train(options: argparse.Namespace) -> int:
    cfg = compose(options.overrides)

    from hpt_mega.launch import launch
    from hpt_mega.validation import validate

    validate(cfg)
    return launch(cfg)


def _report(options: argparse.Namespace) -> int:
    from hpt_mega.telemetry.comparison import write_comparison
    from hpt_mega.telemetry.records import DamagedFileError
    from hpt_mega.telemetry.report import write_report

    folders: list[Path] = options.runs
    try:
        if len(folders) == 1 and (folders[0] / "metrics.jsonl").is_file():
            print(write_report(folders[0], options.out))
        else:
            common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
            print(write_comparison(folders, options.out or common))
    except DamagedFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return 0


def _diagnose_gradient(options: argparse.Namespace) -> int:
    from hpt_mega.objective import diagnosis, rows

    if options.out is not None:  # before minutes of work, whose result could not be written
        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(options.out))
    try:
        findings = [
            finding
            for staleness in options.staleness
            for finding in diagnosis.diagnose_gradient(
                options.rows or [row.name for row in rows()],
                questions=options.questions,
                rollouts=options.rollouts,
                resamplings=options.resamplings,
                staleness=staleness,
                own_normaliser=options.own_normaliser,
                seed=options.seed,
            )
        ]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    table = diagnosis.table(findings)
    print(table, end="")
    if options.out is not None:
        (options.out / "table.md").write_text(table)
        diagnosis.plot(findings, options.out / "plot.png")
    return 0


def _algorithms(options: argparse.Namespace) -> int:
    if options.markdown:
        from hpt_mega.objective.describe import markdown

        print(markdown(), end="")
        return 0

    from rich.console import Console
    from rich.table import Table

    from hpt_mega.objective import rows

    table = Table("algorithm", "gradient, per token", "normaliser", "paper", show_lines=True)
    for row in rows():
        table.add_row(row.name, row.formula.replace(";  ", "\n"), row.aggregation, row.paper)
    Console(markup=False).print(table)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from hpt_mega.doctor import diagnose

    found = diagnose()
    if options.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    console = Console(markup=False)  # [gpu] is an extra, no markup
    console.print(
        f"{found.host}: Python {found.python}, CUDA {found.cuda or 'none'}, driver {found.driver or 'none'}, "
        f"{found.free_disk_gib} GiB free, {len(found.gpus)} GPUs{': ' if found.gpus else ''}"
        + ", ".join(found.gpus)
    )
    packages = Table("package", "version", "gives", "if missing")
    for package in found.packages:
        install = "" if package.version else package.install
        packages.add_row(package.name, package.version or "missing", package.gives, install)
    console.print(packages)
    pieces = Table("piece of the step", "computed here by", "would be, if installed")
    for name, piece in found.pieces.items():
        pieces.add_row(name, piece.taken, piece.would)
    console.print(pieces)
    for problem in found.problems:
        console.print(f"problem: {problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
