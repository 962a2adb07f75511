"""One task of a Slurm job as one rank of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hpt_mega.config import ConfigError

STOPPED = "stopped"  # the file in RUN_DIR/logs by which slurm/common.sh knows that the run is to go on


def rank_environment() -> dict[str, str]:
    """What torch.distributed wants to know, from what Slurm says. Raises ConfigError outside a task."""
    try:
        return {
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "WORLD_SIZE": os.environ["SLURM_NTASKS"],
            "LOCAL_WORLD_SIZE": str(
                int(os.environ["SLURM_NTASKS"]) // int(os.environ["SLURM_STEP_NUM_NODES"])
            ),
        }
    except KeyError as error:
        raise ConfigError(f"{error.args[0]} is not set; this is for tasks that srun starts") from None


def run_rank(overrides: Sequence[str]) -> int:
    """hpt train as this task's rank.

    A run that saved and stopped because it was asked to ends with 0 here: srun would kill the tasks that
    are a moment behind for any other code. Rank 0 leaves a file that tells it from a finished run.
    """
    os.environ.update(rank_environment())

    from hpt_mega.cli import main
    from hpt_mega.config import compose
    from hpt_mega.interruption import STOPPED_CODE

    code = main(["train", *overrides])
    if code != STOPPED_CODE:
        return code
    if os.environ["RANK"] == "0":
        (Path(compose(overrides).run_dir) / "logs" / STOPPED).touch()
    return 0
