"""Make the power-function average of any length after a run that kept some: of two lengths, say,
--config.train.ema_lengths=(0.05,0.1), in each of its checkpoints (arXiv 2312.02696).

    python scripts/posthoc_ema.py --workdir=workdir/digits_T_DiM/default --length=0.08 \\
        --out=workdir/digits_T_DiM/default/nnet_ema_length_0.08.safetensors

`sample.py` and `eval.py` take the file as --nnet_path; in the run directory they find its
config.json.
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors import safe_open
from safetensors.torch import save_file

import utils
from libs.runtime import REQUIRED, file_path, run_main
from libs.train import fit_average

FLAGS = {
    "workdir": (file_path, REQUIRED, "run directory"),
    "length": (float, REQUIRED, "sigma_rel of the average, at the last checkpoint's step"),
    "out": (file_path, REQUIRED, "the .safetensors file to write"),
}


def add_up(files, coefficients):
    """{name: tensor} of weighted files, one tensor at a time in float64."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        return {
            name: sum(
                coefficient * file.get_tensor(name).double()
                for coefficient, file in zip(coefficients, opened, strict=True)
            ).float()
            for name in opened[0].keys()
        }


def main(args):
    utils.file_to_write(args.out, "--out")
    files = sorted(Path(args.workdir).glob("ckpts/*.ckpt/nnet_ema_length_*.safetensors"))
    if not files:
        raise utils.UserError(
            f"no checkpoint in {args.workdir}/ckpts has a power-function average: train with "
            "--config.train.ema_lengths=(0.05,0.1)"
        )
    steps = [int(file.parent.stem) for file in files]
    lengths = [float(file.stem.rpartition("_")[2]) for file in files]
    coefficients, error = fit_average(steps, lengths, max(steps), args.length)
    with utils.replacing(args.out) as temporary:
        save_file(add_up(files, coefficients), temporary)
    print(
        f"wrote {args.out}: length {args.length} at step {max(steps)} from {len(files)} averages; "
        f"the profile is {error:.2g} of its norm away"
    )


if __name__ == "__main__":
    run_main(main, FLAGS)
