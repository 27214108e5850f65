"""Data sets that torchvision downloads."""

import fcntl

from utils import UserError


def open_torchvision(name, root, what, *, download):
    """torchvision's data set `name` in `root`. UserError if it is not there nor to be had."""
    import torchvision

    kind = getattr(torchvision.datasets, name)
    try:
        if not download:
            return kind(root)
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # other processes wait for the first
            return kind(root, download=True)
    except (RuntimeError, OSError) as error:
        text = f"{root} has no {what}, and they could not be downloaded ({error})"
        raise UserError(text) from error
