"""Conversion of whole checkpoints, Hugging Face to Megatron and back, a parameter at a time.

Files, formats and names are others' business; the command line is in command.py. No model is built here.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hpt_mega.checkpoint.hf import (
    INDEX,
    HFCheckpoint,
    HFWriter,
    check_tensors,
    config_dtype,
    copy_companions,
    read_config,
)
from hpt_mega.checkpoint.journal import Journal, resumable_folder
from hpt_mega.checkpoint.layout import TargetLayout
from hpt_mega.checkpoint.legacy import LegacyReader
from hpt_mega.checkpoint.megatron_folder import (
    COMPANIONS,
    RELEASE,
    TRACKER,
    companions_of,
    is_legacy,
    iteration_folder,
)
from hpt_mega.checkpoint.safetensors import checksum, raw_bytes
from hpt_mega.checkpoint.scratch import Scratch
from hpt_mega.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, extra_states, planned_chunks
from hpt_mega.checkpoint.workers import each_step
from hpt_mega.resharding.mapping import Entry, MappingError, ModelShape, family_for
from hpt_mega.resharding.mapping.fusion import Vocabulary
from hpt_mega.resharding.mapping.table import HF_EMBEDDING, HF_OUTPUT_LAYER, compare
from hpt_mega.spec import DTYPE_CODES, Spec

MANIFEST = "manifest.json"
Progress = Callable[[int, int], None]  # is told the bytes of each parameter when it is done, and of all
Finished = Callable[[Path], None]  # checks of the finished folder, before it takes its name


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    out: Path
    parameters: int
    nbytes: int
    seconds: float
    resumed: int  # parameters that an earlier, killed attempt had written
    left_out: list[str] = field(default_factory=list)


class MegatronSource(Protocol):
    """A Megatron checkpoint's parameters, whatever its format."""

    def spec(self, entry: Entry, shape: ModelShape) -> Spec: ...
    def whole(self, entry: Entry, shape: ModelShape) -> Tensor: ...
    def leftovers(self, entries: Iterable[Entry], shape: ModelShape) -> list[str]: ...


def hf_to_megatron(
    hf: Path,
    out: Path,
    layout: TargetLayout,
    progress: Progress,
    finished: Finished = lambda folder: None,
    processes: int = 1,
) -> Summary:
    """Write a Hugging Face folder as a Megatron checkpoint, which reads at any layout; cut for `layout`.

    Each of the `processes` holds one parameter at a time, and the files do not depend on their number.
    Raises MappingError where the folder's tensors are not those of its architecture, ValueError or OSError
    where a file is damaged, missing, or there is no room. `out` then does not appear.
    """
    begin = time.monotonic()
    source = HFCheckpoint(hf)
    family = family_for(source.config)
    shape = family.read_shape(source.config)
    layout.check(shape)
    left_out = check_tensors(source, family, shape)
    _check_second_copy(source, shape)
    entries = list(family.entries(shape))
    dtypes = {entry.megatron: _common_dtype(source, entry) for entry in entries}
    total = sum(source.spec(name).nbytes for entry in entries for name in entry.hf)
    _need_room(out, total)
    scratch = Scratch()
    with resumable_folder(out, _request(hf, layout)) as (folder, journal):
        resumed = len(journal.done)
        chunks = planned_chunks(entries, dtypes, shape, layout)
        writer = TorchDistWriter(folder / RELEASE, [chunk for its in chunks.values() for chunk in its])

        def convert(entry: Entry) -> dict[str, Any]:
            whole = scratch.empty(layout.whole_shape(entry, shape), dtypes[entry.megatron])
            tensors = entry.fusion.views(whole, shape)
            for name, tensor in zip(entry.hf, tensors, strict=True):
                source.read_into(name, tensor)
            if isinstance(entry.fusion, Vocabulary):
                whole[shape.vocab_size :] = 0
            pieces = layout.cut(entry, whole, shape)
            for chunk, (_, _, piece) in zip(chunks[entry.megatron], pieces, strict=True):
                writer.write(chunk, piece)
            return _describe(entry, tensors, shape)

        _each(entries, journal, convert, lambda done: progress(done, total), processes)
        records = [journal.done[entry.megatron] for entry in entries]
        about = {"family": family.name, "layout": asdict(layout), "source": str(hf), "left_out": left_out}
        common = {"checkpoint_version": 3.0, "iteration": 0, "hpt_mega": about}
        writer.finish(extra_states(entries, shape), common)
        (folder / TRACKER).write_text(RELEASE)
        _carry_along(source, folder / COMPANIONS)
        _write_manifest(folder, about, records)
        finished(folder)
    return Summary(out, len(entries), total, time.monotonic() - begin, resumed, left_out)


