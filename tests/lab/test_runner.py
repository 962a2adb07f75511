"""Runs of a lab are done once, go on after a kill with the same numbers, and end at their deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpt_mega.config import ConfigError
from hpt_mega.lab.config import DataSets, LabConfig
from hpt_mega.lab.exercises import Portion
from hpt_mega.lab.grid import Job, Run, base_models, prepare, reuse, runs
from hpt_mega.lab.runner import JobError, Worker, execute, lock
from hpt_mega.telemetry.runs import COUNTS, Counts, find

STEPS = 6
CFG = LabConfig(
    seeds=[7],
    families=["llama"],
    sizes=["1m"],
    steps=STEPS,
    samples=3,
    data=DataSets(
        seed=1,
        pretraining=[Portion("sum", 2, 12)],
        training=[Portion("sum", 2, 9)],
        heldout=[Portion("sum", 2, 5)],
        outside=[Portion("sum", 3, 4)],
    ),
    pretraining={"1m": ["trainer.steps=1", "trainer.questions_per_step=4"]},
    training={
        "1m": ["trainer.questions_per_step=3", "trainer.save_every=2", "rollout.rollouts_per_question=2"]
    },
    methods={"hpt": [["algorithm=hpt"]], "sft_grpo": [["algorithm=sft"], ["algorithm=grpo"]]},
)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def kill_when(worker: Worker, file: Path) -> None:
    for _ in range(1200):
        if any(file.parent.glob(file.name)):
            break
        time.sleep(0.05)
    assert worker.process is not None
    worker.process.kill()


@pytest.mark.timeout(480)
def test_a_lab_is_done_once_and_what_a_kill_interrupted_goes_on_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(CFG, tmp_path)
    assert execute(base_models(CFG, tmp_path), 1, 120) == []
    grid = runs(CFG, tmp_path, "whole")
    assert execute(grid, 1, 120) == []
    assert [run.is_done for run in grid] == [True, True]
    hpt, staged = find([tmp_path / "whole"])
    assert [record["step"] for record in staged.records] == list(range(STEPS + 1))
    assert staged.records[0]["eval/accuracy"] == hpt.records[0]["eval/accuracy"]
    assert hpt.outside == ["sum 3"]
    for run in (hpt, staged):
        assert isinstance(run.counts, Counts) and isinstance(run.base, Counts)
        assert (run.counts.samples, len(run.counts.correct), len(run.counts.greedy)) == (3, 9, 9)
    assert not list((tmp_path / "whole").rglob("*.safetensors"))  # models of finished runs are not kept

    before = stamps(tmp_path)
    done: list[Job] = []
    monkeypatch.setattr(Worker, "do", lambda self, job: done.append(job))
    assert execute(grid, 1, 120) == []
    assert stamps(tmp_path) == before and done == []
    counts = grid[0].jobs[-1].run_dir / COUNTS
    kept = counts.read_bytes()
    counts.unlink()
    execute(grid, 1, 120)
    assert done == [grid[0].jobs[-1]]  # its training is not done again
    counts.write_bytes(kept)
    monkeypatch.undo()

    variants = {"switch": CFG.methods["hpt"], "soft": [["algorithm=hpt", "gate=soft"]]}
    ablation = runs(replace(CFG, methods=variants), tmp_path, "ablation")
    reuse(ablation, grid)
    assert [(run.method, run.is_done) for run in ablation] == [("switch", True), ("soft", False)]
    (switch,) = find([tmp_path / "ablation"])
    assert (switch.method, switch.records, switch.base) == ("switch", hpt.records, hpt.base)

    job = next(run for run in runs(CFG, tmp_path, "killed") if run.method == "hpt").jobs[0]
    worker = Worker(120)
    killer = threading.Thread(target=kill_when, args=(worker, job.run_dir / "checkpoints" / "*4"))
    killer.start()
    with pytest.raises(JobError, match=r"its process ended with code -9; see .*lab\.log"):
        worker.do(job)
    killer.join()
    assert not job.is_done
    worker.do(job)
    worker.close()
    assert job.is_done
    assert "going on after step 4" in (job.run_dir / "logs" / "lab.log").read_text()
    assert metrics(job.run_dir) == metrics(tmp_path / "whole" / "llama_1m" / "hpt" / "7")


def test_a_job_that_overruns_its_deadline_is_ended_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [Job("train", (), tmp_path / name) for name in "ab"]
    todo = [Run(f"method {job.run_dir.name}", "toy", 1, job.run_dir, (job,)) for job in jobs]
    failures = execute(todo, 1, 0.2)
    assert [failure.partition(":")[0] for failure in failures] == [f"method {x} toy seed 1" for x in "ab"]
    assert all("not done after 0 s" in failure for failure in failures)
    assert "2/2  method b toy seed 1 FAILED" in capsys.readouterr().out


def test_a_run_whose_folder_cannot_be_made_fails_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(worker: Worker, job: Job) -> None:
        raise JobError("tried")

    monkeypatch.setattr(Worker, "do", tried)
    (tmp_path / "file").touch()
    jobs = [Job("train", (), folder) for folder in (tmp_path / "file" / "a", tmp_path / "b")]
    todo = [Run(f"method {job.run_dir.name}", "toy", 1, job.run_dir, (job,)) for job in jobs]
    first, second = execute(todo, 1, 60)
    assert first.startswith("method a toy seed 1: ") and "Not a directory" in first
    assert second == "method b toy seed 1: tried"


@pytest.mark.parametrize("summary", ["{}", ""])
def test_a_run_that_leaves_no_results_fails_and_the_others_go_on(
    summary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(worker: Worker, job: Job) -> None:
        whole = '{"initial_accuracy": 0.25, "final_accuracy": 0.5}'
        if text := (whole if job.run_dir.name == "b" else summary):
            (job.run_dir / "summary.json").write_text(text)

    monkeypatch.setattr(Worker, "do", done)
    jobs = [Job("train", (), tmp_path / name) for name in "ab"]
    todo = [Run(f"method {job.run_dir.name}", "toy", 1, job.run_dir, (job,)) for job in jobs]
    what = "KeyError: 'initial_accuracy'" if summary else "its jobs have ended and left no results"
    assert execute(todo, 1, 60) == [f"method a toy seed 1: {what}"]
    assert todo[1].is_done


def test_each_job_of_a_worker_has_a_port_that_nobody_has_taken_meanwhile(tmp_path: Path) -> None:
    script = """if True:
        import os, socket, sys
        from hpt_mega.lab import worker
        held = []
        def take_port(settings):
            held.append(socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))))
        worker.VERBS["train"] = take_port
        sys.exit(worker.main())
    """
    job = json.dumps({"verb": "train", "settings": [], "log": str(tmp_path / "log")}) + "\n"
    done = subprocess.run(
        [sys.executable, "-c", script], input=2 * job, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "{}\n{}\n", (tmp_path / "log").read_text()


def test_a_failed_job_says_why_and_where_to_read_on(tmp_path: Path) -> None:
    worker = Worker(120)
    job = Job("train", ("trainer.stepz=1",), tmp_path / "run")
    with pytest.raises(JobError, match=r"(?s)did you mean trainer\.steps.*see .*run/logs/lab\.log"):
        worker.do(job)
    assert "Traceback" in (tmp_path / "run" / "logs" / "lab.log").read_text()
    worker.close()


def test_a_worker_dies_with_its_lab_however_early_that_is_killed() -> None:
    """While the worker still imports: it would do its first job to the end."""
    script = """if True:
        import os, signal
        from hpt_mega.lab.runner import Worker
        worker = Worker(60)._start()
        worker.send_signal(signal.SIGSTOP)
        print(worker.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    printed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=120).stdout
    for _ in range(100):
        try:
            if psutil.Process(int(printed)).status() == psutil.STATUS_ZOMBIE:
                return  # nobody has asked for its exit code yet
        except psutil.NoSuchProcess:
            return
        time.sleep(0.1)
    os.kill(int(printed), signal.SIGKILL)
    pytest.fail("the worker outlived its lab")


def test_two_labs_do_not_share_a_folder(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigError, match="another hpt lab works in"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass
