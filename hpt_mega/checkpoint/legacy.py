"""Megatron's legacy checkpoints (mp_rank_XX folders, one file a rank), read a tensor at a time.

They are read only; what is written is the format of torch_dist.py.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpt_mega.checkpoint.megatron_folder import LEGACY_RANK
from hpt_mega.resharding.mapping import Entry, MappingError, ModelShape
from hpt_mega.resharding.mapping.table import EMBEDDING, OUTPUT_LAYER, canonical_name
from hpt_mega.spec import Spec

_FILES = ("model_optim_rng.pt", "model_rng.pt")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(?:\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)")


class LegacyReader:
    """The parameters of a legacy checkpoint. Files are mapped, so that reading one tensor costs one tensor.

    Only plain data is unpickled. Raises ValueError for ranks that are missing or do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        chunks = _load_ranks(folder)
        tp_size = 1 + max(tp for tp, _, _ in chunks)
        pp_size = 1 + max(pp for _, pp, _ in chunks)
        self._parts: dict[str, list[Tensor]] = {}
        for expert_rank in sorted({ep for _, _, ep in chunks}):
            first_layer = 0
            for chunk in range(len(next(iter(chunks.values())))):
                for stage in range(pp_size):
                    for tp in range(tp_size):
                        state = self._state(chunks, tp, stage, expert_rank, chunk)
                        self._add(state, first_layer, expert_rank, tp)
                    first_layer += 1 + max((int(m[1]) for n in state if (m := _LAYER.match(n))), default=-1)

    def spec(self, entry: Entry, shape: ModelShape) -> Spec:
        blank = [part.to("meta") for part in self._find(entry)]
        return Spec.of(self._join(entry, blank, shape))

    def whole(self, entry: Entry, shape: ModelShape) -> Tensor:
        """The whole parameter, put together from the ranks' parts."""
        return self._join(entry, self._find(entry), shape)

    def leftovers(self, entries: Iterable[Entry], shape: ModelShape) -> list[str]:
        """Weights that no entry of the model asks for."""
        asked = {name for entry in entries for name in (entry.megatron, entry.te)}
        return [
            name for name in self._parts if name not in asked and not (shape.tied and name == OUTPUT_LAYER)
        ]

    @staticmethod
    def _join(entry: Entry, parts: list[Tensor], shape: ModelShape) -> Tensor:
        return entry.fusion.fuse(entry.fusion.merge(parts, shape), shape)

    def _find(self, entry: Entry) -> list[Tensor]:
        for name in (entry.megatron, entry.te):
            if name in self._parts:
                return self._parts[name]
        raise MappingError(f"{self._folder} holds no {entry.megatron}; is it a checkpoint of this model?")

    def _state(
        self, chunks: dict[tuple[int, int, int], list[Any]], tp: int, stage: int, ep: int, chunk: int
    ) -> dict[str, Any]:
        if (tp, stage, ep) not in chunks:
            raise ValueError(
                f"{self._folder} holds no rank tp {tp}, pp {stage}, ep {ep}, and others of its row; copy all "
                "of its mp_rank_* folders"
            )
        state: dict[str, Any] = chunks[tp, stage, ep][chunk]
        return state

    def _add(self, state: dict[str, Any], first_layer: int, expert_rank: int, tp: int) -> None:
        local = 1 + max((int(m[1]) for name in state if (m := _EXPERT.search(name))), default=-1)
        for name, tensor in state.items():
            if not torch.is_tensor(tensor) or name.endswith("_extra_state"):
                continue
            of_expert = _EXPERT.search(name) is not None
            # experts are told apart by their ranks; all else is the same on each
            if expert_rank and not of_expert:
                continue
            parts = self._parts.setdefault(
                canonical_name(name, first_layer, expert_rank * local, tied=False), []
            )
            if len(parts) == tp:  # the last stage's copy of a tied embedding comes second
                parts.append(tensor)


def _load_ranks(folder: Path) -> dict[tuple[int, int, int], list[Any]]:
    """Model chunks of each rank, by (tensor, pipeline, expert) rank."""
    loaded: dict[tuple[int, int | None, int | None], list[Any]] = {}
    for path in sorted(folder.iterdir()):
        if not (match := LEGACY_RANK.fullmatch(path.name)):
            continue
        files = [path / name for name in _FILES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(_FILES)}")
        state = _load(files[0])
        chunks = [state[key] for key in sorted(state) if re.fullmatch(r"model\d*", key)]
        tp, second, third = (int(found) if found else None for found in match.groups())
        loaded[tp or 0, second, third] = chunks
    # with one number after the tensor rank, it is the expert rank where every rank holds the embedding
    only_one = all(third is None for _, _, third in loaded)
    experts = only_one and all(EMBEDDING in chunks[0] for chunks in loaded.values())
    return {
        (tp, 0, second or 0) if experts else (tp, second or 0, third or 0): chunks
        for (tp, second, third), chunks in loaded.items()
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_plain_globals(path)):
            state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return state


def _plain_globals(path: Path) -> list[Any]:
    """What such files hold beside tensors: the arguments of the job and its random states."""
    import numpy as np

    arrays = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, type(np.dtype(np.uint32))]  # type: ignore[attr-defined]
    asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    # enumerations among the arguments, of packages that need not be installed here
    enums = [
        (_Nothing, name) for name in asked if name.startswith(("megatron.", "signal.", "transformer_engine."))
    ]
    return [argparse.Namespace, *arrays, *enums]


class _Nothing:
    """Stands for values of classes that are not needed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
