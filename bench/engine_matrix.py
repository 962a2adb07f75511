"""Every trainer layout into every engine layout: log-probabilities and greedy text after a live update.

    PYTHONPATH=. python bench/engine_matrix.py --out bench/results/engine_matrix.md

Trainers TP1/2/3 and PP1/2, engines TP1/2, tied and untied, four families. A server starts on one set of
weights and is brought to another; it is compared with transformers on those, and its greedy text with that of
a server started on them. Small random models in fp32; about 40 minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

from hpt_mega.rollout.engine import SamplingParams
from hpt_mega.rollout.vllm import VLLMClient
from tests.ranks import run_ranks
from tests.rollout import served

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
TRAINERS = tuple({"tp": tp, "pp": pp} for tp, pp in product((1, 2, 3), (1, 2)))
BUCKET = 300_000
GREEDY = SamplingParams(n=1, max_new_tokens=24, temperature=0.0)


def greedy(client: VLLMClient) -> list[tuple[int, ...]]:
    return [sample.tokens for (sample,) in client.generate(served.PROMPTS, GREEDY)]


def cell(folder: Path, family: str, tied: bool, engine_tp: int) -> list[str]:
    """The table's lines of one family and engine."""
    before, after = served.save_models(folder, family, tied=tied)
    expected = served.reference_logp(after)
    fresh = served.server(after, folder / "fresh.log", tp=engine_tp)
    fresh.start(300.0)
    text = greedy(fresh.client)
    fresh.close()
    live = served.server(before, folder / "live.log", tp=engine_tp)
    live.start(300.0)
    lines = []
    try:
        for version, trainer in enumerate(TRAINERS):
            ranks = folder / f"ranks{version}"
            ranks.mkdir()
            world = trainer["tp"] * trainer["pp"]
            run_ranks(served.bring, world, ranks, live.client, after, trainer, BUCKET, version)
            gap = served.largest_gap(live.client, expected)
            same = "equal" if greedy(live.client) == text else "DIFFERS"
            name = f"TP{trainer['tp']} PP{trainer['pp']}"
            tie = "tied" if tied else "untied"
            lines.append(f"| {family} | {tie} | {name} | TP{engine_tp} | {gap:.1e} | {same} |")
            print(lines[-1], flush=True)
    finally:
        live.close()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    lines = [
        "# Live updates, trainer layout by engine layout",
        "",
        "Largest difference of log-probabilities to transformers (fp32), and greedy text against a server",
        "started on the same weights.",
        "",
        "| family | embeddings | trainer | engine | log-probabilities | greedy text |",
        "|---|---|---|---|---|---|",
    ]
    for family, tied, engine_tp in product(FAMILIES, (True, False), (1, 2)):
        with tempfile.TemporaryDirectory() as folder:
            lines += cell(Path(folder), family, tied, engine_tp)
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
