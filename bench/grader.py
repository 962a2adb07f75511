"""The grader beside math-verify alone on the hard pairs, and under 10,000 hostile answers.

    PYTHONPATH=. python bench/grader.py --hostile --out bench/results/grader.md

Pairs, golds and attacks are those of tests/rewards. math-verify runs as verify(parse(gold), parse(response))
with its defaults, in a process that is killed after 30 s; and again with $ around the gold answer, as its
parser finds LaTeX only between delimiters.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpt_mega.rewards import RewardPool
from tests.rewards.hostile import GOLD, hostile

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "tests/rewards/hard_pairs.jsonl"
DEADLINE_S = 2.0
Pair = dict[str, Any]


def _verify_forever(pipe: Connection) -> None:
    from math_verify import parse, verify

    while True:
        gold, response = pipe.recv()
        try:
            pipe.send(bool(verify(parse(gold), parse(response))))
        except Exception:
            pipe.send(False)


def math_verify_alone(asked: list[tuple[str, str]], seconds: float = 30.0) -> list[bool]:
    """Its verdict on each (response, gold); a killed comparison counts as wrong."""
    context = multiprocessing.get_context("spawn")
    found: list[bool] = []
    process = None
    for response, gold in asked:
        if process is None:
            here, there = context.Pipe()
            process = context.Process(target=_verify_forever, args=(there,), daemon=True)
            process.start()
        here.send((gold, response))
        if here.poll(seconds):
            found.append(here.recv())
        else:
            process.kill()
            process, _ = None, found.append(False)
    if process is not None:
        process.kill()
    return found


def agreement() -> list[str]:
    """Markdown: both graders against the mathematician's verdicts, and every disagreement."""
    rows: list[Pair] = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    with RewardPool(workers=2) as pool:
        pool.score([r"\boxed{x}"] * 2, ["y"] * 2)
        started = time.monotonic()
        ours = pool.verdicts(*([row[key] for row in rows] for key in ("response", "answer", "kind")))
        ours_s = time.monotonic() - started
    maths = [i for i, row in enumerate(rows) if row["kind"] == "math"]
    started = time.monotonic()
    bare = math_verify_alone([(rows[i]["response"], rows[i]["answer"]) for i in maths])
    bare_s = time.monotonic() - started
    marked = math_verify_alone([(rows[i]["response"], f"${rows[i]['answer']}$") for i in maths])
    verdicts = {
        "ours": {i: bool(verdict.reward) for i, verdict in enumerate(ours)},
        "math-verify": dict(zip(maths, bare, strict=True)),
        "math-verify, gold in $": dict(zip(maths, marked, strict=True)),
    }
    right = sum(row["verdict"] for row in rows)
    return [
        f"{len(rows)} pairs, {right} right and {len(rows) - right} wrong; {len(maths)} of kind math. "
        f"Ours: {len(rows) / ours_s:.0f} pairs a second on two workers; math-verify: "
        f"{len(maths) / bare_s:.0f} on one.",
        "",
        *_table(rows, verdicts),
        "",
        *_disagreements(rows, verdicts, [verdict.why for verdict in ours]),
    ]


