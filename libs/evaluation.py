"""Images from a trained network, streamed to PNG files and into statistics on every process;
nothing is gathered to one.
"""

import torch
from tqdm import tqdm

import utils
from libs import guidance, metrics, samplers
from libs.launch import ranks
from sde import eps_from_model
from utils import UserError

# Without a statistics file, a data set up to this size is measured on the spot.
MEASURE_UP_TO = 10_000


class ImageGenerator:
    """Image by index: the same index gives the same picture, whatever the batch and the number of
    processes.

    Args:
        model: the network, in eval mode.
        process, codec: of training.
        config: the run's config; its `pred`, `train.mode` and `sample` sections are read.
        image_shape: (C, H, W) of the images.
        precision: libs.launch.Precision of the forward passes.
        seed: every image's noise and random label are keyed by (seed, index).
    """

    def __init__(self, model, process, codec, config, *, image_shape, precision, seed):
        self.model, self.process, self.codec, self.precision, self.seed = (
            model,
            process,
            codec,
            precision,
            seed,
        )
        self.settings, self.pred = config.sample, config.pred
        self.conditional = config.train.mode == "cond"
        self.z_shape = codec.latent_shape(image_shape)
        self.device = next(model.parameters()).device
        if self.settings.labels not in ("random", "balanced"):
            raise UserError(
                f"sample.labels is {self.settings.labels!r}, expected 'random' or 'balanced'"
            )
        if self.conditional and not model.num_classes:
            raise UserError("train.mode is 'cond', but nnet.num_classes is 0: give the classes")
        # Whatever the sampler cannot do is said here, not at the first grid of a long training.
        self._draw(lambda x, t, y: torch.zeros_like(x), [0], self.labels_of([0]))

    def labels_of(self, indices):
        """Labels (B,) int64 of images by index, or None in an unconditional run."""
        if not self.conditional:
            return None
        classes = self.model.num_classes
        if self.settings.labels == "balanced":
            return torch.tensor([index % classes for index in indices])
        return torch.tensor(
            [utils.derive_seed("label", self.seed, index) % classes for index in indices]
        )

    def recipe(self):
        """What it takes to make these images again: dict for the log and the result file."""
        scale = self.settings.scale if self.conditional and self.settings.cfg else 0.0
        return {
            "algorithm": self.settings.algorithm,
            "steps": self.settings.sample_steps,
            "guidance_scale": scale,
            "guidance_scale_standard": 1 + scale,  # w of uncond + w * (cond - uncond)
            "guidance_interval": self.settings.guidance_interval,
            "labels": self.settings.labels if self.conditional else None,
            "seed": self.seed,
            "precision": self.precision.name,
            "z_shape": self.z_shape,
        }

    @torch.no_grad()
    def __call__(self, indices, labels=None, on_step=None):
        """Images (B, C, H, W) float32 in [0, 1] of `indices`; labels (B,) int64 override
        `labels_of`.
        """
        labels = self.labels_of(indices) if labels is None else labels
        predict = eps_from_model(self.model, self.process, self.pred)
        with self.precision.autocast():
            return self.codec.decode(self._draw(predict, indices, labels, on_step))

    def _draw(self, predict, indices, labels, on_step=None):
        """z (B, *z_shape) of `indices`, by the noise prediction predict(x, t, y)."""
        y = None if labels is None else labels.to(self.device)
        noise = samplers.ImageNoise(self.seed, indices, self.z_shape)
        eps_fn = guidance.classifier_free(
            predict,
            y,
            self.recipe()["guidance_scale"],
            self.model.num_classes,
            self.settings.guidance_interval,
        )
        return samplers.sample(
            eps_fn,
            self.process,
            noise.initial().to(self.device),
            algorithm=self.settings.algorithm,
            steps=self.settings.sample_steps,
            noise=noise,
            on_step=on_step,
        )


def batches_of_rank(n, mini_batch_size, accelerator):
    """Lists of image indices of this process: every num_processes-th index below n,
    `mini_batch_size` at a time.
    """
    indices = range(accelerator.process_index, n, accelerator.num_processes)
    return [list(indices[i : i + mini_batch_size]) for i in range(0, len(indices), mini_batch_size)]


