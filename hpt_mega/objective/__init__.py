"""The paper as code: one loss for every post-training algorithm, each a row of four parts.

Torch only; how a batch comes about and how its gradient is applied live elsewhere.
"""

from hpt_mega.objective.algorithms import algorithm, rows
from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.estimator import Estimator, Output, Row
from hpt_mega.objective.logprob import token_logprobs

__all__ = ["Estimator", "Output", "Row", "TokenBatch", "algorithm", "rows", "token_logprobs"]
