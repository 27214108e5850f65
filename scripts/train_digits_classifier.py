"""Train the small digits classifier in whose features generated digits are judged.

    python scripts/train_digits_classifier.py

Takes about 8 s on a CPU; prints the accuracy on a held-out fifth (about 0.99) and writes
assets/digits_classifier.safetensors, or nothing below MIN_ACCURACY.
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
from libs.evaluate import DigitsClassifier
from libs.runtime import file_path, run_main

EPOCHS, BATCH_SIZE, PEAK_LR, WEIGHT_DECAY, MIN_ACCURACY = 25, 64, 3e-3, 0.05, 0.97
FLAGS = {
    "seed": (int, 0, "of the split and the training"),
    "out": (file_path, str(DigitsClassifier.path), "the file to write"),
}


def load_split(seed):
    """Images in [0, 1] (n, 1, 8, 8) and labels of the training part and of the held-out fifth."""
    digits = get_dataset("digits")
    images = torch.stack([digits[0, i][0] for i in range(len(digits))]) / 2 + 0.5
    labels = torch.from_numpy(digits.labels)
    train, held_out = train_test_split(
        torch.arange(len(labels)), test_size=0.2, stratify=digits.labels, random_state=seed
    )
    return images[train], labels[train], images[held_out], labels[held_out]


def random_shift(images, rng):
    """Each image moved by -1, 0 or 1 pixel in both directions, empty pixels black."""
    n = len(images)
    padded = F.pad(images, (1, 1, 1, 1))  # (n, 1, 10, 10)
    rows = torch.randint(3, (n, 1), generator=rng) + torch.arange(8)  # (n, 8)
    columns = torch.randint(3, (n, 1), generator=rng) + torch.arange(8)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None]][:, None]


def train(images, labels, seed):
    """The trained classifier; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model, rng = DigitsClassifier(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for _ in tqdm(range(EPOCHS), desc="digits classifier", unit="epoch"):
        order = torch.randperm(len(images), generator=rng)
        for batch in order[: steps // EPOCHS * BATCH_SIZE].split(BATCH_SIZE):
            logits = model(random_shift(images[batch], rng))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(args):
    utils.file_to_write(args.out, "--out")
    torch.set_num_threads(1)  # sums in one order: the same weights on any number of cores
    images, labels, held_out_images, held_out_labels = load_split(args.seed)
    model = train(images, labels, args.seed)
    with torch.inference_mode():
        accuracy = (model(held_out_images).argmax(1) == held_out_labels).double().mean().item()
    print(f"held-out accuracy {accuracy:.4f} on {len(held_out_labels)} of 1,797 digits")
    if accuracy < MIN_ACCURACY:
        raise utils.UserError(f"accuracy below {MIN_ACCURACY}: {args.out} is not written")
    split = f"stratified held-out fifth, {len(labels)} training and {len(held_out_labels)} held out"
    metadata = {"held_out_accuracy": f"{accuracy:.4f}", "seed": str(args.seed), "split": split}
    with utils.replacing(args.out) as temporary:
        temporary.write_bytes(safetensors.torch.save(model.state_dict(), metadata))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main, FLAGS)
