"""From rows to a prepared folder: tokenised by several processes, checked, reported, the same each time.

The command is tools/prepare_data.py; what the folder holds is read by store.py.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpt_mega.config import ColumnsConfig
from hpt_mega.data.files import Record, read_records
from hpt_mega.data.overlap import WORDS, OverlapIndex
from hpt_mega.data.store import MANIFEST, TEXTS, TOKENS, fingerprint
from hpt_mega.data.templates import check, conversation, render
from hpt_mega.files import writing_folder

CHUNK_ROWS = 128
AHEAD = 3  # chunks a worker that are read but not yet written: bounds memory
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
LISTED = 10_000  # overlaps at most in the report

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Settings:
    """How rows become tokens. A question whose prompt is too long is dropped, a long demonstration cut."""

    source: str
    tokenizer: str  # a folder
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    split: str = "train"
    template: str = "chat"
    instruction: str = ""
    keep_system: bool = True
    max_prompt_tokens: int = 1024
    max_demonstration_tokens: int = 8192
    rows: int = 0  # the first ones; 0: all
    drop_overlap: bool = False  # whether questions that overlap with a benchmark are left out
    workers: int = 1


def prepare(
    settings: Settings, out: Path, benchmarks: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Write the folder `out` and return its report.json; the folder is whole or absent.

    benchmarks: {name: its questions}, compared with every prompt. The same settings and rows give the same
    bytes whatever the number of workers. Raises ValueError where a row is unfit or nothing is left.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    check(settings.template, tokenizer)
    tally = _Tally({name: OverlapIndex(texts) for name, texts in (benchmarks or {}).items()})
    records = islice(read_records(settings.source, settings.columns, settings.split), settings.rows or None)
    marks = fingerprint(tokenizer, settings.template, settings.instruction, settings.keep_system)
    manifest = asdict(settings) | {"fingerprint": marks}
    manifest.pop("workers")
    with writing_folder(out) as folder:
        _write(settings, records, folder, len(tokenizer), tally)
        if not tally.kept:
            raise ValueError(f"{settings.source}: none of {tally.rows} rows is usable: {dict(tally.dropped)}")
        report = tally.report()
        (folder / "report.json").write_text(_pretty(report), "utf-8")
        (folder / MANIFEST).write_text(_pretty(manifest), "utf-8")
    return report


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


class _Tally:
    """What is counted while rows pass."""

    def __init__(self, indices: dict[str, OverlapIndex]) -> None:
        self._indices = indices
        self._seen: set[bytes] = set()
        self._lengths: dict[str, list[int]] = {"prompt": [], "demonstration": [], "rejected": []}
        self._overlaps: dict[str, list[dict[str, Any]]] = {name: [] for name in indices}
        self.rows = self.kept = self.truncated = self.without_answer = 0
        self.dropped: Counter[str] = Counter()

    def is_repeated(self, prompt: str) -> bool:
        """Whether the same prompt, but for white space and letter case, was there before."""
        mark = hashlib.blake2b(" ".join(prompt.split()).casefold().encode(), digest_size=16).digest()
        is_seen = mark in self._seen
        self._seen.add(mark)
        return is_seen

    def overlaps(self, row: int, prompt: str) -> bool:
        """Whether a benchmark's question shares a run of words with the prompt; notes which."""
        found = False
        for name, index in self._indices.items():
            for question, run in index.matches(prompt).items():
                self._overlaps[name].append({"row": row, "question": question, "words": run})
                found = True
        return found

    def keep(self, lengths: Sequence[int], is_cut: bool, has_answer: bool) -> None:
        self.kept += 1
        self.truncated += is_cut
        self.without_answer += not has_answer
        for part, length in zip(self._lengths.values(), lengths, strict=True):
            if length:
                part.append(length)

    def report(self) -> dict[str, Any]:
        with_demonstration = len(self._lengths["demonstration"])
        return {
            "rows": self.rows,
            "questions": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "without_demonstration": self.kept - with_demonstration,
            "without_answer": self.without_answer,
            "truncated_demonstrations": self.truncated,
            "tokens": {name: _lengths(part) for name, part in self._lengths.items()},
            "overlap": {
                name: {
                    "words": WORDS,
                    "rows": len({one["row"] for one in part}),
                    "questions": len({one["question"] for one in part}),
                    "list": part[:LISTED],
                }
                for name, part in self._overlaps.items()
            },
        }


