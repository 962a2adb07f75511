"""The planner: what a job's layout needs in memory and time, before a GPU is asked for.

Arithmetic only: no Megatron, no Hydra, no device. `plan` evaluates one layout, `search` ranks all of them.
"""

from hpt_mega.planning.hardware import HARDWARE, Hardware, hardware
from hpt_mega.planning.job import Job, Layout, PlanError
from hpt_mega.planning.memory import Memory, memory
from hpt_mega.planning.models import MODELS, ModelShape, model
from hpt_mega.planning.search import Plan, Refusal, plan, search
from hpt_mega.planning.throughput import Timing, step_time

__all__ = [
    "HARDWARE",
    "MODELS",
    "Hardware",
    "Job",
    "Layout",
    "Memory",
    "ModelShape",
    "Plan",
    "PlanError",
    "Refusal",
    "Timing",
    "hardware",
    "memory",
    "model",
    "plan",
    "search",
    "step_time",
]
