"""Hugging Face model folders as files: tensors read one at a time, and written one at a time in any order.

What the tensors mean is in resharding/mapping; how they get into and out of a model is in weights.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hpt_mega.checkpoint.fp8 import SCALE_SUFFIX, dequantize
from hpt_mega.checkpoint.safetensors import (
    Slot,
    header_of,
    member,
    read_header,
    read_into,
    write_from,
)
from hpt_mega.checkpoint.scratch import Scratch
from hpt_mega.resharding.mapping import Family, ModelShape
from hpt_mega.spec import Spec

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 1000**3
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_FP8_BLOCK = (128, 128)
_COMPANIONS = (".json", ".jinja", ".txt", ".model")


class HFCheckpoint:
    """A folder with config.json and safetensors, one file or many with an index. Nothing is read ahead.

    FP8 weights with block scales read as the config's dtype (bf16 where it names none); their scales are no
    tensors of their own. Raises FileNotFoundError where a part is missing, ValueError where one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._scratch = Scratch()
        self.config = read_config(folder)
        self._slots = self._locate()
        self._open: tuple[Path, BinaryIO] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return config_dtype(self.config)

    def names(self) -> list[str]:
        return [name for name in self._slots if not self._is_scale(name)]

    def spec(self, name: str) -> Spec:
        """What tensor() gives, without its data. Raises KeyError for an unknown name."""
        spec = self._slots[name][1].spec
        return Spec(self.dtype, spec.shape) if self._is_quantized(name) else spec

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in. Raises as read_into does."""
        spec = self.spec(name)
        target = self._scratch.empty(spec.shape, spec.dtype)
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: Tensor) -> None:
        """Read one tensor into memory of its dtype on the CPU; its rows may be in groups, as in Fusion.views.

        Raises KeyError for an unknown name, ValueError for a dtype that is no weight's.
        """
        spec = self.spec(name)
        assert spec.fits(target)
        if self._is_quantized(name):
            quantization = self.config.get("quantization_config") or {}
            block = tuple(quantization.get("weight_block_size") or _FP8_BLOCK)
            whole = dequantize(self._stored(name), self._stored(name + SCALE_SUFFIX), block, self.dtype)
            target.copy_(whole.view(target.shape))
            return
        if spec.dtype not in (self.dtype, torch.float32):
            raise ValueError(
                f"{name} is stored as {spec.dtype} and config.json says {self.dtype}; expected that or "
                "torch.float32. Correct the config's dtype, or copy the file again"
            )
        self._fill(name, target)

    def _stored(self, name: str) -> Tensor:
        spec = self._slots[name][1].spec
        target = self._scratch.empty(spec.shape, spec.dtype)
        self._fill(name, target)
        return target

    def _fill(self, name: str, target: Tensor) -> None:
        path, slot = self._slots[name]
        if self._open is None or self._open[0] != path:
            if self._open:
                self._open[1].close()
            self._open = (path, path.open("rb", buffering=0))
        assert self._open is not None
        read_into(self._open[1], target, slot.offset)

    def _is_quantized(self, name: str) -> bool:
        return self._slots[name][1].spec.dtype is torch.float8_e4m3fn and name + SCALE_SUFFIX in self._slots

    def _is_scale(self, name: str) -> bool:
        return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self._slots

    def _locate(self) -> dict[str, tuple[Path, Slot]]:
        index = self.folder / INDEX
        if not index.is_file():
            return self._locate_without_index()
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = {file: member(self.folder, file) for file in dict.fromkeys(weight_map.values())}
        if absent := [file for file, path in files.items() if not path.is_file()]:
            raise FileNotFoundError(f"{index} names files that are not there: {', '.join(sorted(absent))}")
        found = {name: (path, slot) for path in files.values() for name, slot in read_header(path).items()}
        if unlisted := weight_map.keys() ^ found.keys():
            raise ValueError(
                f"{index} and its files do not name the same tensors; only in one of them: "
                f"{', '.join(sorted(unlisted)[:8])}. Copy the folder again"
            )
        return found

    def _locate_without_index(self) -> dict[str, tuple[Path, Slot]]:
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{self.folder} holds no *.safetensors")
        if len(files) > 1:
            raise FileNotFoundError(
                f"{self.folder} holds {len(files)} *.safetensors and no {INDEX}; copy the index too, or "
                "remove the files that are not the model's"
            )
        return {name: (files[0], slot) for name, slot in read_header(files[0]).items()}


def check_tensors(checkpoint: HFCheckpoint, family: Family, shape: ModelShape) -> list[str]:
    """Compare a folder with the family's table; returns the tensors that are left in it, which no policy has.

    They are those of the layers after the decoder's that predict further tokens (DeepSeek's). Raises
    MappingError where the others are not the table's, or have another shape than config.json asks for.
    """
    count = checkpoint.config.get("num_nextn_predict_layers") or 0
    further = range(shape.num_layers, shape.num_layers + count)
    prefixes = tuple(f"model.layers.{layer}." for layer in further)
    left_out = [name for name in checkpoint.names() if name.startswith(prefixes)]
    family.check_names(shape, set(checkpoint.names()) - set(left_out))
    family.check_shapes(shape, lambda name: checkpoint.spec(name).shape)
    return left_out


class HFWriter:
    """Writes a folder's safetensors, whose tensors are known beforehand, a tensor at a time in any order.

    Several writers, one after another or in several processes, may fill the same folder. `weight_map` gives
    tensors their files; without one they are put into files of `shard_bytes`. Raises ValueError where it
    names a file outside the folder.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Spec],
        weight_map: Mapping[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if weight_map is None or weight_map.keys() != tensors.keys():
            weight_map = _weight_map(tensors, shard_bytes)
        self._folder = folder
        self._weight_map = weight_map
        self._tensors = tensors
        self._slots: dict[str, Slot] = {}
        self._files: dict[str, BinaryIO] = {}
        paths = {file: member(folder, file) for file in weight_map.values()}
        for file, path in paths.items():
            its = {name: tensors[name] for name, its_file in weight_map.items() if its_file == file}
            header, slots = header_of(its)
            size = len(header) + sum(spec.nbytes for spec in its.values())
            self._files[file] = self._open(path, header, size)
            self._slots |= slots

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            if kind is None:
                os.fsync(file.fileno())
            file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Its rows may be in groups, as in Fusion.views. Raises ValueError for another dtype or shape than
        planned."""
        slot = self._slots[name]
        if not slot.spec.fits(tensor):
            raise ValueError(f"{name} is {Spec.of(tensor)}, expected {slot.spec}")
        write_from(self._files[self._weight_map[name]], tensor, slot.offset)

    def finish(self) -> None:
        """Add the index, where there are several files; to be called once, by one writer."""
        if len(self._files) > 1:
            total = sum(spec.nbytes for spec in self._tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(self._weight_map)}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @staticmethod
    def _open(path: Path, header: bytes, size: int) -> BinaryIO:
        file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        os.ftruncate(file.fileno(), size)  # whatever an earlier attempt has left
        os.pwrite(file.fileno(), header, 0)
        return file


def _weight_map(tensors: Mapping[str, Spec], shard_bytes: int) -> dict[str, str]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    if len(shards) == 1:
        return dict.fromkeys(shards[0], "model.safetensors")
    count = len(shards)
    return {
        name: f"model-{number:05d}-of-{count:05d}.safetensors"
        for number, names in enumerate(shards, start=1)
        for name in names
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, its sizes numbers. Raises FileNotFoundError or ValueError that name it."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; expected a Hugging Face model folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected a JSON object")
    for key in _COUNTS:
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{path}: {key} is {value!r}; expected a whole number")
    return config


_COUNTS = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "sliding_window"),
    *("q_lora_rank", "kv_lora_rank", "num_nextn_predict_layers"),
)


def with_context(
    config: Mapping[str, Any], rope_theta: float = 0.0, max_positions: int = 0
) -> dict[str, Any]:
    """The config with another rotary base and number of positions, where they are not 0."""
    changed = dict(config)
    if rope_theta:
        changed["rope_theta"] = rope_theta
        for key in ("rope_parameters", "rope_scaling"):
            if isinstance(changed.get(key), Mapping):
                changed[key] = {**changed[key], "rope_theta": rope_theta}
    if max_positions:
        changed["max_position_embeddings"] = max_positions
    return changed


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype a config.json names (`torch_dtype` before transformers 5); bf16 where it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r} in config.json; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def copy_companions(source: Path, out: Path, dtype: torch.dtype, **context: Any) -> None:
    """Bring along all that is not weights: config.json, tokenizer, generation config, chat template.

    config.json changes only where the weights are of another dtype than it says, or no longer quantised, and
    by `context`, as in with_context.
    """
    for path in source.iterdir():
        if path.is_file() and path.suffix in _COMPANIONS and path.name != INDEX:
            shutil.copyfile(path, out / path.name)  # not its mode: config.json is written again
    given = read_config(source)
    config = with_context(given, **context)
    if config_dtype(config) is dtype and "quantization_config" not in config and config == given:
        return
    for key in ("torch_dtype", "quantization_config"):
        config.pop(key, None)
    config["dtype"] = DTYPE_NAMES[dtype]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
