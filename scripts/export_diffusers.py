"""Write a folder for DiMPipeline.from_pretrained; how it samples by default, sample.py's flags say.

    python scripts/export_diffusers.py --nnet_path=workdir/digits_T_flow/default/ckpts/1000.ckpt \\
        --out=digits_pipeline
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample
import utils
from libs.runtime import REQUIRED, file_path, run_main
from pipeline import DiMPipeline

FLAGS = sample.FLAGS | {"out": (file_path, REQUIRED, "the folder to write")}


def main(args):
    sampler = sample.open_sampler(args)
    about = Path(args.nnet_path).absolute().parents[1] / "environment.json"
    classes = utils.read_json(about).get("classes", {}) if about.is_file() else {}
    names = {number: name for name, number in classes.items()} or None
    pipe = DiMPipeline.from_parts(args.config, sampler.model, sampler.codec, names)
    pipe.save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main, FLAGS)
