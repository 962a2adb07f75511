"""`python -m hpt_mega.slurm WHAT ...`, as slurm/*.sh call it; users call the scripts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpt_mega.interruption import listen_early


def main() -> int:
    options = _parser().parse_args()
    if options.run is _rank:
        listen_early()  # before any import that takes its time

    from hpt_mega.config import ConfigError

    try:
        code: int = options.run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hpt_mega.slurm")
    verbs = parser.add_subparsers(required=True)

    node = verbs.add_parser("node", help="write what this node is into FOLDER")
    node.add_argument("folder", type=Path)
    node.add_argument("run_dir", type=Path)
    node.set_defaults(run=_node)
    compare = verbs.add_parser("compare", help="name what the nodes lack or differ in; exit code 1 if any")
    compare.add_argument("folder", type=Path)
    compare.add_argument("--nodes", type=int, default=1)
    compare.add_argument("--disk", type=float, default=0.0, metavar="GIB")
    compare.set_defaults(run=_compare)
    verbs.add_parser("allreduce", help="time NCCL between all tasks").set_defaults(run=_allreduce)

    rank = verbs.add_parser("rank", help="this task's rank of hpt train")
    rank.add_argument("overrides", nargs="*")
    rank.set_defaults(run=_rank)
    run_dir = verbs.add_parser("run-dir", help="the run_dir that these overrides give")
    run_dir.add_argument("--tasks", type=int, required=True, help="that train, one a process of the layout")
    run_dir.add_argument("overrides", nargs="*")
    run_dir.set_defaults(run=_run_dir)
    parse = verbs.add_parser("parse", help="whether a verb of hpt takes these arguments; nothing is loaded")
    parse.add_argument("verb", choices=("convert", "eval"))
    parse.add_argument("words", nargs=argparse.REMAINDER)
    parse.set_defaults(run=_parse)
    failures = verbs.add_parser("failures", help="which rank of a failed run failed first")
    failures.add_argument("logs", type=Path)
    failures.set_defaults(run=_failures)

    sweep = verbs.add_parser("sweep", help="write the jobs of a sweep into FOLDER; prints how many")
    sweep.add_argument("--dry-run", action="store_true", help="write nothing")
    sweep.add_argument("folder", type=Path)
    sweep.add_argument("overrides", nargs="+")
    sweep.set_defaults(run=_sweep)
    job = verbs.add_parser("job", help="the overrides of one job of a sweep, one a line")
    job.add_argument("folder", type=Path)
    job.add_argument("index", type=int)
    job.set_defaults(run=_job)
    report = verbs.add_parser("sweep-report", help="hpt report on a sweep, with the jobs that did not finish")
    report.add_argument("folder", type=Path)
    report.set_defaults(run=_report)
    return parser


def _node(options: argparse.Namespace) -> int:
    from hpt_mega.slurm.preflight import write_node

    write_node(options.folder, options.run_dir)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from hpt_mega.slurm.preflight import compare, read_nodes

    nodes = read_nodes(options.folder)
    problems = compare(nodes, options.nodes, options.disk)
    for problem in problems:
        print(f"pre-flight: {problem}", file=sys.stderr)
    if not problems:
        print(f"pre-flight: {len(nodes)} nodes are equal and have what the job needs")
    return 1 if problems else 0


def _allreduce(options: argparse.Namespace) -> int:
    from hpt_mega.slurm.preflight import time_allreduce

    return time_allreduce()


def _rank(options: argparse.Namespace) -> int:
    from hpt_mega.slurm.job import run_rank

    return run_rank(options.overrides)


def _run_dir(options: argparse.Namespace) -> int:
    from hpt_mega.config import ConfigError, compose

    cfg = compose(options.overrides)
    if cfg.parallel.world_size != options.tasks:
        raise ConfigError(
            f"the job has {options.tasks} tasks that train and {cfg.parallel.product}; change the layout, or "
            "sbatch's --nodes and --ntasks-per-node"
        )
    print(cfg.run_dir)
    return 0


def _parse(options: argparse.Namespace) -> int:
    from hpt_mega.checkpoint.command import add_directions
    from hpt_mega.evaluation.command import configure
    from hpt_mega.evaluation.config import compose

    parser = argparse.ArgumentParser(prog=f"hpt {options.verb}")
    if options.verb == "eval":
        configure(parser)
        compose(parser.parse_args(options.words).settings)
    else:
        add_directions(parser)
        parser.parse_args(options.words)
    return 0


def _failures(options: argparse.Namespace) -> int:
    from hpt_mega.launch import failure_report

    print(failure_report(options.logs))
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from hpt_mega.slurm.sweep import composed, write_jobs

    jobs = composed(options.overrides)
    if not options.dry_run:
        write_jobs(options.folder, jobs)
    print(len(jobs))
    return 0


def _job(options: argparse.Namespace) -> int:
    from hpt_mega.slurm.sweep import read_job

    print("\n".join(read_job(options.folder, options.index)))
    return 0


def _report(options: argparse.Namespace) -> int:
    from hpt_mega.cli import main as hpt
    from hpt_mega.slurm.sweep import unfinished

    for job in unfinished(options.folder):
        print(f"did not finish: {job}")
    return hpt(["report", str(options.folder)])


if __name__ == "__main__":
    sys.exit(main())
