"""Images of a trained network by index, and their features.

The same index gives the same picture, for any batch size and number of processes.
"""

import functools

import torch
from tqdm import tqdm

import utils
from libs.diffusion import ImageNoise, make_guided, sample
from libs.evaluate import metrics
from libs.evaluate.real_images import as_saved, halves_baseline
from libs.ops import fp8
from libs.runtime import WAITING, SamplingNetwork, beat
from utils import UserError


def require_class(flag, label, num_classes):
    """UserError unless the model has class `label`; num_classes: 0 without classes."""
    if not 0 <= label < num_classes:
        raise UserError(
            f"{flag} asks for class {label}, but this model has {num_classes} classes, counted "
            "from 0"
        )


class ImageSampler:
    """Image by index; the memory that makes sampling fast goes back at the end of a `with` block.

    Args:
        model: the network, in eval mode; process, codec: of training.
        pred: what the network predicts; conditional: whether it is given labels.
        settings: config.sample.
        guide: (network, process, y, null_label=) -> its guided output(x, t).
        upsampling: None, or the settings of upsampling guidance, for `describe`.
        precision: libs.runtime.Precision of the forward passes.
        seed: every image's noise and random label are keyed by (seed, index).

    Raises:
        UserError: a class that the model does not have; an algorithm that cannot be.
    """

    def __init__(
        self, model, process, codec, *, pred, conditional, settings, guide, upsampling, precision,
        seed,
    ):  # fmt: skip
        self.model, self.process, self.codec = model, process, codec
        self.pred, self.conditional, self.settings = pred, conditional, settings
        self.guide, self.upsampling, self.precision, self.seed = guide, upsampling, precision, seed
        self.z_shape = (model.in_channels, *model.input_size)
        self.image_shape = tuple(codec.image_shape(self.z_shape))
        self.device = next(model.parameters()).device
        if settings.vis_label is not None:
            classes = model.num_classes if conditional else 0
            require_class("sample.vis_label", settings.vis_label, classes)
        if settings.fp8:
            fp8.turn_on(model, precision.dtype, "sample.fp8")
        self._network = SamplingNetwork(model, precision.dtype, graphs=settings.cuda_graphs)
        # A sampler that refuses does so here, not at the first grid of a long training.
        self._draw(lambda x, t, y: torch.zeros_like(x), [0], self.get_labels([0]))

    def get_labels(self, indices):
        """Labels (B,) int64 of images by index, or None in an unconditional run."""
        if not self.conditional:
            return None
        settings, classes = self.settings, self.model.num_classes
        if settings.vis_label is not None:
            return torch.full((len(indices),), settings.vis_label)
        if settings.labels == "balanced":
            return torch.tensor([index % classes for index in indices])
        seeds = [utils.derive_seed("label", self.seed, index) for index in indices]
        return torch.tensor([seed % classes for seed in seeds])

    def describe(self):
        """Everything besides the weights that the images depend on: dict for records."""
        settings = self.settings
        scale = settings.scale if self.conditional and settings.cfg else 0.0
        by_class = self.conditional and settings.vis_label is None
        return {
            "process": type(self.process).__name__,
            "pred": self.pred,
            "algorithm": settings.algorithm,
            "steps": settings.sample_steps,
            "guidance_scale": scale,
            "guidance_scale_standard": 1 + scale,  # w of uncond + w * (cond - uncond)
            "guidance": settings.get("guidance"),
            "guidance_interval": settings.guidance_interval if scale else None,
            "upsampling_guidance": self.upsampling,
            "labels": settings.labels if by_class else None,
            "vis_label": settings.vis_label,
            "seed": self.seed,
            "precision": self.precision.name,
            "fp8": settings.fp8,
            "z_shape": self.z_shape,
            "image_shape": self.image_shape,
            "codec": {"name": type(self.codec).__name__, **self.codec.describe()},
        }

    @torch.no_grad()
    def __call__(self, indices, labels=None, on_step=None):
        """Images (B, C, H, W) float32 in [0, 1] of `indices`; labels (B,) int64 override
        `get_labels`; on_step(i, n) is called after network call i of n.
        """
        labels = self.get_labels(indices) if labels is None else labels
        with self._network.ready() as network, self.precision.autocast():
            return self.codec.decode(self._draw(network, indices, labels, on_step))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._network.release()

    def _draw(self, network, indices, labels, on_step=None):
        """z (B, *z_shape) of `indices`."""
        y = None if labels is None else labels.to(self.device)
        noise = ImageNoise(self.seed, indices, self.z_shape)
        return sample(
            self.guide(network, self.process, y, null_label=self.model.num_classes),
            self.process,
            noise.initial().to(self.device),
            pred=self.pred,
            algorithm=self.settings.algorithm,
            steps=self.settings.sample_steps,
            noise=noise,
            on_step=on_step,
        )


