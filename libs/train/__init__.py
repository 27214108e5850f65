"""Training: the loop and its parts."""

from libs.train.ema import fit_average
from libs.train.loop import train
from libs.train.losses import LOSSES, loss_term
from libs.train.optimizer import OPTIMIZERS, SCHEDULES

__all__ = [
    "LOSSES",  # registry: name -> loss term, filled by the decorator `loss_term`
    "OPTIMIZERS",  # registry: name -> f(network, settings)
    "SCHEDULES",  # registry: name -> f(step, warmup_steps, n_steps)
    "fit_average",  # the average of any length out of those of some lengths and steps
    "loss_term",  # decorator of a new loss term
    "train",  # a whole run
]
