"""The SGLang engine against a server that checks every request with the real package's own definitions."""

from __future__ import annotations

import importlib.util
import itertools
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

from hpt_mega.process import free_port
from hpt_mega.resharding.planner import Plan, plan_update
from hpt_mega.resharding.transport import SharedBuckets
from hpt_mega.rollout import sglang
from hpt_mega.rollout.dispatch import Fleet
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.fleet import Limits
from hpt_mega.rollout.handle import EngineClient
from hpt_mega.rollout.sglang import Launch, Settings, SGLangEngine
from hpt_mega.spec import Spec

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
        ("embed", torch.randn(41, 3, generator=draw).bfloat16()),
        ("scale", torch.randn(7, generator=draw)),
        ("experts", torch.randn(3, 3, generator=draw).to(torch.float8_e4m3fn)),
        ("norm", torch.randn(1, 9, generator=draw)[:, ::2]),
        ("head", torch.randn(3, 5, generator=draw).bfloat16().T),
    ]


class Trainer:
    """Its tensors in shared buckets that are smaller than the largest of them."""

    def __init__(self) -> None:
        self.plan: Plan = plan_update({name: Spec.of(tensor) for name, tensor in tensors()}, 64)
        self.shared = SharedBuckets.create(64)

    def fill(self, index: int, seed: int) -> None:
        given = dict(tensors(seed))
        for slot in self.plan.buckets[index].slots:
            rows = given[slot.name][slot.first_row : slot.first_row + slot.rows]
            slot.view(self.shared.buffer(index)).copy_(rows)

    def update(self, engine: SGLangEngine, version: int, seed: int = 0) -> None:
        engine.connect(self.shared.path, self.plan)
        engine.begin_update()
        for index in range(len(self.plan.buckets)):
            self.fill(index, seed)
            engine.load(index, [])
        engine.finish_update(version)


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    one = Trainer()
    yield one
    one.shared.close()


def assert_holds(contract: Any, seed: int) -> None:
    assert sorted(contract.weights) == sorted(name for name, _ in tensors(seed))
    for name, tensor in tensors(seed):
        assert contract.weights[name].dtype == tensor.dtype
        assert torch.equal(contract.weights[name].float(), tensor.float()), name


def test_weights_through_memory_arrive_bit_for_bit_and_whole(
    engine: SGLangEngine, contract: Any, trainer: Trainer
) -> None:
    assert any(not slot.is_whole for bucket in trainer.plan.buckets for slot in bucket.slots)
    trainer.update(engine, 4)
    assert_holds(contract, 0)
    assert contract.version == "4" and not contract.paused


def test_an_update_pauses_first_and_serves_last(
    engine: SGLangEngine, trainer: Trainer, contract: Any
) -> None:
    contract.paths.clear()
    trainer.update(engine, 1)
    assert [path for path, _ in itertools.groupby(contract.paths)] == [
        "/pause_generation",
        "/update_weight_version",
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/flush_cache",
        "/update_weight_version",
        "/continue_generation",
    ]


def test_each_rank_of_the_server_gets_a_message_of_its_own(
    engine: SGLangEngine, trainer: Trainer, contract: Any
) -> None:
    contract.tp, engine._settings = 3, replace(SETTINGS, tp=3)
    trainer.update(engine, 1)
    assert_holds(contract, 0)


def test_weights_by_broadcast_arrive_bit_for_bit_again_and_again(
    engine: SGLangEngine, trainer: Trainer, contract: Any
) -> None:
    engine._settings = replace(SETTINGS, weights="broadcast", group_backend="gloo")
    for seed in (0, 1):
        trainer.update(engine, seed, seed)
        assert_holds(contract, seed)
    assert contract.paths.count("/init_weights_update_group") == 1
    engine.close()
    assert contract.groups == {}


@pytest.mark.parametrize("way", ["memory", "broadcast"])
def test_an_update_that_breaks_half_way_serves_nothing_until_the_next_succeeds(
    engine: SGLangEngine, trainer: Trainer, contract: Any, way: Any
) -> None:
    engine._settings = replace(SETTINGS, weights=way, group_backend="gloo")
    trainer.update(engine, 1)

    contract.update_weights_from_tensor = lambda body: contract.outcome(False, "out of memory")
    contract.update_weights_from_distributed = contract.update_weights_from_tensor
    with pytest.raises(EngineError, match="out of memory"):
        trainer.update(engine, 2, 1)
    del contract.update_weights_from_tensor, contract.update_weights_from_distributed
    assert contract.paused and contract.version == "unverified"
    with pytest.raises(EngineError, match="has no weights to sample with"):
        engine.generate(PROMPTS, SAMPLING)
    assert engine.alive() == ""
    trainer.update(engine, 2, 2)
    assert_holds(contract, 2)