def megatron_to_hf(
    megatron: Path,
    out: Path,
    companions: Path | None,
    progress: Progress,
    finished: Finished = lambda folder: None,
    processes: int = 1,
) -> Summary:
    """Write a Megatron checkpoint as a Hugging Face folder, in the dtype it is stored in.

    `companions` is a folder with config.json and tokenizer, for a checkpoint that brings none along. Raises
    as hf_to_megatron does; also where a tensor is no longer what the checkpoint's manifest says.
    """
    begin = time.monotonic()
    source = open_megatron(megatron)
    companions = companions or _carried_along(megatron)
    config = read_config(companions)
    family = family_for(config)
    shape = family.read_shape(config)
    entries = list(family.entries(shape))
    compare(f"{family.name} table", (), "checkpoint", source.leftovers(entries, shape))
    specs = {name: spec for entry in entries for name, spec in _hf_specs(source, entry, shape).items()}
    total = sum(spec.nbytes for spec in specs.values())
    _need_room(out, total)
    known = _manifest_tensors(megatron)
    with resumable_folder(out, _request(megatron, companions)) as (folder, journal):
        resumed = len(journal.done)
        with HFWriter(folder, specs, weight_map=_weight_map(companions)) as writer:

            def convert(entry: Entry) -> dict[str, Any]:
                tensors = entry.fusion.views(source.whole(entry, shape), shape)
                described = _describe(entry, tensors, shape)
                _compare_with_manifest(described, known, megatron)
                for name, tensor in zip(entry.hf, tensors, strict=True):
                    writer.write(name, tensor)
                return described

            _each(entries, journal, convert, lambda done: progress(done, total), processes)
            writer.finish()
        copy_companions(companions, folder, specs[HF_EMBEDDING].dtype)
        if (companions / INDEX).is_file() and (folder / INDEX).is_file():
            shutil.copyfile(companions / INDEX, folder / INDEX)
        finished(folder)
    return Summary(out, len(entries), total, time.monotonic() - begin, resumed)


def verify(hf: Path, megatron: Path) -> None:
    """Read both sides anew and compare every tensor, bit by bit.

    Raises MappingError that lists the tensors that differ.
    """
    whole, source = HFCheckpoint(hf), open_megatron(megatron)
    family = family_for(whole.config)
    shape = family.read_shape(whole.config)
    different = []
    for entry in family.entries(shape):
        for name, tensor in zip(entry.hf, entry.fusion.split(source.whole(entry, shape), shape), strict=True):
            if not _same_bits(whole.tensor(name), tensor):
                different.append(name)
    if different:
        raise MappingError(f"{len(different)} tensors differ after conversion: {', '.join(different[:8])}")


def open_megatron(folder: Path) -> MegatronSource:
    """The parameters of a Megatron checkpoint: the folder itself, or the newest it keeps track of.

    Raises FileNotFoundError where there is none.
    """
    folder = iteration_folder(folder)
    return LegacyReader(folder) if is_legacy(folder) else TorchDistReader(folder)


def _carried_along(megatron: Path) -> Path:
    if companions := companions_of(megatron):
        return companions
    raise FileNotFoundError(
        f"{megatron} brings no {COMPANIONS}/config.json along; give --hf, the Hugging Face folder of the "
        "model it began from"
    )


def _each(
    entries: Iterable[Entry],
    journal: Journal,
    convert: Callable[[Entry], dict[str, Any]],
    done: Callable[[int], None],
    processes: int,
) -> None:
    """Convert what the journal does not say is done, and tell how many bytes are."""
    by_name = {entry.megatron: entry for entry in entries}
    for name in by_name.keys() & journal.done.keys():
        done(_bytes_of(journal.done[name]))
    missing = [name for name in by_name if name not in journal.done]
    for name, record in each_step(missing, lambda name: convert(by_name[name]), processes):
        journal.add(name, record)
        done(_bytes_of(record))


def _bytes_of(record: dict[str, Any]) -> int:
    return sum(tensor["nbytes"] for tensor in record.values())


