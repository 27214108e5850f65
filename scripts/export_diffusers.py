"""Write a folder for DiMPipeline.from_pretrained; how it samples by default, sample.py's flags say.

    python scripts/export_diffusers.py --nnet_path=CHECKPOINT --out=digits_pipeline
"""

import checkout  # noqa: F401 - finds the project

import sample
from libs.runtime import REQUIRED, file_path, read_class_names, run_main
from pipeline import DiMPipeline

FLAGS = {k: x for k, x in sample.FLAGS.items() if k not in ("classes", "n", "seed")}
FLAGS |= {"out": (file_path, REQUIRED, "the folder to write")}


def main(args):
    args.seed = 0  # nothing is drawn
    sampler = sample.open_sampler(args)
    names = dict(enumerate(read_class_names(args.nnet_path))) or None
    pipe = DiMPipeline.from_parts(args.config, sampler.model, sampler.codec, names)
    pipe.save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main, FLAGS)
