"""The verb `hpt plan`: its KEY=VALUE options, its table and JSON, and how its errors reach the user.

What a layout costs is computed in search.py and the modules that it calls.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import fields
from typing import Any

from hpt_mega.planning.hardware import Hardware, hardware
from hpt_mega.planning.job import Job, Layout, PlanError, check_values
from hpt_mega.planning.models import ModelShape, model
from hpt_mega.planning.search import Plan, Refusal, plan, search
from hpt_mega.suggestion import did_you_mean

REFUSED = 2
SHOWN = 8  # layouts of a table
JOB_KEYS = ("gpus", "batch", "seq", "precision", "mode", "distributed_optimizer", "prompt", "rollout_tp")
LAYOUT_KEYS = ("tp", "pp", "vpp", "cp", "ep", "etp", "microbatch", "recompute")
FREE = ("microbatch", "recompute")  # given alone, they narrow the search; any other key gives the layout
FLAGS = {"distributed_optimizer", *(f"model.{one.name}" for one in fields(ModelShape) if one.type == "bool")}
KEYS = ("model", "hardware", *JOB_KEYS, "parallel.dp", *(f"parallel.{key}" for key in LAYOUT_KEYS))
WORDS = ("model", "hardware", "precision", "mode", "parallel.recompute")


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the verb's parser its options."""
    parser.description = (
        "Which layout fits and how fast it is: memory and time of a GPU, computed, without a GPU. "
        "Searches all layouts, those of parallel.microbatch and recompute where these are given alone, or "
        "judges the one given by parallel.KEY=VALUE."
    )
    parser.epilog = (
        "example: hpt plan model=llama3_1_70b hardware=h100 gpus=64; "
        "hpt plan model=llama3_1_70b hardware=h100 gpus=64 precision=fp8 parallel.tp=4 parallel.pp=8; "
        "hpt plan model=gpt model.layers=32 model.hidden=6144 model.heads=48 hardware=h200 gpus=64 mode=rl"
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"{', '.join(KEYS)}; model.SIZE and hardware.FIGURE change a preset",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(run=_run)


def parse(settings: list[str]) -> tuple[ModelShape, Hardware, Job, Layout | None, dict[str, Any]]:
    """What is asked. The layout is None where none is given; then some of its values may be, as FREE says.

    Raises PlanError.
    """
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = {"microbatch": "parallel.microbatch", "recompute": "parallel.recompute"}.get(key, key)
        if not equals or not value:
            raise PlanError(f"{setting} given, expected KEY=VALUE such as gpus=64")
        if key not in KEYS and not key.startswith(("model.", "hardware.")):
            raise PlanError(f"unknown key {key}{did_you_mean(key, KEYS)}; expected one of {', '.join(KEYS)}")
        given[key] = value if key in WORDS else _value(key, value)
    for key in ("model", "hardware", "gpus"):
        if key not in given:
            raise PlanError(
                f"no {key} given; add {key}=..., as in `model=llama3_1_70b hardware=h100 gpus=64`"
            )
    shape = model(given["model"], **_group(given, "model."))
    gpu = hardware(given["hardware"], **_group(given, "hardware."))
    job = Job(**{key: given[key] for key in JOB_KEYS if key in given})
    cut = _group(given, "parallel.")
    dp = cut.pop("dp", None)
    layout = Layout(**cut)
    if dp is not None and dp * layout.tp * layout.pp * layout.cp != job.gpus:
        raise PlanError(
            f"parallel.dp={dp} x tp {layout.tp} x pp {layout.pp} x cp {layout.cp} is not gpus={job.gpus}; "
            "change one of them, or leave parallel.dp out: it is what remains"
        )
    if dp is not None or cut.keys() - set(FREE):
        return shape, gpu, job, layout, {}
    check_values(layout)
    return shape, gpu, job, None, cut


def _group(given: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


def _value(key: str, text: str) -> Any:
    if key in FLAGS:
        if text.lower() not in ("true", "false"):
            raise PlanError(f"{key}={text} given, expected true or false")
        return text.lower() == "true"
    is_figure = key.startswith("hardware.")
    try:
        return float(text) if is_figure else int(text)
    except ValueError:
        raise PlanError(f"{key}={text} given, expected a {'' if is_figure else 'whole '}number") from None


def as_json(found: Plan) -> dict[str, Any]:
    """Memory in GiB, times in seconds."""
    layout = {key: getattr(found.layout, key) for key in LAYOUT_KEYS} | {"dp": found.dp}
    breakdown: dict[str, Any] = {
        "memory_gib": found.memory.parts(),
        "step_s": found.timing.parts,
        "layout": layout | {"microbatches": found.microbatches},
        "available_gib": found.available_gib,
        "fits": found.fits,
    }
    if found.engine is not None:
        breakdown["engine"] = vars(found.engine)
    return {
        "memory_gib": found.memory_gib,
        "tokens_per_s_per_gpu": found.tokens_per_s_per_gpu,
        "tflops_per_gpu": found.tflops_per_gpu,
        "step_s": found.timing.step,
        "breakdown": breakdown,
    }


def _run(options: argparse.Namespace) -> int:
    try:
        shape, gpu, job, layout, given = parse(options.settings)
        plans, refusals = (
            ([plan(shape, job, layout, gpu)], []) if layout else search(shape, job, gpu, **given)
        )
        if not plans:
            raise PlanError(_nothing_fits(job, gpu, refusals))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    if options.json:
        print(json.dumps(as_json(plans[0]), indent=2))
    else:
        _print(plans, refusals, gpu)
    if not plans[0].fits:
        print(
            f"does not fit: {plans[0].memory_gib:.1f} GiB needed, {gpu.memory_gib:.1f} GiB there; raise tp, "
            "pp or cp, lower parallel.microbatch, or set parallel.recompute=full",
            file=sys.stderr,
        )
    return 0


def _nothing_fits(job: Job, gpu: Hardware, refusals: list[Refusal]) -> str:
    near = next((refused for refused in refusals if refused.over_gib), None)
    if near is not None:
        return (
            f"no layout fits {job.gpus} GPUs of {gpu.memory_gib:.1f} GiB; the nearest, {near.layout}, "
            f"{near.reason}; raise gpus or lower seq"
        )
    reason = refusals[0].reason if refusals else "none cuts this model evenly; change gpus"
    return f"no layout is possible on gpus={job.gpus}: {reason}"


def _print(plans: list[Plan], refusals: list[Refusal], gpu: Hardware) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(markup=False)
    searched = len(plans) > 1 or refusals
    title = f"the fastest of {len(plans)} that fit" if searched else "the layout given"
    title = f"{gpu.name}, {gpu.memory_gib:.1f} GiB: {title} (figures of a GPU)"
    columns = [Column(name, no_wrap=True) for name in ("dp", "GiB", "tokens/s", "TFLOP/s", "step s")]
    table = Table("layout", *columns, title=title)
    for found in _distinct(plans):
        table.add_row(
            str(found.layout),
            str(found.dp),
            f"{found.memory_gib:.1f}",
            f"{found.tokens_per_s_per_gpu:,.0f}",
            f"{found.tflops_per_gpu:.0f}",
            f"{found.timing.step:.2f}",
        )
    console.print(table)
    _print_parts(plans[0], console)
    if refusals:
        refused = Table("refused", "why, of the nearest", title="refused, full recompute included")
        for count, reason in _grouped(refusals):
            refused.add_row(str(count), reason)
        console.print(refused)


def _distinct(plans: list[Plan]) -> list[Plan]:
    """The fastest of those that differ in more than chunks, micro-batch and recompute."""
    best: dict[tuple[int, ...], Plan] = {}
    for found in plans:
        layout = found.layout
        best.setdefault((layout.tp, layout.pp, layout.cp, layout.ep), found)
    return list(best.values())[:SHOWN]


def _print_parts(best: Plan, console: Any) -> None:
    from rich.table import Table

    table = Table("memory", "GiB", "time", "s", "share", title=f"where it goes: {best.layout}")
    spaces = [(part, f"{gib:.2f}") for part, gib in best.memory.parts().items()]
    if best.engine is not None:
        spaces.append((f"engine (tp{best.engine.tp}) weights", f"{best.engine.weights_gib:.2f}"))
        spaces.append((f"KV cache, {best.engine.concurrent} sequences", f"{best.engine.kv_gib:.2f}"))
    times = sorted(best.timing.parts.items(), key=lambda part: -part[1])
    times = [(part, seconds) for part, seconds in times if seconds > 0]
    for row in range(max(len(spaces), len(times))):
        space = spaces[row] if row < len(spaces) else ("", "")
        if row < len(times):
            part, seconds = times[row]
            table.add_row(*space, part, f"{seconds:.3f}", f"{seconds / best.timing.step:.1%}")
        else:
            table.add_row(*space, "", "", "")
    console.print(table)


def _grouped(refusals: list[Refusal]) -> list[tuple[int, str]]:
    """Refusals for the same reason, whatever its numbers, as one: how many, and the nearest's words."""
    kinds = [re.sub(r"[\d.]+", "#", refused.reason) for refused in refusals]
    first = {kind: refused for kind, refused in zip(reversed(kinds), reversed(refusals), strict=True)}
    return [
        (count, f"{first[kind].layout}: {first[kind].reason}") for kind, count in Counter(kinds).most_common()
    ]
