"""Make the power-function average of any length after a run with two of them, say
--config.train.ema_lengths='(0.05,0.1)'. In the run directory `--nnet_path` finds its config.json.

    python scripts/posthoc_ema.py --workdir=workdir/digits_T_DiM/default --length=0.08 \\
        --out=workdir/digits_T_DiM/default/nnet_ema_length_0.08.safetensors
"""

from pathlib import Path

import checkout  # noqa: F401 - finds the project
from safetensors import safe_open
from safetensors.torch import save_file

import utils
from libs.runtime import REQUIRED, file_path, run_main
from libs.train import fit_average

FLAGS = {
    "workdir": (file_path, REQUIRED, "run directory"),
    "length": (float, REQUIRED, "sigma_rel at the last checkpoint's step, 0.001 to 0.28"),
    "out": (file_path, REQUIRED, "the .safetensors file to write"),
}


def main(args):
    out, folder = utils.file_to_write(args.out, "--out"), Path(args.workdir) / "ckpts"
    paths = sorted(folder.glob("*.ckpt/nnet_ema_length_*.safetensors"))
    if not paths:
        raise utils.UserError(f"no average in {folder}: train with --config.train.ema_lengths=(..)")
    steps = [int(path.parent.stem) for path in paths]
    lengths = [float(path.stem.rpartition("_")[2]) for path in paths]
    weights, error = fit_average(steps, lengths, max(steps), args.length)
    files, total = [safe_open(path, "pt") for path in paths], {}
    for name in files[0].keys():  # one tensor at a time is in memory, in float64
        terms = zip(weights, files, strict=True)
        total[name] = sum(w * file.get_tensor(name).double() for w, file in terms).float()
    with utils.replacing(out) as temporary:
        save_file(total, temporary)
    print(f"wrote {out} from {len(paths)} averages; the error is {error:.1%}")


if __name__ == "__main__":
    run_main(main, FLAGS)
