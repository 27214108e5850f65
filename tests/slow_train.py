"""train.py with a pause in each step, so that tests can interrupt it at a chosen step."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from libs.runtime import flags
from libs.train import loop  # noqa: E402

update = loop.update


def slow_update(*args):
    time.sleep(0.3)
    return update(*args)


loop.update = slow_update

if __name__ == "__main__":
    flags.run_main(train.main, train.FLAGS)