def _common_dtype(source: HFCheckpoint, entry: Entry) -> torch.dtype:
    dtypes = {name: source.spec(name).dtype for name in entry.hf}
    if len(set(dtypes.values())) > 1:
        kinds = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise MappingError(f"tensors of one Megatron parameter have several dtypes: {kinds}")
    return dtypes[entry.hf[0]]


def _hf_specs(source: MegatronSource, entry: Entry, shape: ModelShape) -> dict[str, Spec]:
    spec = source.spec(entry, shape)
    rows, *others = expected = entry.fusion.fused_shape(entry.hf_shapes(shape).values())
    padded = isinstance(entry.fusion, Vocabulary) and spec.shape[0] > rows and [*spec.shape[1:]] == others
    if not padded and expected != spec.shape:
        raise MappingError(
            f"{entry.te} is {list(spec.shape)} in the checkpoint, expected {list(expected)} by the config"
        )
    return {name: Spec(spec.dtype, sizes) for name, sizes in entry.hf_shapes(shape).items()}


def _describe(entry: Entry, tensors: list[Tensor], shape: ModelShape) -> dict[str, Any]:
    return {
        name: {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(sizes),
            "nbytes": tensor.nbytes,
            "xxh3": checksum(tensor),
        }
        for (name, sizes), tensor in zip(entry.hf_shapes(shape).items(), tensors, strict=True)
    }


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return raw_bytes(left) == raw_bytes(right)


def _check_second_copy(source: HFCheckpoint, shape: ModelShape) -> None:
    if not (shape.tied and HF_OUTPUT_LAYER in source.names()):
        return
    if not _same_bits(source.tensor(HF_OUTPUT_LAYER), source.tensor(HF_EMBEDDING)):
        raise MappingError(
            f"tie_word_embeddings is true in config.json and {HF_OUTPUT_LAYER} is not {HF_EMBEDDING}; set it "
            "to false, or remove the tensor"
        )


def _carry_along(source: HFCheckpoint, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    copy_companions(source.folder, folder, config_dtype(source.config))
    if (source.folder / INDEX).is_file():  # so that the way back gives tensors their files
        shutil.copyfile(source.folder / INDEX, folder / INDEX)


def _weight_map(companions: Path) -> dict[str, str] | None:
    index = companions / INDEX
    if not index.is_file():
        return None
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return weight_map


def _write_manifest(folder: Path, about: dict[str, Any], records: list[dict[str, Any]]) -> None:
    tensors = {name: tensor for record in records for name, tensor in record.items()}
    (folder / MANIFEST).write_text(json.dumps({**about, "tensors": tensors}, indent=1) + "\n")


def _manifest_tensors(megatron: Path) -> dict[str, Any]:
    manifest = megatron / MANIFEST
    if not manifest.is_file():
        return {}
    tensors: dict[str, Any] = json.loads(manifest.read_text())["tensors"]
    return tensors


def _compare_with_manifest(given: dict[str, Any], known: dict[str, Any], megatron: Path) -> None:
    if changed := [name for name, about in given.items() if known.get(name, about) != about]:
        raise ValueError(
            f"{', '.join(changed)} in {megatron} are not what {MANIFEST} says was written; the checkpoint is "
            f"damaged: copy it again. If it was changed on purpose, remove {MANIFEST}"
        )


def _need_room(out: Path, nbytes: int) -> None:
    parent = next(path for path in out.absolute().parents if path.exists())
    partial = out.absolute().with_name(f".{out.name}.partial")
    written = sum(path.stat().st_blocks * 512 for path in partial.rglob("*")) if partial.is_dir() else 0
    if (free := shutil.disk_usage(parent).free + written) < nbytes:
        raise OSError(
            f"{parent} has {free / 1e9:.2f} GB free and the checkpoint needs {nbytes / 1e9:.2f} GB; make "
            "room, or choose another --out"
        )


def _request(*what: Path | TargetLayout) -> list[Any]:
    """What an earlier attempt must have been asked for, for this one to go on with it."""
    described: list[Any] = []
    for item in what:
        if isinstance(item, TargetLayout):
            described.append(asdict(item))
            continue
        files = sorted(path for path in item.rglob("*") if path.is_file())
        stats = [
            [str(path.relative_to(item)), path.stat().st_size, path.stat().st_mtime_ns] for path in files
        ]
        described.append([str(item.absolute()), stats])
    return described
