"""Servers that are killed, hang or find no port, in a fleet of real vLLMs: bench/results/engine_faults.md.

    PYTHONPATH=. python bench/engine_faults.py --out bench/results/engine_faults.md

A small random Llama in fp32, one trainer rank. Each fault meets two servers in the midst of 24 prompts x 4
samples; they are counted, and compared with those of an undisturbed fleet. About 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from hpt_mega.config import ParallelConfig
from hpt_mega.launch import single_rank_environment
from hpt_mega.rollout import vllm
from hpt_mega.rollout.dispatch import Fleet
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.fleet import Limits
from hpt_mega.rollout.served import Probe, ServedEngine
from hpt_mega.rollout.sync import WeightSync
from hpt_mega.rollout.vllm import VLLMServer
from hpt_mega.trajectory import Source, Trajectory
from tests.megatron.tiny import Policy, build_policy, config
from tests.rollout import served

LIMITS = Limits(
    start_s=200.0,
    update_s=20.0,
    request_s=120.0,
    silence_s=30.0,
    backoff_s=1.0,
    backoff_max_s=4.0,
    failures=3,
    updates=2,
    attempts=3,
    slots=64,  # 16 requests
)
ANSWER_S = 10.0
PROMPTS = [[3 + q, 141 - q, 59] for q in range(24)]
SAMPLING = SamplingParams(n=4, max_new_tokens=48, seed=5)
BUCKET = 300_000


@dataclass
class Bench:
    """A fleet with its trainer, and the servers it is made of."""

    engine: ServedEngine
    fleet: Fleet
    servers: list[VLLMServer]
    version: int = 0

    def process(self, number: int) -> psutil.Process:
        return served.process_of(self.servers[number])

    def tell(self, number: int, act: Callable[[psutil.Process], None]) -> None:
        """Do it to the server and all its processes."""
        process = self.process(number)
        for one in (process, *process.children(recursive=True)):
            act(one)

    def update(self) -> None:
        self.version += 1
        self.engine.update_weights(self.version)

    def collect(self) -> list[list[Sample]]:
        return self.engine.generate(PROMPTS, SAMPLING)

    def recover(self) -> float:
        """Seconds until all servers serve again."""
        began = time.monotonic()
        while self.fleet.health():
            if time.monotonic() - began > LIMITS.start_s:
                raise TimeoutError(self.fleet.health())
            self.collect()
            time.sleep(0.5)
        return time.monotonic() - began


@contextmanager
def bench(policy: Policy, folders: tuple[Path, Path], scratch: Path, count: int) -> Iterator[Bench]:
    before, after = folders
    logp = [tuple(one) for one in served.reference_logp(after)]
    texts = [
        Trajectory(prompt, response, index, Source.OFFLINE, 0)
        for index, (prompt, response) in enumerate(zip(served.PROMPTS, served.RESPONSES, strict=True))
    ]
    sync = WeightSync(policy.model, policy.family, policy.shape, policy.layout, BUCKET)
    servers = [served.server(before, scratch / f"engine{number}.log") for number in range(count)]
    for server in servers:
        server.answer_deadline_s = ANSWER_S
    fleet = Fleet(
        {server.name: server for server in servers},
        LIMITS,
        ANSWER_S / 4,
        introduce=lambda client: client.connect(sync.path, sync.plan),
    )
    engine = ServedEngine(fleet, sync, policy.layout, Probe(texts, lambda: logp, 1e-4))
    try:
        yield Bench(engine, fleet, servers)
    finally:
        engine.close()


def after_a_moment(act: Callable[[], None]) -> None:
    threading.Timer(0.3, act).start()


def in_next_update(one: Bench, act: Callable[[], None]) -> None:
    """Act when the second server is about to read its third bucket."""
    client = one.servers[1].client
    load, calls = client.load, [0]

    def watched(index: int, checksums: list[str]) -> None:
        calls[0] += 1
        if calls[0] == 3:
            act()
        load(index, checksums)

    client.load = watched  # type: ignore[method-assign, assignment]


def counted(groups: list[list[Sample]], expected: list[list[Sample]]) -> str:
    """How many samples there are, and whether they are those of an undisturbed fleet."""
    found = sum(len(group) for group in groups)
    same = [[s.tokens for s in g] for g in groups] == [[s.tokens for s in g] for g in expected]
    return f"{found} of {len(PROMPTS) * SAMPLING.n}, {'the same' if same else 'OTHERS'}"


def trouble_of(one: Bench) -> str:
    """The fleet's own words about the server that does not serve."""
    report = one.fleet.health().splitlines()
    said = [line.strip() for line in report if line.startswith("  ") and "|" not in line]
    return said[0] if said else "(it is back)"


