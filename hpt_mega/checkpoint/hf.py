"""Hugging Face model folders as files: tensors read one at a time, folders written shard by shard.

What the tensors mean is in resharding/mapping; how they get into and out of a model is in weights.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class HFCheckpoint:
    """A folder with config.json and safetensors, one file or many with an index. Nothing is read ahead.

    Raises FileNotFoundError where a part is missing, ValueError where the index names an absent file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._file_of = self._locate()
        self._open: tuple[Path, Any] | None = None

    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in. Raises KeyError for an unknown name."""
        path = self._file_of[name]
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt"))
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor

    def _locate(self) -> dict[str, Path]:
        index = self.folder / _INDEX
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            if absent := {file for file in weight_map.values() if not (self.folder / file).is_file()}:
                raise ValueError(f"{index} names files that are not there: {', '.join(sorted(absent))}")
            return {name: self.folder / file for name, file in weight_map.items()}
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{self.folder} holds no *.safetensors")
        found: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), path)
        return found


class HFWriter:
    """Collects tensors and writes a safetensors file whenever `shard_bytes` of them are at hand."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, give the files their final names, and add the index where there are several."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._partial(0).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._partial(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        # a tensor that shares memory with another (a view) would be refused: each gets its own
        owned = {name: tensor.clone() for name, tensor in self._pending.items()}
        save_file(owned, self._partial(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _partial(self, number: int) -> Path:
        return self._folder / f"shard{number}.partial"


@contextmanager
def writing_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` once the block ends without an error."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_companions(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Bring along all that is not weights: config.json (with the new dtype), tokenizer, generation config,
    chat template."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != _INDEX:
            shutil.copy2(path, out / path.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # the name of the key before transformers 5
    config["dtype"] = _DTYPE_NAMES[dtype]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
