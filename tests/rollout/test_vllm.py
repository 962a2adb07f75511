"""A real vLLM (CPU build) given weights live, killed, stopped, and caught with stale ones."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import AsyncMock

import psutil
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from hpt_mega.rollout.engine import EngineError, SamplingParams
from hpt_mega.rollout.vllm import VLLMClient, VLLMServer
from tests.ranks import run_ranks
from tests.rollout import served

pytest.importorskip("vllm", reason="vLLM is not installed: make .venv/.vllm")

START_S = 200.0
LOGP_BOUND = 2e-5  # fp32; log-probabilities of about -10
BUCKET = 300_000  # a layer lies in several, its tensors are whole
SMALL_BUCKET = 40_000  # smaller than the tensors, which are cut by rows
GREEDY = SamplingParams(n=1, max_new_tokens=12, temperature=0.0)


def running(folder: Path, log: Path, **settings: object) -> VLLMServer:
    server = served.server(folder, log, **settings)  # type: ignore[arg-type]
    server.start(START_S)
    return server


def processes_of(server: VLLMServer) -> list[psutil.Process]:
    parent = served.process_of(server)
    return [parent, *parent.children(recursive=True)]


def generate_for_ever(server: VLLMServer) -> None:
    while True:
        server.client.generate(served.PROMPTS * 4, SamplingParams(n=8, max_new_tokens=50))


def assert_all_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, [process.cmdline() for process in alive]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VLLMServer, Path]]:
    """A server on a tied Llama, and the folder of the weights that its trainer has."""
    folder = tmp_path_factory.mktemp("tied")
    before, after = served.save_models(folder, "llama", tied=True)
    server = running(before, folder / "tied.log")
    yield server, after
    server.close()


@pytest.mark.parametrize(("tp", "pp", "bucket"), [(2, 1, BUCKET), (1, 2, SMALL_BUCKET)])
def test_a_tied_model_serves_the_weights_of_any_trainer_layout(
    tied: tuple[VLLMServer, Path], tp: int, pp: int, bucket: int, tmp_path: Path
) -> None:
    server, after = tied
    buckets = run_ranks(served.bring, 2, tmp_path, server.client, after, {"tp": tp, "pp": pp}, bucket, 1)
    assert min(buckets) >= 10
    assert served.largest_gap(server.client, served.reference_logp(after)) <= LOGP_BOUND


def test_samples_are_stamped_seeded_and_scored_as_drawn(tied: tuple[VLLMServer, Path]) -> None:
    server, _ = tied
    sampling = SamplingParams(n=3, max_new_tokens=9, temperature=1.0, seed=5)
    one = server.client.generate(served.PROMPTS, sampling)
    assert [len(group) for group in one] == [3, 3, 3]
    assert one == server.client.generate(served.PROMPTS, sampling)
    assert len({sample.tokens for group in one for sample in group}) == 9
    for prompt, group in zip(served.PROMPTS, one, strict=True):
        scored = server.client.logp(prompt, group[0].tokens)
        assert scored == pytest.approx(group[0].logp, abs=LOGP_BOUND)
        assert not group[0].finished


def test_a_stop_token_ends_a_sample_and_belongs_to_it(tied: tuple[VLLMServer, Path]) -> None:
    server, _ = tied
    ((free,),) = server.client.generate(served.PROMPTS[:1], GREEDY)
    stop = free.tokens[4]
    sampling = SamplingParams(n=1, max_new_tokens=12, temperature=0.0, stop_tokens=(stop,))
    ((stopped,),) = server.client.generate(served.PROMPTS[:1], sampling)
    assert stopped.finished
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]


def test_every_endpoint_but_health_asks_for_the_key(tied: tuple[VLLMServer, Path]) -> None:
    server, _ = tied
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    base = server.client.url
    assert opener.open(f"{base}/health", timeout=20).status == 200
    for path in ("/pause", "/update_weights", "/inference/v1/generate", "/collective_rpc"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            opener.open(urllib.request.Request(base + path, json.dumps({}).encode()), timeout=20)
    assert server.client.key not in " ".join(served.process_of(server).cmdline())
    assert server.client.key not in server.log.read_text()


def test_a_mixture_under_tensor_parallel_serving_gets_the_experts_of_all_ranks(tmp_path: Path) -> None:
    before, after = served.save_models(tmp_path, "qwen3_moe", tied=False)
    server = running(before, tmp_path / "mixture.log", tp=2)
    try:
        run_ranks(served.bring, 2, tmp_path, server.client, after, {"tp": 2, "pp": 1, "ep": 2}, BUCKET, 1)
        assert served.largest_gap(server.client, served.reference_logp(after)) <= LOGP_BOUND
        processes = processes_of(server)
    finally:
        server.close()
    assert_all_end(processes)


WITHOUT_REPAIR = '''
"""As vLLM's own reload would be: the packed output layer of a tied model is left as it was."""
import importlib.abc, importlib.util, sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "hpt_mega.rollout.vllm_worker":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module._pack_tied_output = lambda model: None
        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
'''


def test_stale_weights_of_a_tied_model_are_seen_by_the_probe_and_a_killed_server_by_its_peers(
    tmp_path: Path,
) -> None:
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(WITHOUT_REPAIR)
    before, after = served.save_models(tmp_path, "llama", tied=True)
    root = str(Path(served.__file__).parents[2])
    server = running(before, tmp_path / "stale.log", PYTHONPATH=f"{tmp_path / 'hooks'}:{root}")
    processes = processes_of(server)
    try:
        run_ranks(served.bring, 1, tmp_path, server.client, after, {"tp": 1, "pp": 1}, BUCKET, 1)
        assert served.largest_gap(server.client, served.reference_logp(after)) > 0.1
        killed = threading.Timer(1.0, processes[0].kill)
        killed.start()
        with pytest.raises(EngineError, match=r"engine stale .*(failed|answered)[\s\S]*last lines of"):
            generate_for_ever(server)
        assert_all_end(processes)  # vLLM's own processes would outlive their parent; the guard ends them
        assert server.alive() == "was ended by signal 9"
    finally:
        server.close()


def test_vllm_understands_sleep_and_that_an_update_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.rl.online import api_router as updates
    from vllm.entrypoints.serve.dev.sleep import api_router as sleep

    app = FastAPI()
    app.state.engine_client = engine = AsyncMock()
    for router in (sleep.router, updates.router):
        app.include_router(router)

    def request(client: VLLMClient, method: str, path: str, body: str, timeout_s: float) -> bytes:
        return TestClient(app).request(method, path, content=body).raise_for_status().content

    monkeypatch.setattr(VLLMClient, "_request", request)
    client = VLLMClient("fake", 0, "", 5.0, 5.0, 5.0, Path())
    client.sleep()
    for _ in range(2):
        client.begin_update()
    asked = [name for name, _, _ in engine.mock_calls if not name.startswith("wake_up()")]
    assert asked == [
        *("sleep", "wake_up", "pause_generation", "start_weight_update"),
        *("pause_generation", "start_weight_update"),
    ]
    assert engine.sleep.call_args.args == (2, "abort")


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    server = served.server(tmp_path, tmp_path / "broken.log")
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"engine broken ended with exit code 1 at its start[\s\S]*Error"):
        server.start(START_S)
    assert time.monotonic() - began < START_S
