"""Every trainer layout into every engine layout: log-probabilities and greedy text after a live update.

    PYTHONPATH=. python bench/engine_matrix.py --out bench/results/engine_matrix.md

Trainers TP1/2/3 and PP1/2, for a mixture EP2 too, engines TP1/2, tied and untied, four families. Servers
start on one set of weights; trainers bring them, in turn, to another one and back. After each update a server
is compared with transformers on the same weights, and its greedy text with that of a server started on them.
Small random models in fp32; about 20 minutes on two cores. A run that was ended goes on from the lines of
--out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from hpt_mega.config import ParallelConfig
from hpt_mega.process import free_port
from hpt_mega.rollout.engine import SamplingParams
from hpt_mega.rollout.sync import WeightSync
from hpt_mega.rollout.vllm import VLLMClient
from tests.megatron.tiny import build_policy, config, leave_job
from tests.ranks import run_ranks
from tests.rollout import served

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
DENSE = tuple({"tp": tp, "pp": pp} for tp, pp in product((1, 2, 3), (1, 2)))
MIXTURE = ({"tp": 2, "pp": 1, "ep": 2}, {"tp": 2, "pp": 2, "ep": 2})
RANKS = 6  # of the largest trainer
ENGINES = (1, 2)  # tensor-parallel ranks
BUCKET = 300_000
START_S, CELL_S = 900.0, 3600.0
GREEDY = SamplingParams(n=1, max_new_tokens=24, temperature=0.0)
HEAD = """# Live updates, trainer layout by engine layout

Largest difference of log-probabilities to transformers (fp32), and greedy text against a server started on
the same weights. Each trainer brings the servers to other weights than those they have.

| family | embeddings | trainer | engine | log-probabilities | greedy text |
|---|---|---|---|---|---|
"""


@dataclass
class Weights:
    """A folder, and what an engine that holds it answers."""

    folder: Path
    logp: list[list[float]]
    texts: dict[int, list[tuple[int, ...]]]  # greedy, by the engine's ranks


def greedy(client: VLLMClient) -> list[tuple[int, ...]]:
    return [sample.tokens for (sample,) in client.generate(served.PROMPTS, GREEDY)]


def bring(
    clients: dict[int, VLLMClient],
    trainers: Sequence[dict[str, int]],
    ports: Sequence[int],
    targets: Sequence[Weights],
    name: str,
    out: Path,
) -> None:
    """One rank of all trainers, one after the other; the first rank looks at the engines and writes lines."""
    rank = int(os.environ["RANK"])
    for version, (trainer, port) in enumerate(zip(trainers, ports, strict=True)):
        parallel, target = ParallelConfig(**trainer), targets[version % len(targets)]
        if rank >= parallel.world_size:
            continue
        os.environ |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(parallel.world_size)}
        policy = build_policy(target.folder, config(parallel), train=False)
        sync = WeightSync(policy.model, policy.family, policy.shape, policy.layout, BUCKET)
        if rank == 0:
            for client in clients.values():
                client.connect(sync.path, sync.plan)
        sync.send(list(clients.values()) if rank == 0 else [], version)
        for tp, client in clients.items() if rank == 0 else ():
            gap = served.largest_gap(client, target.logp)
            same = "equal" if greedy(client) == target.texts[tp] else "DIFFERS"
            with out.open("a") as file:
                print(f"| {name} | {label(trainer)} | TP{tp} | {gap:.1e} | {same} |", file=file)
        sync.close()
        leave_job()


def label(trainer: dict[str, int]) -> str:
    return " ".join(f"{name.upper()}{size}" for name, size in trainer.items())


def cell(folder: Path, family: str, tied: bool, trainers: Sequence[dict[str, int]], out: Path) -> None:
    """Adds the table's lines of one family."""
    folders = served.save_models(folder, family, tied=tied)
    before, after = (Weights(one, served.reference_logp(one), {}) for one in folders)
    clients: dict[int, VLLMClient] = {}
    with ExitStack() as stack:
        for tp in ENGINES:
            fresh = served.server(after.folder, folder / f"fresh{tp}.log", tp=tp)
            with ExitStack() as short:
                short.callback(fresh.close)
                fresh.start(START_S)
                after.texts[tp] = greedy(fresh.client)
            live = served.server(before.folder, folder / f"live{tp}.log", tp=tp)
            stack.callback(live.close)
            live.start(START_S)
            before.texts[tp] = greedy(live.client)
            clients[tp] = live.client
        name, targets = f"{family} | {'tied' if tied else 'untied'}", (after, before)
        ports = [free_port() for _ in trainers]
        run_ranks(bring, RANKS, folder, clients, trainers, ports, targets, name, out, deadline_s=CELL_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    given = parser.parse_args()
    if not given.out.exists():
        given.out.write_text(HEAD)
    for family, tied in product(given.families, (True, False)):
        done = given.out.read_text()
        line = f"| {family} | {'tied' if tied else 'untied'} | {{}} | TP{ENGINES[-1]} |"
        layouts = DENSE + MIXTURE if family == "qwen3_moe" else DENSE
        trainers = [one for one in layouts if line.format(label(one)) not in done]
        if trainers:
            with tempfile.TemporaryDirectory() as folder:
                cell(Path(folder), family, tied, trainers, given.out)


if __name__ == "__main__":
    main()
