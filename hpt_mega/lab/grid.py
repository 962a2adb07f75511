"""Which jobs a lab consists of: models to pre-train, then one run a method, model and seed.

What a job does is in worker.py, when and where it is done in runner.py.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpt_mega.arguments import quoted
from hpt_mega.files import write_atomically, writing_folder
from hpt_mega.lab.config import LabConfig
from hpt_mega.lab.exercises import Portion, draw, mixed, write
from hpt_mega.lab.models import save
from hpt_mega.telemetry.runs import COUNTS, LABEL

SETS = ("pretraining", "training", "heldout")
VERIFIED = "verified"  # the questions of training with the demonstrations of another school
HPT = [["algorithm=hpt"]]  # the stages of the method
BASE = "base"  # the "method" of the models that nothing has trained further


@dataclass(frozen=True)
class Job:
    """One `hpt train` or `hpt eval`."""

    verb: str
    settings: tuple[str, ...]
    run_dir: Path

    @property
    def is_done(self) -> bool:
        return (self.run_dir / {"train": "summary.json", "eval": COUNTS}[self.verb]).is_file()

    @property
    def command(self) -> str:
        """As it could be typed."""
        return shlex.join(("hpt", self.verb, *self.settings))


@dataclass(frozen=True)
class Run:
    """A method on a model with a seed: jobs that follow each other."""

    method: str
    cell: str
    seed: int
    folder: Path
    jobs: tuple[Job, ...]
    base: Path | None = None  # the evaluation of the model that it begins with
    outside: tuple[str, ...] = ()
    is_reference: bool = False  # what others are compared with: HPT as it stands

    @property
    def name(self) -> str:
        return f"{self.method} {self.cell} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        return all(job.is_done for job in self.jobs)

    @property
    def settings(self) -> tuple[str, ...]:
        """Of all jobs, wherever the run's folder is: runs of the same settings are the same run."""
        return tuple(
            setting.replace(str(self.folder), "RUN") for job in self.jobs for setting in job.settings
        )

    def begin(self) -> None:
        """Write what telemetry/runs.py knows the run by."""
        self.folder.mkdir(parents=True, exist_ok=True)
        label: dict[str, object] = {"method": self.method, "cell": self.cell, "seed": self.seed}
        if self.base:
            label |= {"base": os.path.relpath(self.base, self.folder), "outside": self.outside}
            label["is_reference"] = self.is_reference
        write_atomically(self.folder / LABEL, json.dumps(label) + "\n")

    def tidy(self) -> None:
        """Once it is done: a grid's checkpoints and models would fill a disk. Base models stay."""
        for job in self.jobs if self.base else ():
            for heavy in ("checkpoints", "hf"):
                shutil.rmtree(job.run_dir / heavy, ignore_errors=True)
            (job.run_dir / "responses.jsonl").unlink(missing_ok=True)


def reuse(runs: Sequence[Run], others: Sequence[Run]) -> None:
    """Copy what the others have done already: a variant of an ablation may be a method of the main grid."""
    done = {other.settings: other for other in others if other.is_done}
    for run in runs:
        if run.settings in done and not run.folder.exists():
            with writing_folder(run.folder) as part:
                shutil.copytree(done[run.settings].folder, part, dirs_exist_ok=True)
                replace(run, folder=part).begin()