def _table(rows: list[Pair], verdicts: dict[str, dict[int, bool]]) -> list[str]:
    titles = " | ".join(f"{name}: false accepts | false rejects" for name in verdicts)
    lines = [f"| category | right | wrong | {titles} |", "|---" * (3 + 2 * len(verdicts)) + "|"]
    for category in [*dict.fromkeys(row["category"] for row in rows), "all"]:
        chosen = [i for i, row in enumerate(rows) if category in (row["category"], "all")]
        good = sum(rows[i]["verdict"] for i in chosen)
        cells = [category, good, len(chosen) - good]
        for said in verdicts.values():
            wrong = [rows[i]["verdict"] for i in chosen if i in said and said[i] != rows[i]["verdict"]]
            cells += [wrong.count(0), wrong.count(1)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _disagreements(rows: list[Pair], verdicts: dict[str, dict[int, bool]], whys: list[str]) -> list[str]:
    ours, *others = verdicts.values()
    apart = [i for i in others[0] if any(said[i] != ours[i] for said in others)]
    lines = [
        f"## The {len(apart)} disagreements",
        "",
        "| gold | response | due | ours | " + " | ".join(list(verdicts)[1:]) + " | argument |",
        "|---" * 7 + "|",
    ]
    for i in apart:
        row, words = rows[i], ("wrong", "right")
        cells = [_cell(row["answer"]), _cell(row["response"]), words[row["verdict"]]]
        cells += [f"{words[ours[i]]}: {_escaped(whys[i])}", *(words[said[i]] for said in others)]
        lines.append(f"| {' | '.join([*cells, row['why']])} |")
    return lines


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _cell(text: str) -> str:
    if text.startswith("So the result is \\boxed{"):
        text = text.removeprefix("So the result is \\boxed{").removesuffix("}.")
    return "`" + _escaped(text.replace("\n", " ").replace("`", "'")) + "`"


def under_attack(count: int) -> list[str]:
    """Markdown: time, memory and verdicts under hostile answers, one at a time on one worker."""
    with tempfile.TemporaryDirectory() as folder, RewardPool(workers=1, deadline_s=DEADLINE_S) as pool:
        marker = Path(folder) / "executed"
        pool.score([r"\boxed{x}"], ["y"])
        seconds, whys, peak_kib, accepted = [], [], 0, 0
        answers = hostile(count, seed=11, marker=str(marker))
        for response in answers:
            started = time.monotonic()
            [verdict] = pool.verdicts([response], [GOLD])
            seconds.append(time.monotonic() - started)
            whys.append(verdict.why)
            accepted += int(verdict.reward)
            peak_kib = max(peak_kib, _peak_kib(pool._workers[0].process.pid))
        executed = marker.exists()
    killed = [
        s for s, why in zip(seconds, whys, strict=True) if why.startswith(("deadline", "the worker died"))
    ]
    seconds.sort()
    return [
        "| what | figure |",
        "|---|---|",
        f"| answers | {count}, {sum(map(len, answers)) / 1e6:.0f} MB |",
        f"| accepted | {accepted} |",
        f"| executed | {'YES' if executed else 'none'} |",
        f"| crashes of the grader | 0 (workers killed or ended, and replaced: {len(killed)}) |",
        f"| at the memory limit | {whys.count('memory limit')} |",
        f"| slowest answer, deadline {DEADLINE_S:g} s | {seconds[-1]:.2f} s |",
        f"| median | {1e3 * seconds[count // 2]:.2f} ms |",
        f"| 99th percentile | {1e3 * seconds[count * 99 // 100]:.1f} ms |",
        f"| throughput | {count / sum(seconds):.0f} a second |",
        f"| peak memory of a worker | {peak_kib / 1024:.0f} MiB |",
        f"| peak memory of the caller | {_peak_kib('self') / 1024:.0f} MiB, the generated answers included |",
    ]


def _peak_kib(pid: int | str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def plain_speed(count: int = 20_000) -> str:
    """Plain answers a second, settled in process; and answers that go to the two workers."""
    with RewardPool(workers=2) as pool:
        pool.score([r"\boxed{x}"] * 2, ["y"] * 2)
        rates = []
        for response, answer in (
            (r"\boxed{%d}", "%d"),
            (r"\boxed{\frac{%d}{7}+\sqrt{2}}", r"\sqrt2+\frac{%d}{7}"),
        ):
            asked = [(response % i, answer % i) for i in range(count)]
            started = time.monotonic()
            assert sum(pool.score(*zip(*asked, strict=True))) == count
            rates.append(count / (time.monotonic() - started))
    return f"Plain numbers: {rates[0]:.0f} a second. Expressions, two workers: {rates[1]:.0f} a second."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hostile", action="store_true", help="also the hostile answers")
    parser.add_argument("--count", type=int, default=10_000, help="of hostile answers (10,000)")
    parser.add_argument("--out", type=Path, help="Markdown file; default: print")
    options = parser.parse_args()
    lines = [
        "# Grader",
        "",
        "Made by `python bench/grader.py --hostile`, on two shared CPU cores.",
        "",
        *agreement(),
    ]
    lines += ["", "## Speed", "", plain_speed()]
    if options.hostile:
        lines += ["", "## Hostile answers", "", *under_attack(options.count)]
    text = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
