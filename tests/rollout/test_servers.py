"""A replica's servers are those of the config, each with its own devices. None is started here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hpt_mega.config import ConfigError, compose
from hpt_mega.process import PortClaim, free_port
from hpt_mega.rollout import servers
from hpt_mega.rollout.engine import EngineError
from hpt_mega.rollout.external import KEY_VARIABLE, ExternalServer, rollout_key
from hpt_mega.rollout.handle import EngineHandle
from hpt_mega.rollout.sglang import Settings, SGLangEngine
from hpt_mega.rollout.vllm import VLLMClient, VLLMServer

RANKS = [2, 3, 6, 7]  # of the second of two replicas with tp=2 and pp=2


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The engines that a config makes, by name."""

    def build(*overrides: str) -> dict[str, EngineHandle]:
        made: dict[str, EngineHandle] = {}
        monkeypatch.setattr(servers, "Fleet", lambda given, *rest, **more: made.update(given))
        monkeypatch.setattr(servers.dist, "get_process_group_ranks", lambda group: RANKS)
        layout = SimpleNamespace(dp_rank=1, dp_size=2, replica_group=None, world_size=8)
        cfg = compose([f"run_dir={tmp_path}", "parallel.tp=3", *overrides])
        servers.build_fleet(cfg, cast(Any, layout), cast(Any, None))
        return made

    return build


def test_each_server_has_a_name_and_a_log_of_its_own(engines: Any, tmp_path: Path) -> None:
    deadlines = ("rollout.server.update_deadline_s=5", "rollout.server.answer_deadline_s=7")
    made = engines("rollout=vllm", "rollout.server.engines=3", *deadlines)
    assert list(made) == ["1.0", "1.1", "1.2"]
    assert all(isinstance(engine, VLLMServer) for engine in made.values())
    assert {engine.log for engine in made.values()} == {
        tmp_path / "logs" / f"engine1.{number}.log" for number in range(3)
    }
    assert (made["1.2"].update_deadline_s, made["1.2"].answer_deadline_s) == (5, 7)
    assert made["1.2"].environment == {}


def test_sglang_is_launched_by_us_with_weights_through_memory(engines: Any) -> None:
    lengths = ("data.max_prompt_tokens=200", "rollout.max_new_tokens=61")
    made = engines("rollout=sglang", "precision=bf16", "trainer.deterministic=true", *lengths)
    (engine,) = made.values()
    assert isinstance(engine, SGLangEngine)
    assert engine._launch is not None and engine._settings.weights == "memory"
    assert engine._launch.dtype == "bfloat16" and engine._launch.repeatable
    assert engine._launch.max_model_len == 261


@pytest.mark.parametrize(("visible", "expected"), [("", ["2,3", "6,7"]), ("7,6,5,4,3,2,1,0", ["5,4", "1,0"])])
def test_servers_share_the_gpus_of_their_replicas_ranks(
    engines: Any, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    made = engines("rollout=vllm", "rollout.server.engines=2", "rollout.server.tp=2")
    assert [engine.environment["CUDA_VISIBLE_DEVICES"] for engine in made.values()] == expected


def test_a_deterministic_run_asks_vllm_for_answers_that_no_other_request_changes(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeatable = ("rollout=vllm", "trainer.deterministic=true")
    assert all(engine.environment == {} for engine in engines(*repeatable).values())  # on the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert all(engine.environment["VLLM_BATCH_INVARIANT"] == "1" for engine in engines(*repeatable).values())


def test_a_replica_on_two_hosts_gives_its_server_the_gpus_of_its_leaders(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    made = engines("rollout=vllm", "rollout.server.tp=2")
    assert [engine.environment["CUDA_VISIBLE_DEVICES"] for engine in made.values()] == ["2,3"]
    with pytest.raises(ConfigError, match="2 x 2 and the replica has 2 GPUs on its leader's host"):
        engines("rollout=vllm", "rollout.server.tp=2", "rollout.server.engines=2")


def test_a_port_that_another_server_has_is_an_error_before_a_second_one_shares_it(tmp_path: Path) -> None:
    port = free_port()
    other = PortClaim("127.0.0.1", port)
    server = servers.vllm_server(compose([f"run_dir={tmp_path}"]), "node", tmp_path / "log", {})
    server.port = port
    with pytest.raises(
        EngineError, match=rf"port {port} of 127\.0\.0\.1 cannot be had .*choose another port"
    ):
        server.start(1.0)
    other.release()
    assert not (tmp_path / "log").exists()


def test_a_servers_key_is_not_told_by_what_quotes_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("serving with a-key\n")
    client = VLLMClient("ash", "http://127.0.0.1:1", "a-key", 1.0, 1.0, 1.0, log)
    server = servers.vllm_server(compose([f"run_dir={tmp_path}"]), "ash", log, {})
    server._key = "a-key"
    settings = Settings(tp=1, weights="memory", request_s=1.0, update_s=1.0, control_s=1.0)
    sglang = SGLangEngine("elm", settings, log, url="http://127.0.0.1:1", key="a-key")
    told = [str(client.error("broke")), server.log_tail(3), sglang.log_tail(3), str(sglang._error("broke"))]
    assert all("a-key" not in text and "serving with ***" in text for text in told)


def test_the_key_is_one_word_that_http_can_carry_and_no_message_tells_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, " a-secret\r\n")
    assert rollout_key() == "a-secret"
    for wrong in ("a-secret\nX: y", "a-secret b", "a-secret€", "a-secret\x7f"):
        monkeypatch.setenv(KEY_VARIABLE, wrong)
        with pytest.raises(ConfigError, match="expected one word of printable ASCII") as raised:
            rollout_key()
        assert "a-secret" not in str(raised.value)
    monkeypatch.setenv(KEY_VARIABLE, " \n")
    with pytest.raises(ConfigError, match=f"{KEY_VARIABLE} is not set"):
        rollout_key()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_servers_at_urls_are_dealt_over_the_replicas_and_none_is_started(
    engines: Any, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    urls = [f"http://127.0.0.{host}:30000" for host in range(1, 6)]
    made = engines(f"rollout={engine}", f"rollout.server.urls=[{','.join(urls)}]", "rollout.server.tp=4")
    assert list(made) == ["1.0", "1.1"]
    for one, url in zip(made.values(), [urls[1], urls[3]], strict=True):
        assert "secret" not in repr(one)
        if engine == "vllm":
            assert isinstance(one, ExternalServer)
            assert (one.url, one.key, one.workers) == (url, "secret", 4)
        else:
            assert isinstance(one, SGLangEngine) and one._launch is None
            assert (one._url, one._key, one._settings.weights) == (url, "secret", "broadcast")
            assert one._settings.group_host == "127.0.0.1"
