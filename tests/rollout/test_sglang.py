"""The SGLang engine against a server that checks every request with the real package's own definitions."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpt_mega.rollout.dispatch import Fleet, Weights
from hpt_mega.rollout.engine import EngineError, SamplingParams
from hpt_mega.rollout.fleet import Limits
from hpt_mega.rollout.sglang import Launch, Settings, SGLangEngine

pytestmark = pytest.mark.timeout(120)
CONTRACT = Path(__file__).parent / "sglang_contract.py"
_spec = importlib.util.spec_from_file_location("sglang_contract", CONTRACT)
assert _spec is not None and _spec.loader is not None
sglang_contract = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sglang_contract)

KEY = "a-key-of-the-test"
SETTINGS = Settings(tp=1, weights="memory", request_s=20.0, update_s=20.0, control_s=5.0)
SAMPLING = SamplingParams(n=3, max_new_tokens=7, seed=11, temperature=0.7, top_p=0.9, stop_tokens=(2, 5))
PROMPTS = [[3, 4, 9], [7], [8, 8]]


@pytest.fixture
def contract() -> Iterator[Any]:
    """The contract; any request it does not accept fails the test, unless that clears `violations`."""
    one = sglang_contract.Contract(KEY)
    yield one
    for peer in one.groups.values():
        peer.close()
    assert one.violations == []


@pytest.fixture
def engine(contract: Any, tmp_path: Path) -> Iterator[SGLangEngine]:
    server = sglang_contract.serve(contract)
    one = SGLangEngine(
        "oak", SETTINGS, tmp_path / "oak.log", url=f"http://127.0.0.1:{server.server_port}", key=KEY
    )
    one.start(10.0)
    yield one
    one.close()
    server.shutdown()
    server.server_close()


def tensors(seed: int = 0) -> list[tuple[str, Tensor]]:
    """Of odd sizes and unequal widths, so that a bucket in this order would not be aligned."""
    draw = torch.Generator().manual_seed(seed)
    return [
        ("embed", torch.randn(5, 3, generator=draw).bfloat16()),
        ("scale", torch.randn(7, generator=draw)),
        ("experts", torch.randn(3, 3, generator=draw).to(torch.float8_e4m3fn)),
        ("norm", torch.randn(1, 9, generator=draw)[:, ::2]),
        ("head", torch.randn(3, 5, generator=draw).bfloat16().T),
    ]


def buckets(seed: int = 0) -> list[list[tuple[str, Tensor]]]:
    return [tensors(seed)[:4], [], tensors(seed)[4:]]


def assert_holds(contract: Any, seed: int) -> None:
    assert sorted(contract.weights) == sorted(name for name, _ in tensors(seed))
    for name, tensor in tensors(seed):
        assert contract.weights[name].dtype == tensor.dtype
        assert torch.equal(contract.weights[name].float(), tensor.float()), name


def test_weights_through_memory_arrive_bit_for_bit_and_the_receipt_tells(
    engine: SGLangEngine, contract: Any
) -> None:
    receipt = engine.update(buckets(), 4)
    assert_holds(contract, 0)
    assert receipt.policy_version == 4 and contract.version == "4" and not contract.paused
    raw = tensors()[1][1].numpy().tobytes()
    assert receipt.checksums["0/scale"] == hashlib.sha256(raw).hexdigest()
    assert len(receipt.checksums) == 5


def test_an_update_pauses_first_and_serves_last(engine: SGLangEngine, contract: Any) -> None:
    contract.paths.clear()
    engine.update(buckets(), 1)
    assert contract.paths == [
        "/pause_generation",
        "/update_weight_version",
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/flush_cache",
        "/weights_checker",
        "/update_weight_version",
        "/continue_generation",
    ]


def test_each_rank_of_the_server_gets_a_message_of_its_own(engine: SGLangEngine, contract: Any) -> None:
    contract.tp, engine._settings = 3, replace(SETTINGS, tp=3)
    receipt = engine.update(buckets(), 1)
    assert {name.split("/")[0] for name in receipt.checksums} == {"0", "1", "2"}


def test_weights_by_broadcast_arrive_bit_for_bit_again_and_again(engine: SGLangEngine, contract: Any) -> None:
    engine._settings = replace(SETTINGS, weights="broadcast", group_backend="gloo")
    for seed in (0, 1):
        engine.update(buckets(seed), seed)
        assert_holds(contract, seed)
    assert contract.paths.count("/init_weights_update_group") == 1
    engine.close()
    assert contract.groups == {}


@pytest.mark.parametrize("way", ["memory", "broadcast"])
def test_an_update_that_breaks_half_way_serves_nothing_until_the_next_succeeds(
    engine: SGLangEngine, contract: Any, way: Any
) -> None:
    engine._settings = replace(SETTINGS, weights=way, group_backend="gloo")
    engine.update(buckets(), 1)

    def broken() -> Iterator[list[tuple[str, Tensor]]]:
        yield tensors(1)[:2]
        raise EngineError("a rank of the trainer died")

    with pytest.raises(EngineError, match="a rank of the trainer died"):
        engine.update(broken(), 2)
    assert contract.paused and contract.version == "unverified"
    with pytest.raises(EngineError, match="holds weights of version None, asked for 1"):
        engine.generate(PROMPTS, SAMPLING, 1)
    assert engine.alive() == ""
    engine.update(buckets(2), 2)
    assert_holds(contract, 2)


def test_a_broadcast_that_the_server_refuses_does_not_hang(engine: SGLangEngine, contract: Any) -> None:
    engine._settings = replace(SETTINGS, weights="broadcast", group_backend="gloo")
    contract.update_weights_from_distributed = lambda body: contract.outcome(False, "unknown tensor")
    began = time.monotonic()
    with pytest.raises(
        EngineError, match=r"answered 400 to /update_weights_from_distributed.*unknown tensor"
    ):
        engine.update(buckets(), 1)
    assert time.monotonic() - began < SETTINGS.update_s


def test_samples_keep_the_protocol_and_do_not_depend_on_how_prompts_are_dealt(
    engine: SGLangEngine, contract: Any
) -> None:
    engine.update(buckets(), 1)
    groups = engine.generate(PROMPTS, SAMPLING, 1)
    assert [len(group) for group in groups] == [3, 3, 3]
    samples = [sample for group in groups for sample in group]
    assert len({sample.tokens for sample in samples}) > 3  # a seed of its own each
    for sample in samples:
        assert sample.policy_version == 1
        assert sample.logp == tuple(-token / 8 for token in sample.tokens)
        assert sample.finished == (sample.tokens[-1] in SAMPLING.stop_tokens)
        assert sample.finished or len(sample.tokens) == 7
    assert any(s.finished for s in samples) and not all(s.finished for s in samples)
    alone = [
        engine.generate([prompt], replace(SAMPLING, seed=SAMPLING.seed + 3 * i), 1)[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert alone == groups


def test_without_stop_tokens_responses_have_full_length(engine: SGLangEngine) -> None:
    engine.update(buckets(), 1)
    for group in engine.generate(PROMPTS, replace(SAMPLING, stop_tokens=()), 1):
        assert all(len(sample.tokens) == 7 and not sample.finished for sample in group)


def test_a_stop_that_was_not_asked_for_is_an_error_that_names_the_token(
    engine: SGLangEngine, contract: Any
) -> None:
    engine.update(buckets(), 1)
    contract.token = lambda *about: sglang_contract.END_OF_TEXT
    with pytest.raises(
        EngineError, match="stopped at token 2, its model's end of text; add it to stop_tokens"
    ):
        engine.generate(PROMPTS, replace(SAMPLING, stop_tokens=(5,)), 1)


def test_a_sample_of_other_weights_than_asked_for_is_refused(engine: SGLangEngine, contract: Any) -> None:
    engine.update(buckets(), 1)
    contract.version = "7"  # somebody else changed them
    with pytest.raises(EngineError, match=r"sampled with weights of \['7'\], expected 1"):
        engine.generate(PROMPTS, SAMPLING, 1)


def test_known_tokens_are_scored_from_the_response_on(engine: SGLangEngine) -> None:
    engine.update(buckets(), 1)
    assert engine.logp([3, 4, 9], [16, 5]) == [-1.0, -5 / 16]


@pytest.mark.parametrize("how", ["abort", "update"])
def test_requests_in_flight_are_ended_by_abort_and_by_new_weights(
    engine: SGLangEngine, contract: Any, how: str
) -> None:
    engine.update(buckets(), 1)
    contract.hold.clear()
    failures: list[str] = []

    def ask() -> None:
        try:
            engine.generate(PROMPTS, SAMPLING, 1)
        except EngineError as error:
            failures.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    while contract.paths.count("/generate") < len(PROMPTS):
        time.sleep(0.01)
    time.sleep(0.1)
    engine.abort() if how == "abort" else engine.update(buckets(2), 2)
    asking.join(10.0)
    assert len(failures) == 1 and "gave a request up: Abort in waiting queue" in failures[0]


def test_an_engine_that_slept_needs_weights_before_it_serves(engine: SGLangEngine, contract: Any) -> None:
    engine.update(buckets(), 1)
    engine.sleep()
    assert contract.asleep and engine.alive() == ""
    with pytest.raises(EngineError, match="holds weights of version None"):
        engine.generate(PROMPTS, SAMPLING, 1)
    engine.wake()
    engine.update(buckets(1), 2)
    assert_holds(contract, 1)
    assert len(engine.generate(PROMPTS, SAMPLING, 2)) == 3


def test_a_request_that_the_package_would_not_understand_is_found(
    engine: SGLangEngine, contract: Any
) -> None:
    for path, body in (
        ("/generate", {"input_tokens": [1]}),
        ("/generate", {"input_ids": [1], "sampling_params": {"max_tokens": 3}}),
        ("/pause_generation", {"mode": "keep"}),
        ("/update_weight_version", {"new_version": 3}),
        ("/update_weights_from_distributed", {"names": ["a"]}),
        ("/reset_prefix_cache", {}),
    ):
        with pytest.raises(EngineError, match="answered 422"):
            engine._post(path, body, 5.0)
    assert len(contract.violations) == 6
    assert "GenerateReqInput has no field input_tokens" in contract.violations[0]
    contract.violations.clear()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("UpdateWeightsFromTensorReqInput", "load_format"),
        ("PauseGenerationReqInput", "mode"),
        ("CheckWeightsReqInput", "action"),
    ],
)
def test_a_field_that_a_newer_version_renames_is_found(
    engine: SGLangEngine, contract: Any, monkeypatch: pytest.MonkeyPatch, message: str, field: str
) -> None:
    fields = sglang_contract.SCHEMA["messages"][message]
    monkeypatch.setitem(fields, f"new_{field}", fields[field])
    monkeypatch.delitem(fields, field)
    with pytest.raises(EngineError, match=f"{message} has no field {field}"):
        engine.update(buckets(), 1)
    contract.violations.clear()


def test_a_group_that_the_server_refuses_is_an_error_with_its_reason(
    engine: SGLangEngine, contract: Any
) -> None:
    engine._settings = replace(SETTINGS, weights="broadcast", group_backend="gloo", update_s=2.0)
    contract.init_weights_update_group = lambda body: contract.outcome(False, "no such backend")
    with pytest.raises(EngineError, match=r"answered 400 to /init_weights_update_group.*no such backend"):
        engine.update(buckets(), 1)


def test_a_wrong_key_and_a_server_that_is_not_there_are_errors_within_the_deadline(
    engine: SGLangEngine, tmp_path: Path
) -> None:
    stranger = SGLangEngine("elm", SETTINGS, tmp_path / "elm.log", url=engine._url, key="wrong")
    with pytest.raises(EngineError, match=r"did not answer within 0.5 s; engine elm answered 401"):
        stranger.start(0.5)
    nobody = SGLangEngine("ash", SETTINGS, tmp_path / "ash.log", url="http://127.0.0.1:9", key="")
    with pytest.raises(EngineError, match=r"did not answer within 0.5 s; engine ash /health failed"):
        nobody.start(0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give either launch or url"),
        ({"url": "oak:3000"}, "expected http://HOST:PORT"),
        ({"url": "http://node7:3000"}, "server is at node7; use broadcast"),
    ],
)
def test_engines_that_cannot_be_are_refused(arguments: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        SGLangEngine("elm", SETTINGS, tmp_path / "elm.log", **arguments)


@pytest.fixture
def launch(tmp_path: Path) -> Callable[[str], Launch]:
    """A `python -m sglang.launch_server` that is the contract, with the arguments of the real one."""
    package = tmp_path / "site" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    runs = f"import runpy; runpy.run_path({str(CONTRACT)!r}, run_name='__main__')"
    (package / "launch_server.py").write_text(runs)
    return lambda model: Launch(
        Path(model),
        "bfloat16",
        64,
        8,
        0.8,
        True,
        {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
    )


def test_our_own_servers_are_a_fleet_that_survives_a_kill(
    launch: Callable[[str], Launch], tmp_path: Path
) -> None:
    limits = Limits(60.0, 20.0, 20.0, 20.0, 0.1, 1.0, failures=3, updates=2, attempts=4, slots=2)
    engines = {
        name: SGLangEngine(name, SETTINGS, tmp_path / f"{name}.log", launch=launch("tiny"))
        for name in ("ash", "elm")
    }
    prompts = [[3, q] for q in range(12)]
    with Fleet(engines, limits, heartbeat_s=0.2) as fleet:
        fleet.update(Weights(1, buckets, lambda engine, receipt: ""))
        before = fleet.generate(prompts, SAMPLING)
        commands = Path(f"/proc/{server_pid(engines['ash'])}/cmdline").read_text()
        assert engines["ash"]._key not in commands and not list(tmp_path.glob("*.yaml"))
        assert (tmp_path / "ash.log").stat().st_mode & 0o77 == 0
        os.kill(server_pid(engines["ash"]), signal.SIGKILL)
        assert fleet.generate(prompts, SAMPLING) == before
        pids = [server_pid(engine) for engine in engines.values() if engine.alive() == ""]
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def server_pid(engine: SGLangEngine) -> int:
    """The process that the guard runs."""
    assert engine._process is not None
    guard = engine._process._guard.pid
    return int(Path(f"/proc/{guard}/task/{guard}/children").read_text().split()[0])


def test_a_server_that_cannot_start_is_an_error_with_the_end_of_its_log(
    launch: Callable[[str], Launch], tmp_path: Path
) -> None:
    engine = SGLangEngine("ash", SETTINGS, tmp_path / "ash.log", launch=launch("broken"))
    with pytest.raises(EngineError) as raised:
        engine.start(60.0)
    assert "ended with exit code 1 at its start" in str(raised.value)
    assert "| RuntimeError: this model cannot be loaded" in str(raised.value)
    assert engine.alive() == "not started"


def test_the_committed_schema_is_that_of_the_package_where_it_is_at_hand(tmp_path: Path) -> None:
    wheel = os.environ.get("SGLANG_WHEEL")
    if not wheel:
        pytest.skip("set SGLANG_WHEEL to a wheel of sglang (39 MB: pip download --no-deps sglang)")
    tool = Path(__file__).parents[2] / "tools" / "sglang_schema.py"
    subprocess.run([sys.executable, tool, wheel, "--out", tmp_path / "schema.json"], check=True, timeout=100)
    assert json.loads((tmp_path / "schema.json").read_text()) == sglang_contract.SCHEMA
