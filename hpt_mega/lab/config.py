"""The config of `hpt lab` (conf/lab), what may change between two calls on one folder, and its checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hpt_mega.config import ConfigError, changes, conf_dir, fit, read_yaml, save
from hpt_mega.files import OUTPUT_OF_JOBS, strangers
from hpt_mega.lab.exercises import KINDS, Portion
from hpt_mega.lab.models import FAMILIES, SIZES
from hpt_mega.suggestion import did_you_mean

# Overrides of `hpt train`, stage by stage, in which {data} is the folder of questions; the stages share the
# steps evenly.
Stages = list[list[str]]
Variants = dict[str, Stages]


@dataclass
class DataSets:
    """The exercises. No question is in two sets."""

    seed: int = 0
    pretraining: list[Portion] = field(default_factory=list)
    training: list[Portion] = field(default_factory=list)
    heldout: list[Portion] = field(default_factory=list)  # of the kinds and sizes of training
    outside: list[Portion] = field(default_factory=list)  # held out too: longer ones, other operations


@dataclass
class LabConfig:
    """A grid: every method on every model (family x size) with every seed."""

    seeds: list[int] = field(default_factory=list)
    families: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    steps: int = 60  # of optimisation, of every method; a variant of an ablation may have its own
    samples: int = 64  # a held-out question, for pass@k
    deadline_s: float = 1800.0  # of one model, one run or one evaluation
    data: DataSets = field(default_factory=DataSets)
    pretraining: dict[str, list[str]] = field(default_factory=dict)  # by size: overrides
    training: dict[str, list[str]] = field(default_factory=dict)  # by size: overrides of every method
    methods: dict[str, Any] = field(default_factory=dict)  # name: Stages
    ablations: dict[str, Any] = field(default_factory=dict)  # name: Variants, on the first family and size

    @property
    def cells(self) -> list[tuple[str, str]]:
        return [(family, size) for family in self.families for size in self.sizes]

    def only(self, sizes: list[str], seeds: list[int]) -> LabConfig:
        """The grid of some of its sizes and seeds, each once."""
        given: list[tuple[str, list[Any], list[Any]]] = [
            ("--sizes", sizes, self.sizes),
            ("--seeds", seeds, self.seeds),
        ]
        for option, chosen, known in given:
            if unknown := [one for one in chosen if one not in known]:
                raise ConfigError(
                    f"{option} {unknown[0]}: not in this lab; known: {', '.join(map(str, known))}"
                )
        return replace(self, sizes=list(dict.fromkeys(sizes)), seeds=list(dict.fromkeys(seeds)))

    def ablation(self, name: str) -> LabConfig:
        """The grid of an ablation: its variants in place of the methods, one family and size."""
        if name not in self.ablations:
            near = did_you_mean(name, self.ablations)
            raise ConfigError(
                f"--ablation {name}: no such ablation{near}; known: {', '.join(self.ablations)}"
            )
        return replace(self, methods=self.ablations[name], families=self.families[:1], sizes=self.sizes[:1])


FREE_TO_CHANGE = ("seeds", "families", "sizes", "deadline_s", "methods", "ablations")
KEPT = "lab.yaml"


def read(name: str) -> LabConfig:
    """conf/lab/NAME.yaml. Raises ConfigError where it does not fit."""
    cfg = _read(conf_dir() / "lab" / f"{name}.yaml")
    for key, given, known in (("families", cfg.families, FAMILIES), ("sizes", cfg.sizes, SIZES)):
        if unknown := [one for one in given if one not in known]:
            raise ConfigError(f"lab: {key} has {unknown[0]!r}, expected {' or '.join(known)}")
    for key, portion in _portions(cfg.data):
        if portion.kind not in KINDS:
            near = did_you_mean(portion.kind, KINDS)
            raise ConfigError(f"lab: {key}.kind is {portion.kind!r}, expected {' or '.join(KINDS)}{near}")
        if portion.size < 1:
            raise ConfigError(f"lab: {key}.size is {portion.size}, expected 1 or above")
    for key, by_size in (("pretraining", cfg.pretraining), ("training", cfg.training)):
        if missing := [size for size in cfg.sizes if size not in by_size]:
            raise ConfigError(f"lab: {key} has nothing for size {missing[0]!r}; name its overrides")
    for method, stages in {**cfg.methods, **_flat(cfg.ablations)}.items():
        if not stages or cfg.steps % len(stages):
            raise ConfigError(
                f"lab: {method} has {len(stages)} stages that share {cfg.steps} steps; expected a divisor"
            )
    return cfg


def keep(cfg: LabConfig, folder: Path) -> None:
    """Keep the config in the folder. Raises ConfigError where its runs were made with another one,
    or it holds files that are no lab's."""
    path = folder / KEPT
    if path.is_file() and (changed := changes(_read(path), cfg, FREE_TO_CHANGE)):
        raise ConfigError(
            f"{folder} holds runs of another lab ({'; '.join(changed)}); set another --out, or delete it"
        )
    if not path.is_file() and folder.is_dir() and (others := strangers(folder, OUTPUT_OF_JOBS)):
        raise ConfigError(
            f"{folder} holds {', '.join(others[:3])} and no {KEPT}, so that it is no lab's; set --out to a "
            "folder that is empty or does not exist"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save(cfg, path)


def _portions(data: DataSets) -> Iterator[tuple[str, Portion]]:
    for name in ("pretraining", "training", "heldout", "outside"):
        for number, portion in enumerate(getattr(data, name)):
            yield f"data.{name}.{number}", portion


def _flat(ablations: dict[str, Variants]) -> Variants:
    return {
        f"{name} {variant}": stages
        for name, variants in ablations.items()
        for variant, stages in variants.items()
    }


def _read(path: Path) -> LabConfig:
    return fit(LabConfig, str(path), *_layers(path))


def _layers(path: Path) -> list[DictConfig]:
    """The file, after the one beside it that it extends, if any."""
    given = read_yaml(path, "a lab as in conf/lab")
    parent = given.pop("extends", None)
    return [*(_layers(path.with_name(f"{parent}.yaml")) if parent else []), given]
