"""Megatron's distributed checkpoint format (torch_dist), written and read a tensor at a time without a model.

One process writes what megatron-core's dist_checkpointing.load reads at any layout. The legacy format is in
legacy.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hpt_mega.checkpoint.layout import TargetLayout
from hpt_mega.checkpoint.megatron_folder import TORCH_DIST
from hpt_mega.checkpoint.safetensors import member, read_into, write_bytes, write_from
from hpt_mega.checkpoint.scratch import Scratch
from hpt_mega.resharding.mapping import Entry, MappingError, ModelShape
from hpt_mega.spec import Spec

FORMAT_FILE = "metadata.json"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# tensors of a training run's state that are no weights
_NOT_WEIGHTS = ("optimizer.", "chained_", "critic.")
# a layer with experts under megatron-core's own spec: its norm has the name of a dense layer's
_NORM_OF_LOCAL_MIXTURE = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


@dataclass(frozen=True)
class Stored:
    """Where the format keeps a parameter: a key, and indices along axes put before the parameter's own.

    Layers that are all alike share one key and are stacked along its first axis; so are experts.
    """

    key: str
    at: tuple[int, ...]
    counts: tuple[int, ...]


def stored_as(entry: Entry, shape: ModelShape, *, stacked: bool, te: bool = True) -> Stored:
    """The place of a parameter; `te` says by which layer spec it is named.

    Megatron stores its own layer spec's parameters under Transformer Engine's names, so that either spec
    reads what the other wrote.
    """
    pattern = entry.row.megatron
    at: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    if te and entry.expert is None and entry.row.te:
        pattern = entry.row.te
    if entry.layer is not None and stacked:
        pattern = pattern.replace("{layer}.", "")
        at, counts = (entry.layer,), (shape.num_layers,)
    if entry.expert is not None and shape.experts:
        pattern = pattern.replace("local_experts.{expert}", "experts")
        at, counts = (*at, entry.expert), (*counts, shape.experts.count)
    return Stored(pattern.format(layer=entry.layer), at, counts)


@dataclass(frozen=True)
class Chunk:
    """A rectangular part of a key's tensor, and the bytes of a file that hold it."""

    key: str
    total: tuple[int, ...]
    dtype: str
    at: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


def planned_chunks(
    entries: Iterable[Entry], dtypes: Mapping[str, torch.dtype], shape: ModelShape, layout: TargetLayout
) -> dict[str, list[Chunk]]:
    """Where each parameter's pieces go, in the order of TargetLayout.cut; files are filled in entries' order.

    `dtypes` gives the dtype of each parameter, by its name under the local spec.
    """
    ends: dict[str, int] = defaultdict(int)
    planned: dict[str, list[Chunk]] = {}
    for entry in entries:
        stored = stored_as(entry, shape, stacked=shape.is_homogeneous)
        dtype = dtypes[entry.megatron]
        blank = torch.empty(layout.whole_shape(entry, shape), dtype=dtype, device="meta")
        planned[entry.megatron] = []
        for rank, at, piece in layout.cut(entry, blank, shape):
            file = f"__{rank}_0.distcp"
            sizes = (*(1 for _ in stored.at), *piece.shape)
            length = sum(map(len, _frame(sizes, dtype))) + piece.nbytes
            planned[entry.megatron].append(
                Chunk(
                    key=stored.key,
                    total=(*stored.counts, *blank.shape),
                    dtype=str(dtype).removeprefix("torch."),
                    at=(*stored.at, *at),
                    sizes=sizes,
                    file=file,
                    offset=ends[file],
                    length=length,
                )
            )
            ends[file] += length
    return planned


