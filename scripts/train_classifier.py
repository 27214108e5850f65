"""Train a small classifier of a labelled data set, in whose features images are judged.

    python scripts/train_classifier.py --dataset=digits --epochs=10 \\
        --out=assets/digits_classifier.safetensors
    python scripts/train_classifier.py --dataset=fashion_mnist --path=DIR --epochs=4 \\
        --out=assets/fashion_mnist_classifier.safetensors

The images are held in memory. Prints the accuracy on a held-out fifth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import utils
from datasets import get_dataset
from libs.evaluate import Classifier
from libs.runtime import REQUIRED, file_path, run_main

PEAK_LR, WEIGHT_DECAY, LABEL_SMOOTHING = 3e-3, 0.05, 0.1
FLAGS = {
    "dataset": (str, REQUIRED, "a data set of images with classes: digits, fashion_mnist, ..."),
    "path": (file_path, None, "the data set's directory"),
    "resolution": (int, None, "side of the images in pixels; the data set's own if not given"),
    "out": (file_path, REQUIRED, "the .safetensors file to write"),
    "epochs": (int, 10, "passes over the training part"),
    "batch_size": (int, 64, "images a step"),
    "shift": (int, 1, "images are moved by up to this many pixels"),
    "flip": (bool, False, "half of the images are mirrored"),
    "seed": (int, 0, "of the split and the training"),
    "device": (str, "cuda" if torch.cuda.is_available() else "cpu", "where it trains"),
}


def load_split(dataset, seed):
    """Images in [-1, 1] (n, C, H, W) and labels (n,) of the training part and, of the same share
    of each class, of the held-out fifth.
    """
    images = torch.stack([dataset[0, i][0] for i in range(len(dataset))])
    labels = torch.from_numpy(dataset.labels)
    train, held_out = train_test_split(
        torch.arange(len(labels)), test_size=0.2, stratify=dataset.labels, random_state=seed
    )
    return images[train], labels[train], images[held_out], labels[held_out]


def augment(images, shift, flip, rng):
    """Each image moved by up to `shift` pixels in both directions, empty pixels -1, and, with
    `flip`, half of them mirrored.
    """
    n, channels, height, width = images.shape
    if flip:
        mirrored = torch.rand(n, generator=rng) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (shift,) * 4, value=-1)
    moves = torch.randint(2 * shift + 1, (2, n, 1), generator=rng)
    rows, columns = moves[0] + torch.arange(height), moves[1] + torch.arange(width)  # (n, H), W
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None]]


def train(args, images, labels, num_classes):
    """The trained Classifier; the same seed gives the same weights."""
    torch.manual_seed(args.seed)
    model = Classifier(channels=images.shape[1], num_classes=num_classes).to(args.device)
    rng = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    steps = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=args.epochs * steps
    )
    with tqdm(total=args.epochs * steps, desc="classifier", unit="step") as bar:
        for _ in range(args.epochs):
            order = torch.randperm(len(images), generator=rng)[: steps * args.batch_size]
            for batch in order.split(args.batch_size):
                moved = augment(images[batch], args.shift, args.flip, rng).to(args.device)
                logits, y = model(moved), labels[batch].to(args.device)
                loss = F.cross_entropy(logits, y, label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


def main(args):
    utils.file_to_write(args.out, "--out")
    torch.set_num_threads(1)  # sums in one order: the same weights on any number of cores
    dataset = get_dataset(args.dataset, path=args.path, resolution=args.resolution)
    images, labels, held_out_images, held_out_labels = load_split(dataset, args.seed)
    model = train(args, images, labels, dataset.num_classes)
    with torch.inference_mode():
        batches = held_out_images.split(500)
        found = torch.cat([model(batch.to(args.device)).argmax(1).cpu() for batch in batches])
    accuracy = (found == held_out_labels).double().mean().item()
    print(f"held-out accuracy {accuracy:.4f} on {len(found):,} of {len(dataset):,} images")
    metadata = {"dataset": args.dataset, "held_out_accuracy": f"{accuracy:.4f}"}
    metadata["split"] = f"a fifth held out, stratified, seed {args.seed}"
    with utils.replacing(args.out) as temporary:
        temporary.write_bytes(safetensors.torch.save(model.cpu().state_dict(), metadata))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main, FLAGS)