def row(name: str, said: str, seconds: float, count: str, back: str) -> str:
    line = f"| {name} | {said[:230].replace('|', '/')} | {seconds:.1f} s | {count} | {back} |"
    print(line, flush=True)
    return line


def with_two(one: Bench) -> Iterator[str]:
    """The table's lines of faults of one of two servers."""
    began = time.monotonic()
    one.update()
    ready = time.monotonic() - began
    began = time.monotonic()
    expected = one.collect()
    yield row("none", "", time.monotonic() - began, counted(expected, expected), f"{ready:.1f} s")
    faults = [
        ("SIGSTOP during generation", lambda: after_a_moment(lambda: one.tell(1, stop)), False),
        ("SIGKILL during sync", lambda: in_next_update(one, one.process(1).kill), True),
        ("SIGSTOP during sync", lambda: in_next_update(one, lambda: one.tell(1, stop)), True),
        ("SIGKILL during generation", lambda: after_a_moment(one.process(1).kill), False),
        ("SIGKILL of its worker", lambda: after_a_moment(one.process(1).children()[-1].kill), False),
    ]
    for name, arrange, syncs in faults:
        arrange()
        began = time.monotonic()
        if syncs:
            one.update()
            told, seconds = trouble_of(one), time.monotonic() - began
            groups = one.collect()
        else:
            groups = one.collect()
            told, seconds = trouble_of(one), time.monotonic() - began
        yield row(name, told, seconds, counted(groups, expected), f"{one.recover():.1f} s")


def stop(process: psutil.Process) -> None:
    process.suspend()


def at_start(policy: Policy, folders: tuple[Path, Path], scratch: Path, expected: int) -> Iterator[str]:
    """Those of faults while a lone server starts: it is killed, its port is taken, its model is gone."""
    real = vllm.free_port
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    ports = [int(taken.getsockname()[1])]

    def port() -> int:
        return ports.pop() if ports else real()

    for name in ("SIGKILL during start", "port taken at start"):
        vllm.free_port = port if "port" in name else real
        began = time.monotonic()
        with bench(policy, folders, scratch, 1) as one:
            if "SIGKILL" in name:
                threading.Timer(4.0, lambda one=one: one.process(0).kill()).start()
            said: list[str] = []
            listening = threading.Thread(target=listen, args=(one, said), daemon=True)
            listening.start()
            one.update()
            seconds = time.monotonic() - began
            count = f"{sum(map(len, one.collect()))} of {expected}"
            yield row(name, said[0] if said else "", seconds, count, f"{seconds:.1f} s")
    vllm.free_port = real
    with bench(policy, folders, scratch, 1) as one:
        one.update()
        one.servers[0].settings = replace(one.servers[0].settings, model=scratch / "gone")
        after_a_moment(one.process(0).kill)
        began = time.monotonic()
        try:
            one.collect()
            raise AssertionError("samples from a server that cannot start")
        except EngineError as error:
            told = " / ".join(line for line in str(error).splitlines()[:3])
        name = "SIGKILL of the only server, and no model to start from"
        yield row(name, told, time.monotonic() - began, "stops", "-")


def listen(one: Bench, said: list[str]) -> None:
    """Keeps the first trouble that the fleet tells."""
    while not said:
        told = trouble_of(one) if one.fleet.health() else ""
        if told and not told.startswith("("):
            said.append(told)
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ |= single_rank_environment()
    lines = [
        "# Faults of servers",
        "",
        "`python bench/engine_faults.py`: real vLLMs (CPU build), small random Llama, one trainer rank;",
        f"{len(PROMPTS)} prompts x {SAMPLING.n} samples. Deadlines: {LIMITS.update_s:g} s for a step of an",
        f"update, {ANSWER_S:g} s for a sign of life. The first six rows are of two servers, of which the",
        "second meets the fault, the others of a lone one. Seconds are those of the collection, update or",
        "start that the fault met; `back` those until all servers served again, beside other work.",
        "",
        "| fault | what the fleet said | took | samples | back |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folders = served.save_models(scratch, "llama", tied=True)
        policy = build_policy(folders[1], config(ParallelConfig(pp=1)), train=False)
        with bench(policy, folders, scratch, 2) as one:
            for line in with_two(one):
                lines.append(line)
                given.out.write_text("\n".join(lines) + "\n")
        for line in at_start(policy, folders, scratch, len(PROMPTS) * SAMPLING.n):
            lines.append(line)
            given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