def test_a_broadcast_that_the_server_refuses_does_not_hang(
    engine: SGLangEngine, trainer: Trainer, contract: Any
) -> None:
    engine._settings = replace(SETTINGS, weights="broadcast", group_backend="gloo")
    contract.update_weights_from_distributed = lambda body: contract.outcome(False, "unknown tensor")
    began = time.monotonic()
    with pytest.raises(
        EngineError, match=r"answered 400 to /update_weights_from_distributed.*unknown tensor"
    ):
        trainer.update(engine, 1)
    assert time.monotonic() - began < SETTINGS.update_s


def test_samples_keep_the_protocol_and_do_not_depend_on_how_prompts_are_dealt(
    engine: SGLangEngine, trainer: Trainer, contract: Any
) -> None:
    trainer.update(engine, 1)
    groups = engine.generate(PROMPTS, SAMPLING)
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
        engine.generate([prompt], replace(SAMPLING, seed=SAMPLING.seed + 3 * i))[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert alone == groups


def test_without_stop_tokens_responses_have_full_length(engine: SGLangEngine, trainer: Trainer) -> None:
    trainer.update(engine, 1)
    for group in engine.generate(PROMPTS, replace(SAMPLING, stop_tokens=())):
        assert all(len(sample.tokens) == 7 and not sample.finished for sample in group)


def test_a_stop_that_was_not_asked_for_is_an_error_that_names_the_token(
    engine: SGLangEngine, trainer: Trainer, contract: Any
) -> None:
    trainer.update(engine, 1)
    contract.token = lambda *about: sglang_contract.END_OF_TEXT
    with pytest.raises(
        EngineError, match="stopped at token 2, its model's end of text; add it to stop_tokens"
    ):
        engine.generate(PROMPTS, replace(SAMPLING, stop_tokens=(5,)))


def test_a_sample_of_other_weights_than_asked_for_is_refused(
    engine: SGLangEngine, trainer: Trainer, contract: Any
) -> None:
    trainer.update(engine, 1)
    contract.version = "7"  # somebody else changed them
    with pytest.raises(EngineError, match=r"sampled with weights of \['7'\], expected 1"):
        engine.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("answer", ["<html>", "{}", "[null]", '[{"meta_info": {"finish_reason": 1}}]'])
def test_an_answer_of_another_form_is_an_error_of_the_engine(
    engine: SGLangEngine, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    trainer.update(engine, 1)
    monkeypatch.setattr(engine, "_request", lambda *asked: answer.encode())
    wanted = "engine oak answered /generate with something else than asked for"
    with pytest.raises(EngineError, match=wanted):
        engine.logp([3, 4, 9], [16, 5])
    if answer != "{}":  # of no samples, which the fleet counts
        with pytest.raises(EngineError, match=wanted):
            engine.generate(PROMPTS, SAMPLING)
    monkeypatch.undo()


def test_known_tokens_are_scored_from_the_response_on(engine: SGLangEngine, trainer: Trainer) -> None:
    trainer.update(engine, 1)
    assert engine.logp([3, 4, 9], [16, 5]) == [-1.0, -5 / 16]


@pytest.mark.parametrize("how", ["abort", "update"])
def test_requests_in_flight_are_ended_by_abort_and_by_new_weights(
    engine: SGLangEngine, trainer: Trainer, contract: Any, how: str
) -> None:
    trainer.update(engine, 1)
    contract.hold.clear()
    failures: list[str] = []

    def ask() -> None:
        try:
            engine.generate(PROMPTS, SAMPLING)
        except EngineError as error:
            failures.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    while contract.paths.count("/generate") < len(PROMPTS):
        time.sleep(0.01)
    time.sleep(0.1)
    engine.abort() if how == "abort" else trainer.update(engine, 2, 2)
    asking.join(10.0)
    assert len(failures) == 1 and "gave a request up: Abort in waiting queue" in failures[0]


def test_an_engine_that_slept_needs_weights_before_it_serves(
    engine: SGLangEngine, trainer: Trainer, contract: Any
) -> None:
    trainer.update(engine, 1)
    engine.sleep()
    assert contract.asleep and engine.alive() == ""
    with pytest.raises(EngineError, match="has no weights to sample with"):
        engine.generate(PROMPTS, SAMPLING)
    trainer.update(engine, 2, 1)
    assert not contract.asleep
    assert_holds(contract, 1)
    assert len(engine.generate(PROMPTS, SAMPLING)) == 3


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
        ("UpdateWeightVersionReqInput", "new_version"),
    ],
)
def test_a_field_that_a_newer_version_renames_is_found(
    engine: SGLangEngine,
    trainer: Trainer,
    contract: Any,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    field: str,
) -> None:
    fields = sglang_contract.SCHEMA["messages"][message]
    monkeypatch.setitem(fields, f"new_{field}", fields[field])
    monkeypatch.delitem(fields, field)
    with pytest.raises(EngineError, match=f"{message} has no field {field}"):
        trainer.update(engine, 1)
    contract.violations.clear()


