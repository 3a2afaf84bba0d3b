"""Learning-rate schedules: the factor on every group's base rate."""

import math

from fluid_core.config import TrainingConfig


def learning_rate_factor(training: TrainingConfig, step: int) -> float:
    """The factor of the update number `step` (from 1): linear warm-up, then constant, cosine to 0, or a linear tail to 0.

    Paper: constant after 65K steps for continuous tokens, cosine for discrete ones.
    """
    if step <= training.warmup_steps:
        return step / training.warmup_steps
    if training.schedule == "cosine":
        done = (step - training.warmup_steps) / max(1, training.max_steps - training.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if training.schedule == "linear_decay":
        tail = training.decay_fraction * training.max_steps
        return min(1.0, (training.max_steps - step + 1) / tail) if tail else 1.0
    return 1.0