def make_image_sampler(config, model, process, codec, *, precision, seed):
    """The ImageSampler of a config; model and codec are on their device."""
    upsampling = {key: config[f"ug_{key}"] for key in ("m", "theta", "eta", "T")}
    upsampling = upsampling if config.ug_m is not None else None
    return ImageSampler(
        model, process, codec,
        pred=config.pred, conditional=config.train.mode == "cond", settings=config.sample,
        guide=functools.partial(
            make_guided, pred=config.pred, settings=config.sample, upsample=upsampling
        ),
        upsampling=upsampling, precision=precision, seed=seed,
    )  # fmt: skip


def require_finite(images, indices):
    """UserError naming the first of `indices` whose image contains NaN, which a file would show as
    black. Waits for the device: for images that are about to leave it.
    """
    finite = images.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise UserError(
            f"the network makes images that are not finite: image {indices[finite.index(False)]} "
            "contains NaN; check the weights, sample.scale and the precision"
        )


def batches_of_rank(n, mini_batch_size, accelerator):
    """Lists of image indices of this process: every num_processes-th index below n,
    `mini_batch_size` at a time.
    """
    indices = range(accelerator.process_index, n, accelerator.num_processes)
    return [list(indices[i : i + mini_batch_size]) for i in range(0, len(indices), mini_batch_size)]


def measured(image_sampler, features, batches, *, quiet, stop=lambda: False):
    """For each batch of indices (indices, images as saved, features (B, dim), agrees), until
    `stop()` comes true; agrees (B,) bool says which images are classified as their labels, None
    where that is not defined.
    """
    classify = getattr(features, "classify", None) if image_sampler.conditional else None
    with tqdm(total=sum(map(len, batches)), desc="sampling", unit="img", disable=quiet) as bar:
        for indices in batches:
            if stop():
                return
            beat("sampling")
            images, agrees = as_saved(image_sampler(indices)), None
            if classify is not None:
                found = classify(images)
                agrees = found == image_sampler.get_labels(indices).to(found.device)
            yield indices, images, features(images), agrees
            bar.update(len(indices))


def measure(image_sampler, features, accelerator, *, n, stop=lambda: False):
    """Make images 0..n-1 and sum up their features.

    Returns:
        (metrics.Moments over all processes, class agreement in [0, 1] or None if it is not
        defined); None if `stop()` came true.
    """
    moments, agreement = metrics.Moments(features.dim, accelerator.device), None
    agreeing = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    batches = batches_of_rank(n, image_sampler.settings.mini_batch_size, accelerator)
    quiet = not accelerator.is_main_process
    with image_sampler:
        for _, _, rows, agrees in measured(
            image_sampler, features, batches, quiet=quiet, stop=stop
        ):
            moments.update(rows)
            if agrees is not None:
                agreeing += agrees.sum()
    beat(WAITING)
    for tensor in (moments.count, moments.sum, moments.outer, agreeing):
        tensor.copy_(accelerator.reduce(tensor, "sum"))
    if moments.count.item() < n:
        return None
    if hasattr(features, "classify") and image_sampler.conditional:
        agreement = agreeing.item() / n
    return moments, agreement


def make_grid_images(image_sampler, accelerator, n, stop=lambda: False):
    """Images 0..n-1 on every process, (n, C, H, W), each made on one of them; None if `stop()` came
    true. For small n.
    """
    images = torch.zeros(n, *image_sampler.image_shape, device=accelerator.device)
    stopped = torch.zeros((), device=accelerator.device)
    with image_sampler:
        for indices in batches_of_rank(n, image_sampler.settings.mini_batch_size, accelerator):
            if stop():
                stopped += 1
                break
            beat("sampling")
            images[indices] = image_sampler(indices)
    beat(WAITING)
    stopped = accelerator.reduce(stopped, "sum")
    images = accelerator.reduce(images, "sum")
    return None if stopped.item() else images


