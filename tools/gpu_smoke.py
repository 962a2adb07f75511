"""The checks behind tools/gpu_smoke.sh: one each call, its finding in SCRATCH/NAME.json. Needs a GPU to pass.

Exit codes: 0 passed, 1 failed, 77 skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SKIPPED = 77
VERDICTS = {0: "passed", SKIPPED: "skipped", 124: "failed: out of time"}
TOLERANCE = {"loss": 0.02, "gradients": 0.05}  # of bf16 layers beside fp32 ones


class SkipError(Exception):
    """This machine cannot run the check; the message says why."""


def nccl(_: Path) -> dict[str, Any]:
    """An all-reduce over every GPU of this machine, checked against the sum it must give."""
    import torch

    count = torch.cuda.device_count()
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command = [*launch, __file__, "_ring", "-"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if ran.returncode:
        raise AssertionError(ran.stderr[-2000:])
    return {"gpus": count, "gigabytes_per_second": float(ran.stdout.split("bandwidth")[-1].split()[0])}


def _ring(_: Path) -> dict[str, Any]:
    """One rank of the all-reduce."""
    import time

    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    tensor = torch.full((1 << 26,), float(rank + 1), device="cuda")
    dist.all_reduce(tensor)
    assert bool((tensor == size * (size + 1) / 2).all())
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _step in range(10):
        dist.all_reduce(tensor)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / 10
    if rank == 0:
        print("bandwidth", tensor.nbytes / seconds / 1e9)
    dist.destroy_process_group()
    return {}


def te_against_local(scratch: Path) -> dict[str, Any]:
    """Loss and gradients of Transformer Engine's layers in bf16 beside the local ones in fp32 on the CPU."""
    import torch

    scratch.mkdir(parents=True)
    for name, hidden in (("local", {"CUDA_VISIBLE_DEVICES": ""}), ("te", {})):
        command = [sys.executable, __file__, "_gradients", str(scratch / name)]
        ran = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise AssertionError(f"{name}: {ran.stderr[-2000:]}")
    local, engine = (torch.load(scratch / name / "step.pt", weights_only=True) for name in ("local", "te"))
    errors = {
        name: float((engine["gradients"][name] - one).norm() / one.norm())
        for name, one in local["gradients"].items()
    }
    worst = max(errors, key=lambda name: errors[name])
    gap = abs(engine["loss"] / local["loss"] - 1)
    found = {"relative_loss_gap": gap, "worst_gradient": worst, "relative_gradient_error": errors[worst]}
    if gap > TOLERANCE["loss"] or errors[worst] > TOLERANCE["gradients"]:
        raise AssertionError(json.dumps(found))
    return found


def _gradients(scratch: Path) -> dict[str, Any]:
    """One forward and backward where this process sees a GPU or does not; loss and gradients to a file."""
    import torch

    from bench import precision as bench
    from hpt_mega.checkpoint.weights import own_entries
    from hpt_mega.config import Fp8Config
    from hpt_mega.megatron.step import forward_backward

    scratch.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    learner, family, shape = bench.learner_of(bench.save_llama(scratch / "llama"), Fp8Config(), 1, dtype)
    batch = bench.Language().batch(0)
    microbatches = [learner._collate(batch)]
    learner.policy.zero_grad_buffer()
    denominator = float(sum(len(t.response_tokens) for t in batch))
    forward_backward(learner.policy, microbatches, learner._objective(denominator), learner.layout)
    gradients: dict[str, Any] = {}
    parameters: list[tuple[Any, Any]] = list(own_entries(learner.policy.module, family, shape))
    for entry, parameter in parameters:
        whole = entry.fusion.merge([parameter.main_grad.float().cpu()], shape)
        gradients |= {name: part.clone() for name, part in zip(entry.hf, whole, strict=True)}
    loss = bench.heldout_loss(learner, bench.Language())
    torch.save({"loss": loss, "gradients": gradients}, scratch / "step.pt")
    return {}