def as_saved(images):
    """Images in [0, 1] rounded as PNG files hold them, so that statistics describe the files."""
    return (images * 255).round() / 255


def measure(
    generator, features, accelerator, *, n, folder=None, title="sampling", stop=lambda: False
):
    """Make images 0..n-1, keep them as folder/<index>.png if asked, and sum up their features.

    Returns:
        (metrics.Moments over all processes, class agreement in [0, 1] or None if it is not
        defined); None if `stop()` came true.
    """
    moments = metrics.Moments(features.dim, accelerator.device)
    agreeing = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    classify = getattr(features, "classify", None) if generator.conditional else None
    batches = batches_of_rank(n, generator.settings.mini_batch_size, accelerator)
    total, quiet = sum(map(len, batches)), not accelerator.is_main_process
    bar = tqdm(total=total, desc=title, unit="img", disable=quiet)
    stopped = torch.zeros((), device=accelerator.device)
    with bar:
        for indices in batches:
            if stop():
                stopped += 1
                break
            images = as_saved(generator(indices))
            moments.update(features(images))
            if classify is not None:
                agreeing += (classify(images).cpu() == generator.labels_of(indices)).sum().item()
            for index, image in zip(indices, images, strict=True) if folder else ():
                utils.save_png(folder / f"{index}.png", image)
            bar.update(len(indices))
    for tensor in (moments.count, moments.sum, moments.outer, agreeing, stopped):
        tensor.copy_(accelerator.reduce(tensor, "sum"))
    if stopped.item():
        return None
    return moments, agreeing.item() / n if classify is not None else None


def make_grid_images(generator, accelerator, n, stop=lambda: False):
    """Images 0..n-1 on every process, (n, C, H, W), each made on one of them; None if `stop()` came
    true. For small n.
    """
    images = torch.zeros(
        n,
        *generator.codec.decode(torch.zeros(1, *generator.z_shape, device=generator.device)).shape[
            1:
        ],
    )
    images, stopped = images.to(accelerator.device), torch.zeros((), device=accelerator.device)
    for indices in batches_of_rank(n, generator.settings.mini_batch_size, accelerator):
        if stop():
            stopped += 1
            break
        images[indices] = generator(indices)
    stopped = accelerator.reduce(stopped, "sum")
    images = accelerator.reduce(images, "sum")
    return None if stopped.item() else images


def dataset_moments(features, dataset, accelerator, indices=None):
    """Moments of real images (all, or of `indices`), as 8-bit files hold them; and the share that
    `features` classifies right, or None.
    """
    moments, right = metrics.Moments(features.dim, accelerator.device), 0
    indices = list(range(len(dataset)) if indices is None else indices)
    for start in range(0, len(indices), 500):
        rows = [dataset[(0, index)] for index in indices[start : start + 500]]
        images = as_saved(torch.stack([x for x, _ in rows]).mul(0.5).add(0.5)).to(
            accelerator.device
        )
        moments.update(features(images))
        if hasattr(features, "classify"):
            right += (
                (features.classify(images).cpu() == torch.tensor([int(y) for _, y in rows]))
                .sum()
                .item()
            )
    return moments, right / len(indices) if hasattr(features, "classify") else None


def require_statistics(config, dataset):
    """UserError where FID can have no real side: no statistics file, and many images."""
    if not config.dataset.fid_stats and len(dataset) > MEASURE_UP_TO:
        raise UserError(
            "dataset.fid_stats names no statistics file: make one with "
            "scripts/compute_fid_stats.py (see the README) and pass "
            "--config.dataset.fid_stats=FILE"
        )


