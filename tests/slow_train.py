"""train.py with a pause in each step, so that tests can interrupt it at a chosen step, and one of
SLOW_SAVE_S seconds in each checkpoint.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from libs.runtime import flags
from libs.train import checkpoint, loop  # noqa: E402

update, write_json = loop.update, checkpoint.write_json


def slow_update(*args):
    time.sleep(0.3)
    return update(*args)


def slow_write_json(*args):
    time.sleep(float(os.environ.get("SLOW_SAVE_S", "0")) / 2)
    write_json(*args)


loop.update, checkpoint.write_json = slow_update, slow_write_json

if __name__ == "__main__":
    flags.run_main(train.main, train.FLAGS)
