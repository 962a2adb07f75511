"""Prepared questions on disk: tokens in Megatron's IndexedDataset format, mapped into memory, texts beside.

Written by prepare.py. A question of long demonstrations costs no memory before it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hpt_mega.trajectory import Question

MANIFEST = "prepared.json"
TOKENS = "tokens"  # .bin and .idx
TEXTS = "questions.jsonl"
PARTS = 3  # sequences of a document: prompt, demonstration, rejected response; empty where there is none

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class TokenFile:
    """The sequences of a .bin and .idx pair, memory-mapped. Raises ValueError where they are damaged."""

    def __init__(self, prefix: Path) -> None:
        # np.asarray: a memmap's own slices cost microseconds each
        index = np.asarray(np.memmap(prefix.with_suffix(".idx"), dtype=np.uint8, mode="r"))
        head = bytes(index[:34])
        magic, version, code, count, documents = (
            struct.unpack("<9sQBQQ", head) if len(head) == 34 else [b""] * 5
        )
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise ValueError(f"{prefix}.idx is no IndexedDataset of version 1; prepare the data again")
        self.dtype = np.dtype(_DTYPES[code])
        ends = np.cumsum([34, 4 * count, 8 * count, 8 * documents])
        self.lengths: NDArray[np.int32] = index[ends[0] : ends[1]].view(np.int32)
        self.starts: NDArray[np.int64] = index[ends[1] : ends[2]].view(np.int64) // self.dtype.itemsize
        size = prefix.with_suffix(".bin").stat().st_size
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if len(self.lengths) != count or size != expected:
            raise ValueError(
                f"{prefix}.bin has {size} bytes, its index tells of {expected}; prepare the data again"
            )
        self.tokens = np.empty(0, self.dtype)
        if size:
            self.tokens = np.asarray(np.memmap(prefix.with_suffix(".bin"), dtype=self.dtype, mode="r"))

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, index: int) -> NDArray[Any]:
        """Tokens [length] of a sequence, a view of the file."""
        return self.span(index, 1)

    def span(self, first: int, count: int) -> NDArray[Any]:
        """Tokens of `count` sequences side by side, a view of the file."""
        start = int(self.starts[first])
        return self.tokens[start : start + int(self.lengths[first : first + count].sum())]


class StoredQuestions(Sequence[Question]):
    """Questions of a prepared folder, or some of them, each made when it is asked for.

    Their texts of demonstrations are empty: the tokens are what is trained on. Raises ValueError where the
    folder is none that prepare.py wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self.file = TokenFile(folder / TOKENS)
        with (folder / TEXTS).open(encoding="utf-8") as lines:  # str.splitlines would part at U+2028 too
            self._texts = [json.loads(line) for line in lines]
        if len(self.file) != PARTS * len(self._texts):
            raise ValueError(
                f"{folder}: {len(self._texts)} questions and {len(self.file)} sequences; expected {PARTS} "
                "a question. Prepare the data again"
            )
        self._chosen = np.arange(len(self._texts))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[questions, 3] tokens of prompt, demonstration and rejected response."""
        return self.file.lengths.reshape(-1, PARTS)[self._chosen]

    @property
    def prompts(self) -> list[str]:
        return [self._texts[i]["prompt"] for i in self._chosen]

    @property
    def answers(self) -> list[str]:
        return [self._texts[i]["answer"] for i in self._chosen]

    def choose(self, indices: NDArray[Any]) -> StoredQuestions:
        """Only these questions, in this order; shares the files."""
        chosen = object.__new__(StoredQuestions)
        chosen.__dict__ = self.__dict__ | {"_chosen": self._chosen[indices]}
        return chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> StoredQuestions: ...
    def __getitem__(self, index: int | slice) -> Question | StoredQuestions:
        if isinstance(index, slice):
            return self.choose(np.arange(len(self))[index])
        row = int(self._chosen[index])
        return self._question(row, [self.file.sequence(PARTS * row + part) for part in range(PARTS)])

    def rows(self, indices: Sequence[int]) -> list[int]:
        """Where in the files the questions of these indices stand."""
        return self._chosen[list(indices)].tolist()

    def with_tokens(
        self, indices: Sequence[int], tokens_BS: NDArray[Any], lengths_B3: NDArray[Any]
    ) -> list[Question]:
        """The questions of these indices, from documents that a reader has read."""
        found = []
        for row, tokens, lengths in zip(self.rows(indices), tokens_BS, lengths_B3, strict=True):
            ends = np.cumsum(lengths)
            found.append(self._question(row, np.split(tokens[: ends[-1]], ends[:-1])))
        return found

    def _question(self, row: int, parts: Sequence[NDArray[Any]]) -> Question:
        text = self._texts[row]
        tokens = [tuple(part.tolist()) for part in parts]
        return Question(
            id=text["id"],
            task=text["task"],
            prompt=text["prompt"],
            answer=text["answer"],
            demonstration="",
            prompt_tokens=tokens[0],
            demonstration_tokens=tokens[1],
            rejected_tokens=tokens[2],
        )


def is_prepared(source: str | Path) -> bool:
    return (Path(source) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the folder was prepared with. Raises ValueError."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: {error}; expected a folder of tools/prepare_data.py") from None
    return manifest


def fingerprint(tokenizer: Any, template: str, instruction: str, keep_system: bool) -> str:
    """What the tokens of a prompt depend on besides its text: two equal ones give equal tokens."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template if template == "chat" else "",
        tokenizer.eos_token_id,
        template,
        instruction,
        keep_system,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