class TorchDistWriter:
    """Fills the files of a checkpoint, whose chunks are known beforehand, in any order.

    Several writers, one after another or in several processes, may fill the same folder.
    """

    def __init__(self, folder: Path, chunks: Sequence[Chunk]) -> None:
        self._folder = folder
        self._chunks = chunks
        folder.mkdir(exist_ok=True)
        self._files = {
            name: (folder / name).open("r+b" if (folder / name).exists() else "w+b", buffering=0)
            for name in dict.fromkeys(chunk.file for chunk in chunks)
        }

    def write(self, chunk: Chunk, piece: Tensor) -> None:
        """Write one piece, as torch.save would, but without the archive's checksum, which torch.load does not
        read."""
        file = self._files[chunk.file]
        head, tail = _frame(chunk.sizes, piece.dtype)
        end = write_from(file, piece, write_bytes(file, head, chunk.offset))
        assert write_bytes(file, tail, end) == chunk.offset + chunk.length

    def finish(self, objects: Iterable[str], common: dict[str, Any]) -> None:
        """Write everything that is not weights: the objects (all None), the description, `common`.

        To be called once, by one writer, when all chunks are written.
        """
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for chunk in self._chunks:
            properties = TensorProperties(dtype=getattr(torch, chunk.dtype))
            about = tensors.setdefault(
                chunk.key, TensorStorageMetadata(properties, torch.Size(chunk.total), [])
            )
            if (about.size, about.properties.dtype) != (torch.Size(chunk.total), properties.dtype):
                raise MappingError(
                    f"{chunk.key} is {list(about.size)} of {about.properties.dtype} in one layer and "
                    f"{list(chunk.total)} of {properties.dtype} in another; Megatron stacks layers, "
                    "and needs them alike"
                )
            about.chunks.append(ChunkStorageMetadata(torch.Size(chunk.at), torch.Size(chunk.sizes)))
            storage[MetadataIndex(chunk.key, chunk.at)] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
        for name, info in self._write_objects(objects):
            tensors[name] = BytesStorageMetadata()
            storage[MetadataIndex(name)] = info
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        torch.save(common, self._folder / "common.pt")
        (self._folder / FORMAT_FILE).write_text(json.dumps(_FORMAT))
        with (self._folder / TORCH_DIST).open("wb") as description:
            pickle.dump(Metadata(tensors, planner_data=None, storage_data=storage), description)

    def _write_objects(self, names: Iterable[str]) -> Iterator[tuple[str, _StorageInfo]]:
        nothing = io.BytesIO()
        torch.save([None], nothing)
        info = _StorageInfo("__0_1.distcp", 0, len(nothing.getvalue()))
        (self._folder / info.relative_path).write_bytes(nothing.getvalue())
        for name in names:
            yield name, info


class _Gap:
    """A file for torch.save without data: keeps what comes before the data's place and after it."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self.parts = [bytearray()]

    def write(self, data: bytes | memoryview) -> int:
        self.parts[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int) -> None:
        assert (offset, whence) == (self._nbytes, os.SEEK_CUR), "torch.save moves in another way"
        self.parts.append(bytearray())

    def flush(self) -> None: ...


@lru_cache(maxsize=4096)  # a mixture's experts are all alike
def _frame(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save puts before a tensor's bytes and after them."""
    blank = torch.empty(sizes, dtype=dtype)  # none of its pages is ever touched
    gap = _Gap(blank.nbytes)
    with torch.serialization.skip_data():
        torch.save(blank, gap)  # type: ignore[arg-type]
    head, tail = gap.parts
    return bytes(head), bytes(tail)


def extra_states(entries: Iterable[Entry], shape: ModelShape) -> Iterator[str]:
    """Names of the objects that layers ask a checkpoint for beside their weights (FP8 scales; here: none).

    Either layer spec finds those it asks for among them.
    """
    modules: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for entry in entries:
        if entry.layer is None:
            continue
        stored = stored_as(entry, shape, stacked=shape.is_homogeneous)
        modules[stored.key.rpartition(".")[0], stored.at] = stored.counts
        layer, attention, _ = stored.key.partition(".self_attention.")
        if attention:
            modules[f"{layer}.self_attention.core_attention", stored.at] = stored.counts
    modules["decoder.final_layernorm", ()] = ()
    for (module, at), counts in modules.items():
        index = ".".join(map(str, at or (0,)))
        size = ".".join(map(str, counts or (1,)))
        yield f"{module}._extra_state/shard_{index}_{size}"


