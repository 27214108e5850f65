"""Does a network draw, or copy? Its pictures beside the nearest ones that it was trained on.

    python scripts/check_memory.py --nnet_path=CHECKPOINT --held_out=assets/emoji64/held_out

Draws a picture of its class for each held-out one. In low-pass pixels and config.sample's features,
`ratio` is the median distance of drawn pictures to their nearest training picture over that of
held-out pictures: about 1 for new ones, 0 for copies. The grid: drawn, nearest in both, and so on.
"""

from pathlib import Path

import checkout  # noqa: F401 - finds the project
import torch

import sample
import utils
from libs import evaluate
from libs.parts import open_dataset
from libs.runtime import REQUIRED, file_path, run_main

BATCH, TRIPLES, COLUMNS = 250, 2, 6  # triples: of a class; columns of them
FLAGS = {k: x for k, x in sample.FLAGS.items() if k not in ("classes", "n")} | {
    "held_out": (file_path, REQUIRED, "pictures that training has not seen, as dataset.path"),
    "output_path": (file_path, "memory.json", "json file of the figures"),
    "out": (file_path, "memory.png", "the grid"),
}


def measure(drawn, held_out, train):
    """(figures of one space's rows (n, dim), places (n,) of drawn rows' nearest ones in train)."""
    (own, nearest), (others, _) = (torch.cdist(rows, train).min(1) for rows in (drawn, held_out))
    found = {"drawn": own.median().item(), "held_out": others.median().item()}
    found["ratio"] = found["drawn"] / found["held_out"]
    sets = [evaluate.make_feature_set(rows.numpy(), "cpu") for rows in (drawn, held_out, train)]
    for name, pair in {"kid": (0, 1), "kid_to_train": (0, 2), "kid_of_train": (2, 1)}.items():
        sides = [{"features": sets[k]} for k in pair]
        found[name] = evaluate.compute_metrics(*sides, ["kid"])["kid"]["mean"]
    return found, nearest


def main(args):
    evaluate.choose_metrics("kid")  # it may need a package
    image_sampler, settings = sample.open_sampler(args), args.config.sample
    path, device = settings.fid_weights_path, image_sampler.device
    features = evaluate.make_features(settings.features, path, device)

    train = open_dataset(args.config)
    args.config.dataset.path = args.held_out
    held_out = open_dataset(args.config)
    labels = [train.class_names.index(held_out.class_names[label]) for label in held_out.labels]
    real = [torch.stack([x[0, i][0] for i in range(len(x))]) / 2 + 0.5 for x in (held_out, train)]
    with image_sampler:
        images, labels = [image_sampler.draw_rows(labels, 1), *real], torch.tensor(labels)

    shown = torch.cat([(labels == label).nonzero()[:TRIPLES, 0] for label in labels.unique()])
    figures, triples = {"n": len(labels), "judge": features.name}, [images[0][shown]]
    spaces = {"pixels": torch.nn.AdaptiveAvgPool2d(16), "features": features}
    for space, embed in spaces.items():
        rows = [torch.cat([embed(x).flatten(1).cpu() for x in k.split(BATCH)]) for k in images]
        figures[space], nearest = measure(*rows)
        triples.append(images[2][nearest[shown]])
    utils.save_grid(args.out, torch.stack(triples, 1).flatten(0, 1), 3 * COLUMNS)
    utils.write_json(args.output_path, figures | {"sampling": image_sampler.sampling_spec()})
    print(Path(args.output_path).read_text())


if __name__ == "__main__":
    run_main(main, FLAGS)
