"""The job scripts on a real Slurm of three nodes: signalled, requeued, a node lost, a sweep, a conversion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.toy import metrics, save_toy, settings

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
DEADLINE_S = 420.0
STEPS = 40
NODES = ["node0", "node1", "node2"]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def why_not() -> str:
    """What keeps a Slurm from being started here; empty where nothing does."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name)]
    return (
        f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)" if absent else ""
    )


pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.timeout(900)]


class Cluster:
    """Slurm under a folder, and the jobs of these tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = settings(save_toy(folder / "toy"))
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "HPT_ROOT": str(ROOT),
            "HPT_PYTHON": sys.executable,
            "PYTHON": "another-program's",  # make and CI machines set it; the jobs must not take it
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "MIN_DISK_GIB": "1",
        }

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, run: str, *options: str, script: str = "train.sh") -> str:
        """A job whose output is run.out; what begins with -- is sbatch's, the rest the script's."""
        mine = [option for option in options if not option.startswith("--")]
        theirs = [option for option in options if option.startswith("--")]
        output = f"--output={self.folder}/{run}.out"
        return self.run("sbatch", "--parsable", output, *theirs, f"{ROOT}/slurm/{script}", *mine)

    def train(self, run: str, *overrides: str) -> str:
        job = (*self.settings, "parallel=pp2", f"trainer.steps={STEPS}", f"run_dir={self.folder / run}")
        return self.submit(run, *TWO_NODES, *job, *overrides)

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def wait(self, what: str, until: Callable[[], bool], *outputs: str) -> None:
        end = time.monotonic() + DEADLINE_S
        while not until():
            if time.monotonic() > end:
                said = "\n".join(self.output(name) for name in outputs)
                pytest.fail(f"{what}: not within {DEADLINE_S:g} s\n{said}")
            time.sleep(0.2)

    def wait_for_end(self, job: str, run: str) -> str:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(f"end of job {job}", lambda: self.state(job) in ended, run)
        return self.output(run)

    def output(self, run: str) -> str:
        file = self.folder / f"{run}.out"
        return file.read_text() if file.is_file() else ""

    def wait_for_step(self, run: str, step: int) -> None:
        self.wait(f"step {step} of {run}", lambda: len(metrics(self.folder / run)) > step, run)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder)
    subprocess.run([CLUSTER, "start", folder, "3"], check=True, timeout=120)
    try:
        yield cluster
    finally:
        subprocess.run([CLUSTER, "stop", folder], timeout=60)


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """A run of two nodes that nothing happened to."""
    output = cluster.wait_for_end(cluster.train("whole"), "whole")
    assert "done:" in output, output
    assert len(metrics(cluster.folder / "whole")) == STEPS + 1
    return cluster.folder / "whole"


def test_a_signalled_job_saves_requeues_and_ends_with_the_same_metrics(cluster: Cluster, whole: Path) -> None:
    job = cluster.train("signalled", "trainer.save_every=1000")
    cluster.wait_for_step("signalled", 3)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.wait("requeue", lambda: "requeueing" in cluster.output("signalled"), "signalled")
    output = cluster.wait_for_end(job, "signalled")
    assert "Restarts=1" in cluster.run("scontrol", "--oneliner", "show", "job", job)
    assert "done:" in output
    log = (cluster.folder / "signalled/logs/rank0.log").read_text()
    assert "stopped at step" in log and "going on after step" in log
    assert metrics(cluster.folder / "signalled") == metrics(whole)


def test_a_job_signalled_before_it_trains_is_requeued_and_trains_then(cluster: Cluster) -> None:
    run = cluster.folder / "early"
    job = cluster.submit("early", *cluster.settings, "parallel=single", "trainer.steps=1", f"run_dir={run}")
    cluster.wait("pre-flight", (run / "preflight").is_dir, "early")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    output = cluster.wait_for_end(job, "early")
    assert "asked to stop before training began\nrequeueing" in output
    assert "Restarts=1" in cluster.run("scontrol", "--oneliner", "show", "job", job)
    assert len(metrics(run)) == 2


def test_a_job_whose_node_is_lost_goes_on_elsewhere_with_the_same_metrics(
    cluster: Cluster, whole: Path
) -> None:
    job = cluster.train("lost", "trainer.save_every=3")
    cluster.wait_for_step("lost", 5)
    shown = cluster.run("scontrol", "--oneliner", "show", "job", job)
    host = shown.partition("BatchHost=")[2].split()[0]
    others = [name for name in NODES if name != host]
    victims = [process for process in psutil.process_iter() if is_of_node(process, job, others)]
    lost = {process.environ()["SLURMD_NODENAME"] for process in victims}
    assert len(lost) == 1
    name = lost.pop()
    daemon = psutil.Process(int((cluster.folder / f"run/slurmd-{name}.pid").read_text()))
    for process in (daemon, *victims):
        process.kill()
    try:
        output = cluster.wait_for_end(job, "lost")
    finally:
        cluster.run("slurmd", "-f", str(cluster.folder / "slurm.conf"), "-N", name)  # for the next test
    assert "Restarts=1" in cluster.run("scontrol", "--oneliner", "show", "job", job)
    assert "done:" in output
    assert "going on after step" in (cluster.folder / "lost/logs/rank0.log").read_text()
    assert metrics(cluster.folder / "lost") == metrics(whole)


def is_of_node(process: psutil.Process, job: str, nodes: list[str]) -> bool:
    """Whether it is a task of the job there; a node that fails takes its tasks with it."""
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    return environment.get("SLURM_JOB_ID") == job and environment.get("SLURMD_NODENAME") in nodes


def test_a_sweep_runs_as_an_array_and_ends_in_a_report(cluster: Cluster) -> None:
    folder = cluster.folder / "ablation"
    cluster.environment |= {"AT_ONCE": "2", "PREFLIGHT": "0"}
    swept = ("seed=1,2,3", "optimizer.weight_decay=0,0.1")
    job = (*cluster.settings, "parallel=single", "trainer.steps=1", *swept)
    cluster.run("bash", f"{ROOT}/slurm/ablation.sh", str(folder), *job)
    said = folder / "report.out"
    cluster.wait("report", lambda: said.is_file() and bool(said.read_text()))
    assert said.read_text() == f"{folder}/comparison.html\n"
    text = (folder / "comparison.md").read_text()
    assert text.startswith("# 2 methods, 6 runs\n")
    assert text.count("\n| optimizer.weight_decay=0.1 | ") == 3  # a row of every table


def test_a_conversion_runs_as_a_job(cluster: Cluster) -> None:
    out = cluster.folder / "converted"
    words = ["hf-to-megatron", "--hf", str(cluster.folder / "toy"), "--out", str(out), "--tp", "2"]
    output = f"--output={cluster.folder}/convert.out"
    job = cluster.run("sbatch", "--parsable", output, f"{ROOT}/slurm/convert.sh", *words)
    cluster.wait_for_end(job, "convert")
    assert cluster.state(job) == "COMPLETED", cluster.output("convert")
    assert any(out.rglob("*.distcp"))


IN_A_JOB = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "PREFLIGHT": "0"}


def call(
    script: str, *words: str, cwd: Path = ROOT, stand_ins: str = "sbatch() { return 7; }", **environment: str
) -> tuple[int, str]:
    """(exit code, output) of a script without a cluster; nothing is submitted, for its sbatch fails with 7.

    stand_ins: shell functions in place of Slurm's commands.
    """
    done = subprocess.run(
        ["bash", "-c", f'set -a; {stand_ins}; exec bash "$0" "$@"', f"{ROOT}/slurm/{script}", *words],
        env=os.environ | {"HPT_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("script", "words", "code", "expected"),
    [
        ("train.sh", ["parallel=single"], 7, ""),
        ("eval.sh", ["model=m", "benchmarks=[aime24]"], 7, ""),
        ("convert.sh", ["hf-to-megatron", "--hf", "a", "--out", "b"], 7, ""),
        ("train.sh", ["parallel=single", "trainer.stepz=1"], 2, "did you mean trainer.steps"),
        ("train.sh", ["parallel=pp3"], 2, "the job has 1 tasks that train and parallel.tp x cp x pp x dp ="),
        ("train.sh", ["--dry-run", "parallel=pp3"], 2, "the job has 1 tasks that train"),
        ("train.sh", ["--force"], 2, "unknown option --force"),
        ("eval.sh", ["model=m", "benchmark=[aime24]"], 2, "unknown key benchmark; did you mean benchmarks"),
        ("eval.sh", ["--dry-run", "model=m", "--force"], 2, "unrecognized arguments: --force"),
        ("convert.sh", ["hf-to-megatron", "--hf", "a"], 2, "arguments are required: --out"),
        ("hpt_70b.sh", ["--help"], 0, "HPT on Llama-3.1-70B, 8 nodes of 8 H100"),
        ("convert.sh", ["--help"], 0, "hpt convert on a node: sbatch slurm/convert.sh"),
        ("ablation.sh", ["out/x"], 2, "usage: bash slurm/ablation.sh"),
    ],
)
def test_a_script_ends_as_sbatch_does_and_submits_nothing_that_cannot_run(
    script: str, words: list[str], code: int, expected: str
) -> None:
    ended, output = call(script, *words)
    assert ended == code and expected in output, output


def test_a_script_says_which_setting_is_wrong(tmp_path: Path) -> None:
    for found in (call("train.sh", cwd=tmp_path), call("train.sh", HPT_ROOT=str(tmp_path))):
        assert found[0] == 2 and found[1].startswith(f"error: HPT_ROOT is {tmp_path}, which has no slurm/")
        assert found[1].count("\n") == 1
    for given in ("abc", "-1", "08"):
        assert call("hpt_7b.sh", "--dry-run", ROLLOUT_NODES=given)[1].startswith(
            f"error: ROLLOUT_NODES is '{given}', expected how many"
        )


def test_a_script_trains_nothing_where_the_job_or_its_nodes_cannot_be_read(tmp_path: Path) -> None:
    sweep = (f"{tmp_path}/gone", "--dry-run")
    code, output = call("ablation.sh", *sweep, **IN_A_JOB, SLURM_ARRAY_TASK_ID="0")
    assert code == 2 and output.startswith(f"error: cannot read {tmp_path}/gone/jobs.jsonl: "), output
    assert output.count("\n") == 1
    nodes = {"ROLLOUT_NODES": "1", "SLURM_JOB_NODELIST": "node[0-1]"}
    found = call(
        "train.sh", "parallel=single", "--dry-run", stand_ins="scontrol() { return 4; }", **IN_A_JOB, **nodes
    )
    assert found == (4, "")


def test_a_script_requeues_a_run_that_ends_just_as_its_signal_comes(tmp_path: Path) -> None:
    stand_ins = """
    srun() { command sleep 0.5; builtin kill -USR1 $$; command sleep 0.5; touch "$RUN/logs/stopped"; }
    kill() {
      [ "$1" != -USR1 ] || while builtin kill -0 "$2" 2>/dev/null; do command sleep 0.1; done
      builtin kill "$@"
    }
    scontrol() { echo "scontrol $*"; }
    sleep() { :; }
    """
    words = ("parallel=single", f"run_dir={tmp_path}")
    given = IN_A_JOB | {"MASTER_ADDR": "127.0.0.1", "RUN": str(tmp_path)}
    code, output = call("train.sh", *words, stand_ins=stand_ins.strip(), **given)
    assert code == 0, output
    assert output.splitlines() == [
        "asked to stop: saving at the end of the step",
        "requeueing job 5",
        "scontrol requeue 5",
    ]


def test_a_sweep_that_is_only_shown_leaves_nothing(tmp_path: Path) -> None:
    code, output = call("ablation.sh", "--dry-run", f"{tmp_path}/sweep", "parallel=single", "seed=1,2")
    assert code == 0 and "--array=0-1" in output, output
    assert not (tmp_path / "sweep").exists()


def test_the_jobs_last_nodes_serve_rollouts_and_the_others_train() -> None:
    done = subprocess.run(
        ["bash", f"{ROOT}/slurm/hpt_70b.sh", "--dry-run"],
        env=os.environ | {"HPT_ROOT": str(ROOT), "HPT_PYTHON": sys.executable, "ROLLOUT_NODES": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    submit, *_, serve, train = done.stdout.splitlines()
    assert submit.startswith("sbatch --nodes=10 ")
    assert "--nodelist=NODE8\\,NODE9 --ntasks=2 --ntasks-per-node=1" in serve
    assert "hpt_mega.cli serve experiment=hpt_70b" in serve and "--host 0.0.0.0 --port 10000" in serve
    assert "--nodes=8 --nodelist=NODE0" in train and "--ntasks=64 --ntasks-per-node=8" in train
    urls = "rollout.server.urls=\\[http://NODE8:10000\\,http://NODE9:10000\\]"
    assert urls in train and "rollout=vllm" in train
    assert "HPT_ROLLOUT_KEY" not in done.stdout


def test_a_script_may_have_nodes_of_its_own_that_serve() -> None:
    done = subprocess.run(
        ["bash", f"{ROOT}/slurm/hpt_moe.sh", "--dry-run"],
        env=os.environ | {"HPT_ROOT": str(ROOT), "HPT_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    submit, *_, serve, train = done.stdout.splitlines()
    assert submit.split() == ["sbatch", f"{ROOT}/slurm/hpt_moe.sh"]
    assert "--nodelist=NODE32\\,NODE33\\,NODE34\\,NODE35 --ntasks=4 --ntasks-per-node=1" in serve
    assert "--nodes=32 --nodelist=NODE0" in train and "--ntasks=256 --ntasks-per-node=8" in train


def test_a_job_trains_on_one_node_what_a_server_on_the_other_generates(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make .venv/.vllm")
    run = cluster.folder / "served"
    model = save_toy(cluster.folder / "wide", head_dim=32)
    for name, value in (("ROLLOUT_NODES", "1"), ("ROLLOUT_HOSTS", "127.0.0.1"), ("PREFLIGHT", "0")):
        monkeypatch.setitem(cluster.environment, name, value)
    job = (*settings(model), "parallel=single", "precision=fp32", "trainer.steps=2", f"run_dir={run}")
    number = cluster.submit("served", *TWO_NODES, *job, "rollout.server.bucket_mib=2")
    output = cluster.wait_for_end(number, "served")
    assert "done:" in output, output
    assert [record["sync/probe_gap"] < 1e-4 for record in metrics(run)[1:]] == [True, True]
    assert "serving at" in (run / "logs" / "serve0.log").read_text()
    assert not [process for process in psutil.process_iter() if is_of_node(process, number, NODES)]


def test_an_evaluation_runs_as_a_job_in_its_container(cluster: Cluster) -> None:
    """The container runtime is a stand-in that notes how it was called, and runs what it was given."""
    folder = cluster.folder
    runtime = folder / "bin" / "apptainer"
    runtime.parent.mkdir()
    runtime.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >>{folder}/called\nshift 5\nexec "$@"\n')
    runtime.chmod(0o755)
    (folder / "sums.json").write_text(
        '[{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 3?", "answer": "5"}]'
    )
    environment = {"PATH": f"{runtime.parent}:{os.environ['PATH']}", "APPTAINER": "/images/hpt.sif"}
    cluster.environment |= environment | {"MOUNTS": "/data"}
    words = [f"model={folder}/toy", f"benchmarks=[{folder}/sums.json]", "k=1", "max_new_tokens=4"]
    job = cluster.submit("eval", *words, f"run_dir={folder}/eval", script="eval.sh")
    for name in ("APPTAINER", "MOUNTS"):
        del cluster.environment[name]
    output = cluster.wait_for_end(job, "eval")
    assert cluster.state(job) == "COMPLETED", output
    assert (folder / "eval" / "results.json").is_file()
    called = (folder / "called").read_text().splitlines()
    assert called[:5] == ["exec", "--nv", "--bind", f"{ROOT},/data", "/images/hpt.sif"]
    assert called[5:9] == [sys.executable, "-m", "hpt_mega.cli", "eval"]
    assert called[9:] == [*words, f"run_dir={folder}/eval"]


def test_the_70b_job_is_accepted_and_its_preflight_names_what_is_missing(cluster: Cluster) -> None:
    cluster.environment["PREFLIGHT"] = "1"
    run = cluster.folder / "hpt_70b"
    smaller = ("parallel.pp=3", "parallel.dp=1")
    job = cluster.submit("hpt_70b", "--nodes=3", *smaller, f"run_dir={run}", script="hpt_70b.sh")
    output = cluster.wait_for_end(job, "hpt_70b")
    assert cluster.state(job) == "FAILED"
    assert "node2: transformer-engine is missing" in output
    assert "node0: Slurm gives 8 GPUs and torch sees 0" in output
    assert "nothing was trained" in output
    assert not (run / "metrics.jsonl").exists()
