"""The log of a run: its files in RUN_DIR and its terminal, both rank 0's alone.

How the files are kept whole lives in records.py, what is shown in terminal.py and report.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hpt_mega.config import Config
from hpt_mega.files import write_atomically
from hpt_mega.rewards import Verdict
from hpt_mega.telemetry import records
from hpt_mega.telemetry.decline import Decline
from hpt_mega.telemetry.loggers import Logger, numbers_of, open_loggers
from hpt_mega.telemetry.prometheus import PrometheusEndpoint
from hpt_mega.telemetry.summary import ACCURACY, summarise
from hpt_mega.telemetry.terminal import Terminal
from hpt_mega.trajectory import Question

if TYPE_CHECKING:
    from hpt_mega.megatron.runtime import Layout

QUESTIONS_SHOWN = 2  # a step's samples are for reading; all of them would outgrow the rest of the run


class RunLog:
    """Used by every rank alike; on all but rank 0 it does nothing.

    metrics.jsonl without summary.json marks a run that has not finished.
    """

    def __init__(self, cfg: Config, layout: Layout, resume_step: int | None) -> None:
        """Prepare to log a run from its start, or from the checkpoint of `resume_step`."""
        self._cfg = cfg
        self._is_writer = layout.rank == 0
        self._resume_step = resume_step
        self._run_dir = Path(cfg.run_dir)
        self._metrics = self._run_dir / "metrics.jsonl"
        self._samples = self._run_dir / "samples.jsonl"
        self._decline = Decline()
        self._loggers: list[Logger] = []
        self._terminal = Terminal(cfg.trainer.steps, cfg.data.heldout_questions, done=resume_step or 0)

    def __enter__(self) -> RunLog:
        """Empty the files, or cut them to the checkpoint, so that they read as if nothing had gone wrong."""
        if self._is_writer:
            (self._run_dir / "summary.json").unlink(missing_ok=True)
            for path in (self._metrics, self._samples):
                if self._resume_step is None:
                    write_atomically(path, "")
                else:
                    records.cut(path, self._resume_step)
            saved = Path(self._cfg.debug.save)
            if self._resume_step is not None and saved.is_file():
                records.cut(saved, self._resume_step)
            for record in records.read(self._metrics, "step"):
                self._decline.observe(record)
            self._loggers = open_loggers(self._cfg.telemetry.loggers, self._run_dir)
            if self._cfg.telemetry.prometheus_port:
                self._loggers.append(PrometheusEndpoint(self._cfg.telemetry.prometheus_port))
            self._terminal.start()
            if self._cfg.resume == "auto":
                self._terminal.resumed(self._resume_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._terminal.stop()
        for logger in self._loggers:
            logger.close()

    def record(self, step: int, record: Mapping[str, Any]) -> None:
        """Keep and show what was measured in a step (0: before training); "timing" holds seconds by phase."""
        if not self._is_writer:
            return
        records.append(self._metrics, record)
        for logger in self._loggers:
            logger.log(step, numbers_of(record))
        if step > 0:
            self._terminal.stepped(step, dict(record))
            if warning := self._decline.observe(dict(record)):
                self._terminal.warn(warning)
        if ACCURACY in record:
            self._terminal.evaluated(step, dict(record))

    def samples(
        self, step: int, questions: Sequence[Question], texts: Sequence[str], verdicts: Sequence[Verdict]
    ) -> None:
        """Keep the responses to the first questions; texts and verdicts hold n a question, in order."""
        if not self._is_writer or not questions:
            return
        n = len(texts) // len(questions)
        shown = [question for question in questions[:QUESTIONS_SHOWN] for _ in range(n)]
        lines = [
            {
                "step": step,
                "question": question.prompt,
                "answer": question.answer,
                "response": text,
                "reward": verdict.reward,
                "why": verdict.why,
            }
            for question, text, verdict in zip(shown, texts, verdicts, strict=False)
        ]
        records.append(self._samples, *lines)

    def finish(self, timing: Mapping[str, float]) -> None:
        """Write summary.json and the report, show the outcome; `timing` was taken after the last record."""
        if not self._is_writer:
            return
        from hpt_mega.telemetry.report import write_report  # imports matplotlib, which takes a second

        summary = summarise(records.read(self._metrics, "step"), self._cfg, timing)
        summary.save(self._run_dir / "summary.json")
        self._terminal.finished(summary, write_report(self._run_dir))
