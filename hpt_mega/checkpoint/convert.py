"""Conversion of whole checkpoints, Hugging Face to Megatron and back, a parameter at a time.

Files, formats and names are others' business; the command line is in command.py. No model is built here.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hpt_mega.checkpoint.hf import INDEX, HFCheckpoint, HFWriter, config_dtype, copy_companions, read_config
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
from hpt_mega.checkpoint.safetensors import DTYPE_CODES, Spec, raw_bytes
from hpt_mega.checkpoint.torch_dist import (
    Chunk,
    TorchDistReader,
    TorchDistWriter,
    extra_states,
    stored_as,
)
from hpt_mega.resharding.mapping import Entry, MappingError, ModelShape, family_for
from hpt_mega.resharding.mapping.fusion import Vocabulary, padded_vocab_size
from hpt_mega.resharding.mapping.table import HF_EMBEDDING, HF_OUTPUT_LAYER, compare

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
    hf: Path, out: Path, layout: TargetLayout, progress: Progress, finished: Finished = lambda folder: None
) -> Summary:
    """Write a Hugging Face folder as a Megatron checkpoint, which reads at any layout; cut for `layout`.

    Raises MappingError where the folder's tensors are not those of its architecture, ValueError or OSError
    where a file is damaged, missing, or there is no room. `out` then does not appear.
    """
    begin = time.monotonic()
    source = HFCheckpoint(hf)
    family = family_for(source.config)
    shape = family.read_shape(source.config)
    layout.check(shape)
    left_out = source.further_token_layers(shape.num_layers)
    family.check_names(shape, set(source.names()) - set(left_out))
    family.check_shapes(shape, lambda name: source.spec(name).shape)
    _check_second_copy(source, shape)
    entries = list(family.entries(shape))
    total = sum(source.spec(name).nbytes for entry in entries for name in entry.hf)
    _need_room(out, total)
    with resumable_folder(out, _request(hf, layout)) as (folder, journal):
        resumed = len(journal.done)
        chunks = [Chunk(**chunk) for record in journal.done.values() for chunk in record["chunks"]]
        writer = TorchDistWriter(folder / RELEASE, chunks)

        def convert(entry: Entry) -> dict[str, Any]:
            tensors = [source.tensor(name) for name in entry.hf]
            written = _write_entry(writer, entry, tensors, shape, layout)
            return {"chunks": [asdict(chunk) for chunk in written], "tensors": _describe(entry, tensors)}

        _each(entries, journal, convert, lambda done: progress(done, total))
        records = [journal.done[entry.megatron] for entry in entries]
        written = [Chunk(**chunk) for record in records for chunk in record["chunks"]]
        about = {"family": family.name, "layout": asdict(layout), "source": str(hf), "left_out": left_out}
        common = {"checkpoint_version": 3.0, "iteration": 0, "hpt_mega": about}
        writer.finish(written, extra_states(entries, shape), common)
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
                tensors = entry.fusion.split(source.whole(entry, shape), shape)
                described = _describe(entry, tensors)
                _compare_with_manifest(described, known, megatron)
                for name, tensor in zip(entry.hf, tensors, strict=True):
                    writer.write(name, tensor)
                return {"tensors": described}

            _each(entries, journal, convert, lambda done: progress(done, total))
            writer.finish()
        copy_companions(companions, folder, specs[HF_EMBEDDING].dtype)
        if (companions / INDEX).is_file() and (folder / INDEX).is_file():
            shutil.copy2(companions / INDEX, folder / INDEX)
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
) -> None:
    for entry in entries:
        if entry.megatron not in journal.done:
            journal.add(entry.megatron, convert(entry))
        done(sum(tensor["nbytes"] for tensor in journal.done[entry.megatron]["tensors"].values()))


def _write_entry(
    writer: TorchDistWriter, entry: Entry, tensors: list[Tensor], shape: ModelShape, layout: TargetLayout
) -> Iterator[Chunk]:
    if len({tensor.dtype for tensor in tensors}) > 1:
        kinds = ", ".join(f"{name} {tensor.dtype}" for name, tensor in zip(entry.hf, tensors, strict=True))
        raise MappingError(f"tensors of one Megatron parameter have several dtypes: {kinds}")
    blocks = entry.fusion.fused_blocks(tensors, shape)
    stored = stored_as(entry, shape, stacked=shape.is_homogeneous)
    ranks = layout.files(entry, shape)
    total = list(blocks[0].shape)
    if entry.fusion.dim is not None:
        total[entry.fusion.dim] *= len(blocks)
    if isinstance(entry.fusion, Vocabulary):
        total[0] = padded_vocab_size(total[0], len(ranks))
    for rank in range(len(ranks) if entry.fusion.dim is not None else 1):
        for start, piece in entry.fusion.pieces(blocks, rank, len(ranks)):
            at = [start if dim == entry.fusion.dim else 0 for dim in range(len(total))]
            yield writer.append(ranks[rank], stored, total, at, piece)


def _hf_specs(source: MegatronSource, entry: Entry, shape: ModelShape) -> dict[str, Spec]:
    spec = source.spec(entry, shape)
    blank = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    expected = [torch.empty(sizes, device="meta") for sizes in entry.hf_shapes(shape).values()]
    padded = isinstance(entry.fusion, Vocabulary) and len(blank) > shape.vocab_size
    if not padded and (whole := entry.fusion.fuse(expected, shape)).shape != blank.shape:
        raise MappingError(
            f"{entry.te} is {list(blank.shape)} in the checkpoint, expected {list(whole.shape)} by the config"
        )
    return {
        name: Spec.of(tensor) for name, tensor in zip(entry.hf, entry.fusion.split(blank, shape), strict=True)
    }


def _describe(entry: Entry, tensors: list[Tensor]) -> dict[str, Any]:
    return {
        name: {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "nbytes": tensor.nbytes,
            "crc32": checksum(tensor),
        }
        for name, tensor in zip(entry.hf, tensors, strict=True)
    }


def checksum(tensor: Tensor) -> str:
    """Against damage, not forgery: several times faster than disks, which a cryptographic one is not."""
    return f"{zlib.crc32(raw_bytes(tensor)):08x}"


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
        shutil.copy2(source.folder / INDEX, folder / INDEX)


def _weight_map(companions: Path) -> dict[str, str] | None:
    index = companions / INDEX
    if not index.is_file():
        return None
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return weight_map


def _write_manifest(folder: Path, about: dict[str, Any], records: list[dict[str, Any]]) -> None:
    tensors = {name: tensor for record in records for name, tensor in record["tensors"].items()}
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
