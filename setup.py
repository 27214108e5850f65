"""Everything is in pyproject.toml. Besides, DIM_PREBUILD_ARCHS="90;100" pip install -e .
--no-build-isolation compiles the CUDA kernels of the shipped configs ahead of time, for sm_90 and
sm_100; it needs no GPU. What it did is printed (pip shows it with -v) and kept in
libs/ops/prebuilt/report.txt, which `python -m libs.ops` repeats.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup

setup()

# setup.py runs several times in an installation; this is the run that installs.
installing = {"editable_wheel", "bdist_wheel", "develop"} & set(sys.argv)
if os.environ.get("DIM_PREBUILD_ARCHS") and installing:
    if importlib.util.find_spec("torch") is None:
        print("no CUDA kernels prebuilt: torch is not visible; add --no-build-isolation to pip")
    else:  # in a process of its own: whatever goes wrong there, the installation is complete
        subprocess.run(
            [sys.executable, "-m", "libs.ops.cuda.prebuild", os.environ["DIM_PREBUILD_ARCHS"]],
            cwd=Path(__file__).resolve().parent,
            check=False,
        )
