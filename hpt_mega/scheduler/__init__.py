"""HPT's scheduler: from pass rates to weights (gate.py), from weights to a step's trajectories (blend.py)."""

from hpt_mega.scheduler.blend import Schedule, demonstration, schedule
from hpt_mega.scheduler.gate import GATES, Gate, gate

__all__ = ["GATES", "Gate", "Schedule", "demonstration", "gate", "schedule"]