def _lengths(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {"sequences": 0, "total": 0}
    quantiles = np.quantile(lengths, QUANTILES)
    named = {f"p{100 * q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    return {
        "sequences": len(lengths),
        "total": int(np.sum(lengths)),
        "mean": float(np.mean(lengths)),
        **named,
    }


def _write(
    settings: Settings, records: Iterable[Record], folder: Path, vocabulary: int, tally: _Tally
) -> None:
    from hpt_mega.megatron.indexed import TokenWriter

    stem = Path(settings.source).stem
    numbered = _usable(records, settings, tally)
    with (
        TokenWriter(folder / TOKENS, vocabulary) as writer,
        (folder / TEXTS).open("w", encoding="utf-8") as texts,
    ):
        for chunk, encoded in _encoded(numbered, settings):
            for (row, record), (parts, is_cut) in zip(chunk, encoded, strict=True):
                if len(parts[0]) > settings.max_prompt_tokens:
                    tally.dropped["long prompt"] += 1
                    continue
                tally.keep([len(part) for part in parts], is_cut, bool(record.answer))
                writer.add(parts)
                line = {
                    "id": f"{stem}-{row}",
                    "task": record.task or stem,
                    "prompt": record.prompt.strip(),
                    "answer": record.answer,
                }
                texts.write(json.dumps(line, ensure_ascii=False) + "\n")
        writer.finish()


def _usable(records: Iterable[Record], settings: Settings, tally: _Tally) -> Iterator[tuple[int, Record]]:
    """(row, record) of those that text alone does not rule out."""
    for row, record in enumerate(records):
        tally.rows += 1
        if tally.is_repeated(record.prompt):
            tally.dropped["duplicate"] += 1
        elif tally.overlaps(row, record.prompt) and settings.drop_overlap:
            tally.dropped["overlap with a benchmark"] += 1
        else:
            yield row, record


Chunk = list[tuple[int, Record]]
Encoded = list[tuple[list[Tokens], bool]]


def _encoded(numbered: Iterator[tuple[int, Record]], settings: Settings) -> Iterator[tuple[Chunk, Encoded]]:
    """Chunks with their tokens, in order, a bounded number of them under way."""
    chunks = iter(lambda: list(islice(numbered, CHUNK_ROWS)), [])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers"])
    with ProcessPoolExecutor(settings.workers, context, _start_worker, (settings,)) as pool:
        under_way: deque[tuple[Chunk, Future[Encoded]]] = deque()
        for chunk in chunks:
            under_way.append((chunk, pool.submit(_encode, [record for _, record in chunk])))
            if len(under_way) >= AHEAD * settings.workers:
                first, future = under_way.popleft()
                yield first, future.result()
        for first, future in under_way:
            yield first, future.result()


_worker: dict[str, Any] = {}  # of this process: tokenizer and settings


def _start_worker(settings: Settings) -> None:
    from transformers import AutoTokenizer

    _worker["settings"] = settings
    _worker["tokenizer"] = AutoTokenizer.from_pretrained(settings.tokenizer)


def _encode(records: Sequence[Record]) -> Encoded:
    """Prompt, demonstration and rejected response of each record, and whether the second was cut."""
    settings, tokenizer = _worker["settings"], _worker["tokenizer"]
    prompts = [_prompt(record, settings, tokenizer) for record in records]
    parts = [
        _tokens(texts, tokenizer)
        for texts in (prompts, [r.demonstration for r in records], [r.rejected for r in records])
    ]
    limit = settings.max_demonstration_tokens
    stop = np.array([tokenizer.eos_token_id], np.int32)
    found: Encoded = []
    for prompt, *responses in zip(*parts, strict=True):
        is_cut = len(responses[0]) >= limit
        # a response that is cut does not end, so it gets no stop token
        ended = [
            r[:limit] if len(r) >= limit else np.concatenate([r, stop]) if len(r) else r for r in responses
        ]
        found.append(([prompt, *ended], is_cut))
    return found


def _prompt(record: Record, settings: Settings, tokenizer: Any) -> str:
    messages = conversation(record.earlier, record.prompt, settings.instruction, settings.keep_system)
    return render(settings.template, messages, tokenizer)


def _tokens(texts: Sequence[str], tokenizer: Any) -> list[Tokens]:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]
