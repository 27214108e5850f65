"""Everything is in pyproject.toml. Besides, DIM_PREBUILD_ARCHS="90;100" pip install -e .
--no-build-isolation compiles the CUDA kernels of the shipped configs for sm_90 and sm_100 into the
cache ahead of time; it needs no GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup

setup()

# setup.py runs several times in an installation; this is the run that installs.
installing = {"editable_wheel", "bdist_wheel", "develop"} & set(sys.argv)
if os.environ.get("DIM_PREBUILD_ARCHS") and installing:
    subprocess.run(  # whatever goes wrong there, the installation is complete
        [sys.executable, "-m", "libs.ops.cuda.prebuild", os.environ["DIM_PREBUILD_ARCHS"]],
        cwd=Path(__file__).resolve().parent,
        check=False,
    )
