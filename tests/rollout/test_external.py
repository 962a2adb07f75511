"""Servers at URLs: `hpt serve` with a real vLLM brought weights over a network, killed, and used by a run.

What is asked of such a server before it is trusted is tested on a small one of our own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from hpt_mega.config import ParallelConfig
from hpt_mega.process import die_with_parent, free_port
from hpt_mega.rollout import sync as sync_module
from hpt_mega.rollout.engine import EngineError, SamplingParams
from hpt_mega.rollout.external import KEY_VARIABLE, ExternalServer, RemoteClient
from hpt_mega.rollout.vllm import VLLMClient
from hpt_mega.rollout.vllm_plugin import BEGIN, END, INSTANCE, OneTrainer, RequireKey
from tests import toy
from tests.ranks import run_ranks

KEY = "a-secret-of-this-test"
START_S, ANSWER_S = 280.0, 120.0
PROMPT, RESPONSE = (3, 141, 59, 26, 53), (58, 97, 93, 23)
BUCKET_BYTES = 1 << 20


@dataclass
class Supervised:
    """Answers as OneTrainer does, and is at once another instance when it is ended."""

    said: list[str] = field(default_factory=list)
    number: int = 0
    taken: bool = True  # by an earlier trainer

    def answer(self, path: str, key: str) -> tuple[int, str]:
        self.said.append(path)
        if key != f"Bearer {KEY}":
            return 401, "unauthorized"
        if path == END:
            self.number, self.taken = self.number + 1, False
        elif path == BEGIN and self.taken:
            return 409, "a trainer has it already"
        self.taken = self.taken or path == BEGIN
        return 200, json.dumps({"instance": str(self.number)})


@pytest.fixture
def supervised() -> Iterator[tuple[Supervised, str]]:
    """A server of such answers, and its URL."""
    one = Supervised()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *about: object) -> None: ...

        def do_GET(self) -> None:
            status, body = one.answer(self.path, self.headers.get("Authorization", ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield one, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def external(url: str, key: str = KEY) -> ExternalServer:
    return ExternalServer("0.0", url, key, 1, ANSWER_S, ANSWER_S, ANSWER_S)


def test_a_server_that_another_trainer_had_is_ended_before_it_is_used(supervised: Any) -> None:
    one, url = supervised
    handle = external(url)
    handle.start(20.0)
    assert one.said == [BEGIN, END, BEGIN]
    assert handle.alive() == ""
    one.number += 1  # its supervisor has started it anew
    assert handle.alive() == "was started anew, and has not our weights"
    handle.close()
    assert one.said[-1] == END and handle.alive() == "not found yet"


def test_a_server_with_another_key_or_none_at_all_is_an_error_that_says_so(supervised: Any) -> None:
    _, url = supervised
    with pytest.raises(EngineError, match=r"0\.0 at http.*started with our key: answered 401"):
        external(url, "another").start(20.0)
    with pytest.raises(EngineError, match=r"was not ready within 0\.1 s: .* failed: .*refused"):
        external(f"http://127.0.0.1:{free_port()}").start(0.1)


def test_a_server_is_one_trainers() -> None:
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    server, sent = OneTrainer(app), []

    async def send(part: dict[str, Any]) -> None:
        sent.append(part)

    for path in (INSTANCE, BEGIN, BEGIN, INSTANCE, "/health"):
        asyncio.run(server({"type": "http", "path": path}, None, send))
    assert [part["status"] for part in sent[::2]] == [200, 200, 409, 200]
    assert sent[1] == sent[3] == sent[7]
    assert passed == ["/health"]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_what_lacks_the_key_does_not_reach_the_server(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    async def send(part: dict[str, Any]) -> None:
        sent.append(part)

    monkeypatch.setenv("VLLM_API_KEY", KEY)
    server = RequireKey(app)
    right = [(b"authorization", f"Bearer {KEY}".encode())]
    for headers in ([], [(b"authorization", b"Bearer another")], right):
        asyncio.run(server({"type": kind, "path": "/v1/realtime", "headers": headers}, None, send))
    assert passed == ["/v1/realtime"]
    refusals = {"http": "http.response.start", "websocket": "websocket.close"}
    assert [part["type"] for part in sent if part["type"] != "http.response.body"] == [refusals[kind]] * 2


CHOICE = {
    "finish_reason": "stop",
    "token_ids": [7, 2],
    "logprobs": {"content": [{"logprob": -1.5}, {"logprob": 0}]},
    "weight_versions": [{"version": "default"}],
}


@pytest.mark.parametrize(
    "answer",
    [
        "<html>Bad gateway</html>",
        '{"choices": [{"tok',
        "[" * 100_000,
        "null",
        '{"detail": "moved"}',
        '{"choices": [[]]}',
        *(json.dumps({"choices": [CHOICE | {name: wrong}]}) for name in CHOICE for wrong in (None, {}, "x")),
        json.dumps({"choices": [CHOICE | {"token_ids": [7, "2"]}]}),
        json.dumps({"choices": [CHOICE | {"token_ids": [7]}]}),
        json.dumps({"choices": [CHOICE | {"weight_versions": []}]}),
    ],
)
def test_an_answer_of_another_form_is_an_error_of_the_engine(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [json.dumps({"choices": [CHOICE]}), answer]
    monkeypatch.setattr(VLLMClient, "_request", lambda *asked: said.pop(0).encode())
    client = VLLMClient("ash", "", "", 600.0, 120.0, 30.0, Path())
    sampling = SamplingParams(n=1, max_new_tokens=3)
    ((sample,),) = client.generate([[1]], sampling)
    assert (sample.tokens, sample.logp, sample.finished, sample.policy_version) == (
        (7, 2),
        (-1.5, 0.0),
        True,
        0,
    )
    with pytest.raises(EngineError, match=r"engine ash (answered /inference/v1/generate with some|gave )"):
        client.generate([[1]], sampling)
    said.append(answer)
    with pytest.raises(EngineError, match="engine ash answered /inference/v1/generate with something else"):
        client.logp([1], [7, 2])


def test_nonsense_at_a_url_is_trouble_of_that_server(
    supervised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, url = supervised
    handle = external(url)
    handle.start(20.0)
    for body in ("<html>", "[]", '{"detail": ""}'):
        monkeypatch.setattr(one, "answer", lambda path, key, body=body: (200, body))
        assert f"answered {INSTANCE} with something else than asked for" in handle.alive()
    handle.close()
    with pytest.raises(
        EngineError, match=r"was not ready within 0\.1 s: answered /hpt/begin with something else"
    ):
        handle.start(0.1)


def test_each_step_of_an_update_has_the_deadline_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, float] = {}

    def request(client: VLLMClient, method: str, path: str, body: str, timeout_s: float) -> bytes:
        asked[path] = timeout_s
        return b""

    monkeypatch.setattr(VLLMClient, "_request", request)
    client = VLLMClient("fake", "", "", 600.0, 120.0, 30.0, Path(), _asleep=True)
    client.begin_update()
    client.load(0, ["checksum"])
    client.finish_update(1)
    assert len(asked) == 7 and set(asked.values()) == {120.0}


# With a real vLLM.


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of a running `hpt serve`, and the folder of its model."""
    pytest.importorskip("vllm", reason="vLLM is not installed: make .venv/.vllm")
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    model = toy.save_toy(folder / "model", head_dim=32)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hpt_mega.cli", "serve", *toy.settings(model), "rollout=vllm"),
            *("precision=fp32", f"run_dir={folder / 'serve'}"),
            *(f"rollout.server.start_deadline_s={START_S}", "--port", str(port)),
        ],
        env=os.environ | {KEY_VARIABLE: KEY, "OMP_NUM_THREADS": "1"},
        preexec_fn=die_with_parent,  # or a killed test leaves it serving
    )
    family = [process]
    try:
        yield f"http://127.0.0.1:{port}", model
        family += psutil.Process(process.pid).children(recursive=True)  # type: ignore[arg-type]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    _, alive = psutil.wait_procs(family[1:], timeout=20)
    assert not alive