def test_a_group_that_the_server_refuses_is_an_error_with_its_reason(
    engine: SGLangEngine, trainer: Trainer, contract: Any
) -> None:
    engine._settings = replace(SETTINGS, weights="broadcast", group_backend="gloo", update_s=2.0)
    contract.init_weights_update_group = lambda body: contract.outcome(False, "no such backend")
    with pytest.raises(EngineError, match=r"answered 400 to /init_weights_update_group.*no such backend"):
        trainer.update(engine, 1)


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
        environment={"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
    )


def bring(
    fleet: Fleet, trainer: Trainer, announced: int | None, half_way: Callable[[], None] = lambda: None
) -> None:
    """Streams version 1 to the engines that lack it."""
    while (intakes := fleet.begin_update(announced, 5.0)) != []:
        announced = None
        if intakes is None:
            continue
        for intake in intakes:
            intake.begin_update()
        for index in range(len(trainer.plan.buckets)):
            trainer.fill(index, 0)
            if index == 2:
                half_way()
            for intake in intakes:
                intake.load(index, [])
        for intake in intakes:
            intake.finish_update(1)
        fleet.end_update(intakes, 1, lambda client: 0.0)


def collect(fleet: Fleet, trainer: Trainer, prompts: list[list[int]]) -> list[list[Sample]]:
    number = fleet.submit(prompts, SAMPLING)
    while (samples := fleet.wait(number, 5.0)) is None:
        bring(fleet, trainer, None)
    return samples


def test_our_own_servers_are_a_fleet_that_survives_kills_and_hangs(
    launch: Callable[[str], Launch], trainer: Trainer, tmp_path: Path
) -> None:
    limits = Limits(60.0, 20.0, 20.0, 20.0, 0.1, 1.0, failures=3, updates=2, attempts=4, slots=6)
    settings = replace(SETTINGS, control_s=2.0)
    ash, elm = (
        SGLangEngine(name, settings, tmp_path / f"{name}.log", launch=launch("tiny"))
        for name in ("ash", "elm")
    )
    prompts = [[3, q] for q in range(12)]

    def introduce(client: EngineClient) -> None:
        client.connect(trainer.shared.path, trainer.plan)

    with Fleet({"ash": ash, "elm": elm}, limits, heartbeat_s=0.2, introduce=introduce) as fleet:
        bring(fleet, trainer, 1, half_way=lambda: os.kill(server_pid(elm), signal.SIGKILL))
        before = collect(fleet, trainer, prompts)
        assert [len(group) for group in before] == [SAMPLING.n] * 12
        while fleet.health():  # until elm is back
            assert collect(fleet, trainer, prompts) == before
        commands = Path(f"/proc/{server_pid(ash)}/cmdline").read_text()
        assert ash._key not in commands and not list(tmp_path.glob("*.yaml"))
        assert (tmp_path / "ash.log").stat().st_mode & 0o77 == 0
        os.kill(server_pid(ash), signal.SIGSTOP)
        assert collect(fleet, trainer, prompts) == before
        assert "engine ash" in fleet.health() and "gave no answer to /health within 2 s" in fleet.health()
        os.kill(server_pid(elm), signal.SIGKILL)
        assert collect(fleet, trainer, prompts) == before
        pids = [server_pid(engine) for engine in (ash, elm) if engine.alive() == ""]
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_server_whose_port_is_taken_is_started_on_another(
    launch: Callable[[str], Launch], trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken by a server of somebody else's, which answers, but not to our key."""
    stranger = sglang_contract.serve(sglang_contract.Contract("another key"))
    ports = [stranger.server_port]
    monkeypatch.setattr(sglang, "free_port", lambda: ports.pop() if ports else free_port())
    ash = SGLangEngine("ash", SETTINGS, tmp_path / "ash.log", launch=launch("tiny"))
    limits = Limits(60.0, 20.0, 20.0, 20.0, 0.1, 1.0, failures=3, updates=2, attempts=4, slots=6)
    with Fleet({"ash": ash}, limits, heartbeat_s=0.2, introduce=lambda client: None) as fleet:
        while (intakes := fleet.begin_update(1, 30.0)) is None:
            pass
        fleet.end_update(intakes, 1, lambda client: 0.0)
    assert "Address already in use" in (tmp_path / "ash.log").read_text()
    stranger.shutdown()
    stranger.server_close()


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
    assert engine.alive() == "ended with exit code 1"


def test_the_committed_schema_is_that_of_the_package_where_it_is_at_hand(tmp_path: Path) -> None:
    wheel = os.environ.get("SGLANG_WHEEL")
    if not wheel:
        pytest.skip("set SGLANG_WHEEL to a wheel of sglang (39 MB: pip download --no-deps sglang)")
    tool = Path(__file__).parents[2] / "tools" / "sglang_schema.py"
    subprocess.run([sys.executable, tool, wheel, "--out", tmp_path / "schema.json"], check=True, timeout=100)
    assert json.loads((tmp_path / "schema.json").read_text()) == sglang_contract.SCHEMA
