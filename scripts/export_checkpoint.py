"""Write averaged weights in bfloat16, half the size, and their config.

    python scripts/export_checkpoint.py --nnet_path=CHECKPOINT --out=pretrained/emoji64.ckpt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import save_file

import utils
from libs.files import read_safetensors, weights_file
from libs.runtime import EVALUATION, REQUIRED, file_path, run_main

FLAGS = {name: EVALUATION[name] for name in ("nnet_path", "config")}
FLAGS["out"] = (file_path, REQUIRED, "the <name>.ckpt directory to write")


def main(args):
    path = utils.make_directory(args.out) / "nnet_ema.safetensors"
    tensors = read_safetensors(weights_file(args.nnet_path))
    save_file({name: x.bfloat16() for name, x in tensors.items()}, path)
    utils.write_json(path.with_name("config.json"), args.config.to_dict())


if __name__ == "__main__":
    run_main(main, FLAGS)
