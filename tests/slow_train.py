"""train.py with a pause in each step, so that tests can interrupt it at a chosen step, and one of
SLOW_SAVE_S seconds in each checkpoint.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from libs.runtime import flags  # noqa: E402
from libs.train import checkpoint, loop  # noqa: E402


def slow_down(module, name, seconds):
    function = getattr(module, name)
    setattr(module, name, lambda *given: time.sleep(seconds) or function(*given))


slow_down(loop, "finish_step", 0.3)
slow_down(checkpoint, "write_json", float(os.environ.get("SLOW_SAVE_S", "0")) / 2)

if __name__ == "__main__":
    flags.run_main(train.main, train.FLAGS)