def fp8_against_bf16(scratch: Path) -> dict[str, Any]:
    """200 steps of training in each recipe this GPU has, beside bf16: the final loss within 2 %."""
    import torch

    from bench import precision as bench
    from hpt_mega.config import Fp8Config, compose
    from hpt_mega.doctor import fp8_recipes

    major, minor = torch.cuda.get_device_capability()
    able = fp8_recipes(major + minor / 10)
    if not able:
        raise SkipError(f"compute capability {major}.{minor} has no FP8")
    scratch.mkdir(parents=True, exist_ok=True)
    folder, language = bench.save_llama(scratch / "llama"), bench.Language()
    final = {"bf16": bench.train(folder, language, Fp8Config(), 200)[1]}
    for name in able:
        fp8 = compose([f"precision=fp8_{name}"]).precision.fp8
        final[name] = bench.train(folder, language, fp8, 200)[1]
    gaps = {name: final[name] / final["bf16"] - 1 for name in able}
    found: dict[str, Any] = {"final_loss": final, "beside_bf16": gaps}
    if not all(abs(gap) < 0.02 for gap in gaps.values()):
        raise AssertionError(json.dumps(found))
    return found


def vllm_rollout(scratch: Path) -> dict[str, Any]:
    """Two training steps with rollouts by vLLM on the GPU, and the weights sent to it."""
    from hpt_mega.config import conf_dir

    if not (conf_dir() / "rollout" / "vllm.yaml").is_file():
        raise SkipError("this version of hpt_mega has no rollout=vllm")
    if not Path("models/smollm2-135m-instruct").is_dir():
        raise SkipError("models/smollm2-135m-instruct is missing: make it with tools/prepare_demo_model.py")
    run = scratch / "run"
    overrides = ["experiment=tiny", "parallel=single", "rollout=vllm", f"run_dir={run}"]
    command = [sys.executable, "-m", "hpt_mega.cli", "train", *overrides]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise AssertionError((ran.stdout + ran.stderr)[-3000:])
    summary = json.loads((run / "summary.json").read_text())
    if summary["policy_version"] < 2:
        raise AssertionError(f"policy_version is {summary['policy_version']} after two steps")
    return {"policy_version": summary["policy_version"], "seconds": summary["seconds"]}


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    function.__name__: function
    for function in (nccl, _ring, te_against_local, _gradients, fp8_against_bf16, vllm_rollout)
}


def run(name: str, scratch: Path) -> int:
    """Run one check; its finding, or why not, goes to SCRATCH.json."""
    import torch

    code, found = 0, {}
    try:
        if not torch.cuda.is_available() and not name.startswith("_"):
            raise SkipError("no GPU that torch can see")
        if name in ("te_against_local", "fp8_against_bf16"):
            _require("transformer_engine")
        found = CHECKS[name](scratch)
    except SkipError as reason:
        code, found = SKIPPED, {"reason": str(reason)}
    except AssertionError as error:
        code, found = 1, {"reason": str(error)}
    if not name.startswith("_"):
        scratch.with_suffix(".json").write_text(json.dumps(found))
    return code


def _require(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise SkipError(f"{package} is not installed; pip install -e .[gpu], or use docker/Dockerfile.gpu")


def verdict(scratch: Path, name: str, code: int, seconds: int) -> int:
    """Complete a check's JSON with its verdict, and say it."""
    path = scratch / f"{name}.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    log = (scratch / f"{name}.log").read_text().strip()
    word = VERDICTS.get(code, "failed")
    if word.startswith("failed") and "reason" not in found:
        found["reason"] = log[-3000:] or f"exit code {code}"
    path.write_text(json.dumps({"verdict": word, "seconds": seconds, **found}))
    print(f"{name}: {word} {str(found.get('reason', ''))[-300:]}")
    return 0


def report(scratch: Path, out: Path) -> int:
    """Join all to one JSON file; fails where a check failed."""
    names = [name for name in CHECKS if (scratch / f"{name}.json").is_file()]
    checks = {name: json.loads((scratch / f"{name}.json").read_text()) for name in names}
    doctor = json.loads((scratch / "doctor.json").read_text())
    out.write_text(json.dumps({"machine": doctor, "checks": checks}, indent=2) + "\n")
    print(out)
    return int(any(check["verdict"].startswith("failed") for check in checks.values()))


def main(arguments: list[str]) -> int:
    name, *rest = arguments
    if name == "verdict":
        return verdict(Path(rest[0]), rest[1], int(rest[2]), int(rest[3]))
    if name == "report":
        return report(Path(rest[0]), Path(rest[1]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    return run(name, Path(rest[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