class TorchDistReader:
    """The parameters of a checkpoint in this format, whoever wrote it. Nothing is read ahead.

    Raises ValueError where the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._scratch = Scratch()
        self._metadata = _read_metadata(folder / TORCH_DIST)
        self._places: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = {}

    def spec(self, entry: Entry, shape: ModelShape) -> Spec:
        """The whole parameter without its data. Raises MappingError where the checkpoint has none."""
        stored = self._find(entry, shape)
        about = self._tensors()[stored.key]
        return Spec(about.properties.dtype, tuple(about.size[len(stored.at) :]))

    def whole(self, entry: Entry, shape: ModelShape) -> Tensor:
        """The whole parameter, put together from its chunks."""
        stored, spec = self._find(entry, shape), self.spec(entry, shape)
        out, filled = self._scratch.empty(spec.shape, spec.dtype), 0
        for chunk in self._chunks(stored):
            target = out
            for dim, start in enumerate(chunk.offsets[len(stored.at) :], start=len(stored.at)):
                target = target.narrow(dim - len(stored.at), start, chunk.sizes[dim])
            self._read(stored.key, chunk, target)
            filled += target.numel()
        if filled != out.numel():
            raise ValueError(
                f"{self._folder} holds {filled} of {out.numel()} values of {stored.key} {list(stored.at)}"
            )
        return out

    def leftovers(self, entries: Iterable[Entry], shape: ModelShape) -> list[str]:
        """Weights that no entry of the model asks for."""
        asked = {self._find(entry, shape).key for entry in entries}
        return [key for key in self._tensors() if key not in asked and not key.startswith(_NOT_WEIGHTS)]

    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        return {
            key: about
            for key, about in self._metadata.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata)
        }

    def _find(self, entry: Entry, shape: ModelShape) -> Stored:
        """Under one of the names Megatron gives it: by its version and settings, layers are stacked or not,
        and norms keep their own name."""
        candidates = [
            stored_as(entry, shape, stacked=stacked, te=te)
            for stacked in (True, False)
            for te in (True, False)
        ]
        candidates += [replace(one, key=one.key.replace(*_NORM_OF_LOCAL_MIXTURE)) for one in candidates]
        for stored in candidates:
            if isinstance(self._metadata.state_dict_metadata.get(stored.key), TensorStorageMetadata):
                return stored
        raise MappingError(
            f"{self._folder} holds no {candidates[0].key}, which {' + '.join(entry.hf)} would be made of; is "
            "it a checkpoint of this model?"
        )

    def _chunks(self, stored: Stored) -> list[ChunkStorageMetadata]:
        if not self._places:
            for key, about in self._tensors().items():
                for chunk in about.chunks:
                    for prefix in range(3):  # axes before the parameter's own: none, layers, experts too
                        at = tuple(chunk.offsets[:prefix])
                        self._places.setdefault((key, at), []).append(chunk)
        return self._places.get((stored.key, stored.at), [])

    def _read(self, key: str, chunk: ChunkStorageMetadata, target: Tensor) -> None:
        """Fill `target` with a chunk, straight from the file where both lie in row order."""
        info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = member(self._folder, info.relative_path)
        with path.open("rb", buffering=0) as file:
            if info.offset + info.length > path.stat().st_size:
                raise ValueError(
                    f"{path} ends at {path.stat().st_size} bytes, {key} at {info.offset + info.length}; the "
                    "file is cut off: copy it again"
                )
            try:
                blank, begin = _open_archive(_Window(file, info.offset, info.length))
            except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
                raise ValueError(f"{path} is damaged where {key} should be: {error}") from None
            storage = torch.empty(0, dtype=torch.uint8).set_(blank.untyped_storage())
            alike = blank.dtype is target.dtype and blank.nbytes == len(storage) == target.nbytes
            if alike and blank.is_contiguous():
                read_into(file, target, info.offset + begin)
            else:
                read_into(file, storage, info.offset + begin)
                target.copy_(blank.view(target.shape))


def _open_archive(window: _Window) -> tuple[Tensor, int]:
    """The tensor that torch.save put there, its data still unread, and where in the window the data begin."""
    with torch.serialization.skip_data():
        blank: Tensor = torch.load(window, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    with zipfile.ZipFile(window) as archive:
        (record,) = (record for record in archive.infolist() if record.filename.endswith("/data/0"))
    window.seek(record.header_offset)
    header = window.read(_LOCAL_HEADER) or b""
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return blank.detach(), record.header_offset + _LOCAL_HEADER + name + extra


_LOCAL_HEADER = 30  # bytes of a zip record's header before its name


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, read straight into the buffer it is asked to fill."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._position = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        count = os.preadv(self._file.fileno(), [view], self._begin + self._position) if view else 0
        self._position += count
        return count


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there; expected a torch_dist checkpoint folder") from None
    except (EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or no description of a checkpoint: {error}") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds a {type(metadata).__name__}, expected torch's checkpoint Metadata")
    return metadata


class _Unknown:
    """Stands for classes of the plans that megatron-core leaves in the file; none is needed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class _MetadataUnpickler(pickle.Unpickler):
    """Builds plain descriptions only: a checkpoint from elsewhere must not run code here.

    What may be built is listed by its full name. A module's name says nothing: every class that it imports
    can be reached through it.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "megatron" or module == "torch.distributed.checkpoint.planner":
            return _Unknown
        if module == "torch" and isinstance(found := getattr(torch, name, None), _TORCH_VALUES):
            return found
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no description needs")


_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)
_HARMLESS = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