def real_statistics(config, features, dataset, accelerator):
    """(mu, sigma, description) of the real images: from dataset.fid_stats, or measured here.

    Raises:
        UserError: `require_statistics`, or the file was made by another extractor or at another
            resolution.
    """
    require_statistics(config, dataset)
    path, resolution = config.dataset.fid_stats, dataset.shape[-1]
    if not path:
        mu, sigma = dataset_moments(features, dataset, accelerator)[0].mean_and_covariance()
        return mu, sigma, {"file": None, "count": len(dataset), "known": True}
    statistics = metrics.load_statistics(
        path, extractor=features.name, resolution=resolution, dim=features.dim
    )
    source = {"file": path, "sha256": statistics.sha256, "count": statistics.count}
    return statistics.mu, statistics.sigma, {**source, "known": statistics.known}


def halves_baseline(features, dataset, accelerator, seed):
    """How two random halves of the real images compare, the floor for generated ones.

    Returns:
        {'frechet_distance': of the halves, 'class_agreement': of their mean, or None}.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    half = len(order) // 2
    a, right_a = dataset_moments(features, dataset, accelerator, order[:half])
    b, right_b = dataset_moments(features, dataset, accelerator, order[half:])
    distance = metrics.frechet_distance(*a.mean_and_covariance(), *b.mean_and_covariance())
    agreement = None if right_a is None else (right_a + right_b) / 2
    return {"frechet_distance": distance, "class_agreement": agreement}


def evaluate(
    generator, features, dataset, config, accelerator, *, n, folder=None, stop=lambda: False
):
    """Frechet distance (FID with Inception features) of n generated images to the real ones, and
    the whole recipe.

    Returns:
        dict for the log and for json; None if `stop()` came true.
    """
    mu, sigma, source = real_statistics(config, features, dataset, accelerator)
    measured = measure(generator, features, accelerator, n=n, folder=folder, stop=stop)
    if measured is None:
        return None
    moments, agreement = measured
    result = {
        "frechet_distance": metrics.frechet_distance(*moments.mean_and_covariance(), mu, sigma),
        "class_agreement": agreement,
        "n": n,
        "features": features.name,
        "statistics": source,
        "ranks": ranks(accelerator),
        **generator.recipe(),
    }
    if len(dataset) <= MEASURE_UP_TO:
        result["real_halves"] = halves_baseline(features, dataset, accelerator, generator.seed)
    return result


def describe(result):
    """An evaluation as lines for people, the figures first."""

    def figures(values):
        text = f"Frechet distance {values['frechet_distance']:.4g}"
        agreement = values["class_agreement"]
        return text if agreement is None else f"{text}, class agreement {agreement:.2%}"

    lines = [f"{figures(result)} over {result['n']} images ({result['features']})"]
    if halves := result.get("real_halves"):
        lines.append(f"two halves of the real images: {figures(halves)}")
    lines.append(
        f"guidance {result['guidance_scale']:g} (cond + s (cond - uncond); elsewhere written w = "
        f"{result['guidance_scale_standard']:g}), {result['algorithm']}, {result['steps']} steps, "
        f"seed {result['seed']}, precision {result['precision']}"
    )
    if not result["statistics"]["known"]:
        lines.append(
            f"{result['statistics']['file']} has only mu and sigma: extractor, resolution and "
            "count of the real images unknown"
        )
    return lines


def labels_of_classes(classes, n, num_classes, *, conditional):
    """Labels (classes x n,) of n images of each class asked for, or of all; None if unconditional.

    Raises:
        UserError: a class that does not exist.
    """
    if not conditional:
        if classes:
            raise UserError("this model was trained without classes: leave --classes out")
        return None
    wrong = [c for c in classes or () if not 0 <= c < num_classes]
    if wrong:
        raise UserError(
            f"class {wrong[0]} does not exist: this model has classes 0 to {num_classes - 1}"
        )
    return torch.tensor(classes or range(num_classes)).repeat_interleave(n)


def draw_in_batches(generator, labels, n):
    """Images 0..n-1 (n, C, H, W) on the CPU, with `labels` (n,) or None, and a progress bar."""
    batches = torch.arange(n).split(generator.settings.mini_batch_size)
    with tqdm(unit="step") as bar:

        def on_step(i, steps):
            bar.total = steps * len(batches)
            bar.update()

        images = [
            generator(rows.tolist(), None if labels is None else labels[rows], on_step).cpu()
            for rows in batches
        ]
    return torch.cat(images)