class KilledAtBucket(RemoteClient):
    """Its server is killed in mid-update."""

    def load(self, index: int, checksums: Sequence[str]) -> None:
        if index == 1:
            (server,) = (one for one in psutil.process_iter() if is_server(one, self.url))
            server.kill()
        super().load(index, checksums)


def is_server(process: psutil.Process, url: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return (
        words[1:3] == ["-m", "vllm.entrypoints.launchers.api_server.entry"]
        and url.rpartition(":")[2] in words
    )


def updates(url: str, model: Path) -> list[list[float]]:
    """One of two ranks on two hosts; the leader's log-probabilities after each update."""
    from tests.megatron.tiny import build_policy, config, leave_job

    policy = build_policy(model, config(ParallelConfig(pp=2)), train=False)
    rank = dist.get_rank()
    near = sync_module.WeightSync(policy.model, policy.family, policy.shape, policy.layout, BUCKET_BYTES)
    sync_module.socket.gethostname = lambda: f"host{rank}"  # type: ignore[assignment]
    far = sync_module.WeightSync(policy.model, policy.family, policy.shape, policy.layout, BUCKET_BYTES)
    assert (far._shared is None) == (rank == 1) and near._shared is not None
    found: list[list[float]] = []
    handle = external(url)

    def bring(sync: Any, client: VLLMClient | None, scale: float) -> None:
        for chunk in policy.model.chunks:
            for parameter in chunk.parameters():
                parameter.data.mul_(scale)
        if client:
            client.connect(sync.path, sync.plan)
        sync.send([client] if client else [], len(found))
        if client:
            found.append(client.logp(PROMPT, RESPONSE))

    def start() -> RemoteClient | None:
        if rank == 0:
            handle.start(START_S)
            return handle.client
        return None

    remote = start()
    through_memory = VLLMClient("near", url, KEY, ANSWER_S, ANSWER_S, ANSWER_S, Path()) if remote else None
    bring(near, through_memory, 1.0)
    bring(far, remote, 0.5)
    bring(far, remote, 2.0)
    if remote:
        remote.__class__ = KilledAtBucket
    began = time.monotonic()
    with pytest.raises((EngineError, RuntimeError), match=r"engine 0\.0 at http|an engine did not take"):
        far.send([remote] if remote else [], 3)
    assert time.monotonic() - began < ANSWER_S
    bring(far, start(), 1.0)
    for sync in (near, far):
        sync.close()
    leave_job()
    return found


@pytest.mark.timeout(2 * START_S)
def test_weights_of_two_hosts_reach_a_server_bit_by_bit_which_is_killed_and_taken_again(
    served: tuple[str, Path], tmp_path: Path
) -> None:
    memory, halved, network, again = run_ranks(updates, 2, tmp_path, *served)[0]
    assert memory == network == again
    assert max(abs(a - b) for a, b in zip(memory, halved, strict=True)) > 1e-3


@pytest.mark.timeout(2 * START_S)
def test_a_run_is_served_by_a_server_it_did_not_start(served: tuple[str, Path], tmp_path: Path) -> None:
    url, model = served
    done = subprocess.run(
        [
            *(sys.executable, "-m", "hpt_mega.cli", "train", *toy.settings(model), "parallel=pp2"),
            *("precision=fp32", "rollout=vllm", "rollout.server.bucket_mib=2", "trainer.steps=2"),
            *toy.ON_ALL_ROLLOUTS,
            *(f"run_dir={tmp_path / 'run'}", f"rollout.server.urls=[{url}]"),
            f"rollout.server.start_deadline_s={START_S}",
        ],
        env=os.environ | {KEY_VARIABLE: KEY},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = toy.metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(record["sync/probe_gap"] < 1e-4 and record["logp_gap_max"] < 1e-3 for record in records[1:])
    assert not list((tmp_path / "run/logs").glob("engine*.log"))  # none was started here
    written = [file.read_text(errors="replace") for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not any(KEY in text for text in written)
