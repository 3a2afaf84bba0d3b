"""Classifier-free guidance: prediction = u + w (c - u), with c given the caption and u the empty (or a negative) one."""

from torch import Tensor

SCHEDULES = ("constant", "linear")


def guidance_weight(schedule: str, scale: float, known_after_step: int, num_tokens: int) -> float:
    """w of one autoregressive step.

    constant: the scale. linear (MAR, after Muse): rises with the tokens generated, not with the steps,
    w = 1 + (scale - 1) * known / N, where `known` counts the tokens that exist after the step.
    """
    if schedule == "constant":
        return scale
    if schedule == "linear":
        return 1.0 + (scale - 1.0) * known_after_step / num_tokens
    raise ValueError(f"unknown guidance_schedule {schedule!r}; one of {', '.join(SCHEDULES)}")


def guide(conditional: Tensor, unconditional: Tensor, weight: Tensor, channels: int) -> Tensor:
    """u + w (c - u) on the first `channels`; what follows them (variance logits) is taken from the conditional side."""
    guided = conditional.clone()
    c, u = conditional[..., :channels], unconditional[..., :channels]
    guided[..., :channels] = u + weight * (c - u)
    return guided
