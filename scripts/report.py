"""Write a run directory's report.html: python scripts/report.py workdir/digits_T_flow/default"""

import sys

import checkout  # noqa: F401 - finds the project

from libs.evaluate import write_report
from libs.runtime import REQUIRED, file_path, run_main

FLAGS = {"workdir": (file_path, REQUIRED, "run directory, here without --workdir= too")}

if __name__ == "__main__":
    sys.argv[1:] = [x if x.startswith("-") else f"--workdir={x}" for x in sys.argv[1:]]
    run_main(lambda args: print(f"wrote {write_report(args.workdir)}"), FLAGS)
