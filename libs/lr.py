"""The learning-rate schedule of training."""


def warmup_factor(step, warmup_steps):
    """What multiplies the base learning rate at update `step`, counted from 0.

    It rises linearly from 0, so that the first update changes nothing, to 1 at update
    `warmup_steps`. Without warm-up (0 or -1 steps) it is 1 throughout.
    """
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