def prepare(cfg: LabConfig, folder: Path) -> None:
    """Make the files of questions and the random models that are not there yet."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    portions = _portions(cfg)
    if not all(_file(folder, name).is_file() for name in (*SETS, VERIFIED)):
        drawn = draw(list(portions.values()), cfg.data.seed)
        for name, exercises in zip(portions, drawn, strict=True):
            write(_file(folder, name), exercises, mixed(portions[name], cfg.data.seed))
        write(_file(folder, VERIFIED), drawn[SETS.index("training")], lambda exercise: exercise.verified)
    for family, size in cfg.cells:
        if not (random_model := folder / "random" / f"{family}_{size}").is_dir():
            random_model.parent.mkdir(exist_ok=True)
            save(random_model, family, size, cfg.data.seed)


def base_models(cfg: LabConfig, folder: Path) -> list[Run]:
    """The pre-training of each model, and how often it solves the held-out questions."""
    runs = []
    for family, size in cfg.cells:
        cell = f"{family}_{size}"
        home = folder / BASE / cell
        settings = (
            "experiment=lab/pretrain",
            f"model.path={quoted(folder / 'random' / cell)}",
            *_data(cfg, folder, "pretraining"),
            *cfg.pretraining[size],
            "resume=auto",
            f"run_dir={quoted(home)}",
        )
        jobs = (Job("train", settings, home), _evaluation(cfg, folder, home, [], seed=1))
        runs.append(Run(BASE, cell, cfg.data.seed, home, jobs))
    return runs


def runs(cfg: LabConfig, folder: Path, home: str) -> list[Run]:
    """Every method on every model with every seed, below FOLDER/HOME; seed by seed, so that a lab that is
    stopped half-way has compared all methods on the seeds that it did."""
    return [
        _run(cfg, folder, home, family, size, method, seed)
        for seed in cfg.seeds
        for family, size in cfg.cells
        for method in cfg.methods
    ]


def _run(cfg: LabConfig, folder: Path, below: str, family: str, size: str, method: str, seed: int) -> Run:
    stages, cell = cfg.methods[method], f"{family}_{size}"
    home = folder / below / cell / method / str(seed)
    jobs: list[Job] = []
    model, last = folder / BASE / cell / "hf", len(stages) - 1
    for number, overrides in enumerate(stages):
        run_dir = home if number == last else home / f"stage{number}"
        settings = (
            "experiment=lab/train",
            *_data(cfg, folder, "training"),
            f"trainer.steps={cfg.steps // len(stages)}",
            *cfg.training[size],
            *(_placed(override, folder) for override in overrides),
            f"model.path={quoted(model)}",
            f"seed={seed * 100 + number}",  # the stages ask different questions
            "resume=auto",
            f"run_dir={quoted(run_dir)}",
        )
        jobs.append(Job("train", settings, run_dir))
        model = run_dir / "hf"
    outside = tuple(portion.task for portion in cfg.data.outside)
    jobs.append(_evaluation(cfg, folder, home, [one for stage in stages for one in stage], seed=1234))
    is_reference = stages == HPT
    return Run(method, cell, seed, home, tuple(jobs), _counts_of_base(folder, cell), outside, is_reference)


def _placed(override: str, folder: Path) -> str:
    """The override with the folder of questions in place of {data}."""
    key, _, value = override.partition("=")
    is_path = "{data}" in value
    return f"{key}={quoted(value.replace('{data}', str(folder / 'data')))}" if is_path else override


def _counts_of_base(folder: Path, cell: str) -> Path:
    return folder / BASE / cell / "eval" / COUNTS


def _evaluation(cfg: LabConfig, folder: Path, home: Path, overrides: Sequence[str], seed: int) -> Job:
    """pass@k of the run's model on the held-out questions, alike for every run but that responses may be as
    long as the overrides of its training let them be. The base has a seed of its own: what it solves in none
    of its samples, a model that is no better would miss in the same draws too."""
    given = dict(override.split("=", 1) for override in overrides)
    settings = (
        f"model={quoted(home / 'hf')}",
        f"benchmarks=[{quoted(_file(folder, 'heldout'))}]",
        f"k={cfg.samples}",
        f"seed={seed}",
        "temperature=1.0",
        "top_p=1.0",
        "template=plain",
        "kind=exact",
        "published=",
        "precision.dtype=fp32",
        f"max_new_tokens={given.get('rollout.max_new_tokens', 64)}",
        "max_sequences=512",
        "questions_per_batch=50",
        f"run_dir={quoted(home / 'eval')}",
    )
    return Job("eval", settings, home / "eval")


def _data(cfg: LabConfig, folder: Path, name: str) -> tuple[str, ...]:
    portions = _portions(cfg)
    return (
        f"data.train_file={quoted(_file(folder, name))}",
        f"data.train_questions={_count(portions[name])}",
        f"data.heldout_file={quoted(_file(folder, 'heldout'))}",
        f"data.heldout_questions={_count(portions['heldout'])}",
    )


def _portions(cfg: LabConfig) -> dict[str, list[Portion]]:
    data = cfg.data
    return dict(zip(SETS, (data.pretraining, data.training, [*data.heldout, *data.outside]), strict=True))


def _count(portions: list[Portion]) -> int:
    return sum(portion.count for portion in portions)


def _file(folder: Path, name: str) -> Path:
    return folder / "data" / f"{name}.jsonl"
