"""Training: the loop and its parts."""

from libs.train.loop import train

__all__ = [
    "train",
]
