"""Verifiers of final answers, 0 or 1, and own functions, 0 to 1; safe against hostile text, without torch."""

from hpt_mega.rewards.pool import RewardPool
from hpt_mega.rewards.verdict import Verdict

__all__ = ["RewardPool", "Verdict"]
