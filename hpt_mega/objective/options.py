"""The options a row of the table may set, each by its field's name; the parts read them from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Numbers of the four parts and of the two extra terms (KL, entropy). A row has its own defaults."""

    clip_low: float = 0.2  # lower clip: ratio below 1 - clip_low
    clip_high: float = 0.2  # upper clip: ratio above 1 + clip_high
    clip_dual: float = 3.0  # dual clip: ratio at which a negative advantage stops pushing
    correction_low: float = 0.5  # trainer/engine ratio below which masked corrections drop a token
    correction_high: float = 2.0  # ... above which they drop it, and at which truncated ones cap it
    reject_low: float = 0.5  # the same interval for the reject_ corrections, which only keep or drop
    reject_high: float = 2.0
    entropy_sft: float = 0.5  # SRFT: weight of the demonstration's SFT term at entropy 0
    entropy_rl: float = 0.1  # ... and of rollouts with a positive advantage
    offline_coef: float = 1.0  # weight of a demonstration's loss, in rows with an offline half
    shaping_gamma: float = 0.1  # LUFFY's x / (x + gamma)
    shaping_power: float = 0.5  # x ** power; one half is the square root
    std_eps: float = 1e-6  # added to a standard deviation before dividing
    beta: float = 0.1  # DPO's inverse temperature
    gae_gamma: float = 1.0
    gae_lambda: float = 0.95
    kl_coef: float = 0.0  # KL to the reference model
    kl_form: str = "k3"  # k1, k2 or k3
    kl_in: str = "loss"  # loss, or reward: then it is subtracted from the reward before the advantage
    entropy_coef: float = 0.0
    # constant aggregation: tokens a sequence is divided by; None: the batch's T, in `hpt train` the longest
    # response there can be
    length: float | None = None
