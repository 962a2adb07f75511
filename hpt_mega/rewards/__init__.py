"""Verifiers of final answers: rewards in {0, 1}, safe against hostile text. Nothing here imports torch."""

from hpt_mega.rewards.pool import RewardPool
from hpt_mega.rewards.verdict import Verdict

__all__ = ["RewardPool", "Verdict"]