def recipe_of(image_sampler, features, real, n):
    """What a result of n images depends on, besides the network's weights."""
    source = real and real.source
    return {"n": n, "features": features.name, "statistics": source, **image_sampler.describe()}


def figures_of(mu, sigma, agreement, real, seed):
    """The figures of generated images whose features have mean mu and covariance sigma, and those
    of two halves of the real images where these are at hand.
    """
    distance = metrics.frechet_distance(mu, sigma, real.mu, real.sigma)
    figures = {"frechet_distance": distance, "class_agreement": agreement}
    if halves := halves_baseline(real, seed):
        figures["real_halves"] = halves
    return figures


def result_of(found, image_sampler, features, real, n):
    """Frechet distance (FID with Inception features) of the n images that `measure` found to the
    real ones, and the recipe: dict for the log.
    """
    moments, agreement = found
    mu, sigma = moments.mean_and_covariance()
    return {
        **figures_of(mu, sigma, agreement, real, image_sampler.seed),
        **recipe_of(image_sampler, features, real, n),
    }


def describe(result):
    """An evaluation as lines for people, the figures first."""

    def figures(values):
        text = f"Frechet distance {values['frechet_distance']:.4g}"
        agreement = values["class_agreement"]
        return text if agreement is None else f"{text}, class agreement {agreement:.2%}"

    if result["frechet_distance"] is None:
        lines = [f"{result['n']} images, and no figures, as sample.features is 'none'"]
    else:
        lines = [f"{figures(result)} over {result['n']} images ({result['features']})"]
    if found := result.get("precision_recall"):
        lines.append(
            f"precision {found['precision']:.4f}, recall {found['recall']:.4f} (k {found['k']}, "
            f"{found['real']} real and {found['generated']} generated images)"
        )
    elif reason := result.get("no_precision_recall"):
        lines.append(f"no precision and recall: {reason}")
    if halves := result.get("real_halves"):
        lines.append(f"two halves of the real images: {figures(halves)}")
    lines.append(
        f"guidance {result['guidance_scale']:g} (cond + s (cond - uncond); elsewhere written w = "
        f"{result['guidance_scale_standard']:g}), {result['algorithm']}, {result['steps']} steps, "
        f"seed {result['seed']}, precision {result['precision']}{' and fp8' * result['fp8']}"
    )
    if result["statistics"] and not result["statistics"]["known"]:
        lines.append(
            f"{result['statistics']['file']} has only mu and sigma: extractor, resolution and "
            "count of the real images unknown"
        )
    return lines


def make_grid_labels(classes, n, num_classes, *, conditional, scale=None):
    """Labels (classes x n,) of n images of each class asked for, or of all; None if unconditional.

    Raises:
        UserError: a class that does not exist; classes, or a scale of guidance, where there are
            none.
    """
    if not conditional:
        if classes or scale:
            flag = "--classes" if classes else "--scale"
            raise UserError(f"this model was trained without classes: leave {flag} out")
        return None
    wrong = [c for c in classes or () if not 0 <= c < num_classes]
    if wrong:
        raise UserError(
            f"class {wrong[0]} does not exist: this model has classes 0 to {num_classes - 1}"
        )
    return torch.tensor(classes or range(num_classes)).repeat_interleave(n)


def draw_in_batches(image_sampler, labels, n):
    """Images (n, C, H, W) on the CPU, of `labels` (n,) or n without labels, and a progress bar.

    Raises:
        UserError: an image contains NaN.
    """
    n = n if labels is None else len(labels)
    batches = torch.arange(n).split(image_sampler.settings.mini_batch_size)
    with tqdm(unit="step") as bar:

        def on_step(i, steps):
            bar.total = steps * len(batches)
            bar.update()

        images = []
        for rows in batches:
            of_rows = None if labels is None else labels[rows]
            images.append(image_sampler(rows.tolist(), of_rows, on_step).cpu())
            require_finite(images[-1], rows.tolist())
    return torch.cat(images)
