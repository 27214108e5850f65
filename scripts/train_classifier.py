"""Train a small classifier of a labelled data set, in whose features images are judged.

    python scripts/train_classifier.py --dataset=digits --epochs=10 \\
        --out=assets/digits_classifier.safetensors
    python scripts/train_classifier.py --dataset=fashion_mnist --path=DIR --epochs=4 \\
        --out=assets/fashion_mnist_classifier.safetensors

The images are held in memory. Prints the accuracy on a held-out fifth.
"""

import checkout  # noqa: F401 - finds the project
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import utils
from datasets import get_dataset
from libs.evaluate import Classifier
from libs.runtime import REQUIRED, file_path, run_main

PEAK_LR, WEIGHT_DECAY, LABEL_SMOOTHING = 3e-3, 0.05, 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAGS = {
    "dataset": (str, REQUIRED, "a data set of images with classes: digits, fashion_mnist, ..."),
    "path": (file_path, None, "the data set's directory"),
    "resolution": (int, None, "side of the images in pixels; the data set's own if not given"),
    "out": (file_path, REQUIRED, "the .safetensors file to write"),
    "epochs": (int, 10, "passes over the training part"),
    "batch_size": (int, 64, "images a step"),
    "shift": (int, 1, "images are moved by up to this many pixels"),
    "seed": (int, 0, "of the split and the training"),
}


def load_split(dataset, seed):
    """Images (n, C, H, W) in [-1, 1] of the training part, and a fifth of each class; labels."""
    images = np.stack([dataset[0, i][0] for i in range(len(dataset))])
    split = dict(test_size=0.2, stratify=dataset.labels, random_state=seed)
    return list(map(torch.from_numpy, train_test_split(images, dataset.labels, **split)))


def augment(images, shift, rng):
    """Each image moved by up to `shift` pixels either way, over -1."""
    height, width = images.shape[2:]
    moves = torch.randint(2 * shift + 1, (2, len(images)), generator=rng).tolist()
    padded = zip(F.pad(images, (shift,) * 4, value=-1), *moves, strict=True)
    return torch.stack([image[:, y : y + height, x : x + width] for image, y, x in padded])


def train(args, images, labels, num_classes):
    """The trained Classifier; the same images give the same weights."""
    torch.manual_seed(args.seed)
    model = Classifier(channels=images.shape[1], num_classes=num_classes).to(DEVICE)
    rng = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    steps = len(images) // args.batch_size
    total = args.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=total)
    for _ in tqdm(range(args.epochs), desc="classifier", unit="epoch"):
        for batch in torch.randperm(len(images), generator=rng).split(args.batch_size)[:steps]:
            moved = augment(images[batch], args.shift, rng).to(DEVICE)
            logits, y = model(moved), labels[batch].to(DEVICE)
            optimizer.zero_grad()
            F.cross_entropy(logits, y, label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(args):
    utils.file_to_write(args.out, "--out")
    torch.set_num_threads(1)  # sums in one order: the same weights on any number of cores
    dataset = get_dataset(args.dataset, path=args.path, resolution=args.resolution)
    images, held_out_images, labels, held_out_labels = load_split(dataset, args.seed)
    model = train(args, images, labels, dataset.num_classes)
    with torch.inference_mode():
        found = [model(x.to(DEVICE)).argmax(1).cpu() for x in held_out_images.split(500)]
    accuracy = (torch.cat(found) == held_out_labels).double().mean().item()
    print(f"held-out accuracy {accuracy:.4f} of {len(held_out_labels):,} images")
    with utils.replacing(args.out) as temporary:
        save_file(model.cpu().state_dict(), temporary)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main, FLAGS)
