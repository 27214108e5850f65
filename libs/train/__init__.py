"""Training: the loop and its parts.

train                    a whole run
LOSSES, loss_term        name -> loss term; decorator of a new one
OPTIMIZERS, SCHEDULES    name -> f(network, settings); name -> f(step, warmup_steps, n_steps)
fit_average              the average of any length out of those of some lengths and steps
"""

from libs.train.ema import fit_average
from libs.train.loop import train
from libs.train.losses import LOSSES, loss_term
from libs.train.optimizer import OPTIMIZERS, SCHEDULES
