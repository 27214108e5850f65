"""Images from a trained network, and their figures, streamed into statistics on every process;
nothing is gathered to one. Resumable evaluations are libs.evaluate.run's.
"""

import functools

import torch
from tqdm import tqdm

import utils
from libs.diffusion import ImageNoise, guided_by, sample
from libs.evaluate import metrics
from libs.evaluate.real_images import as_saved, halves_baseline
from libs.ops import fp8
from libs.runtime import WAITING, SamplingNetwork, beat
from sde import eps_from_model
from utils import UserError


class ImageGenerator:
    """Image by index: the same index gives the same picture, whatever the batch and the number of
    processes.

    Args:
        model: the network, in eval mode.
        process, codec: of training.
        config: the run's config; its `pred`, `train.mode`, `sample` and `ug_*` are read.
        image_shape: (C, H, W) of the images that the codec decodes to.
        precision: libs.runtime.launch.Precision of the forward passes.
        seed: every image's noise and random label are keyed by (seed, index).
    """

    def __init__(self, model, process, codec, config, *, image_shape, precision, seed):
        self.model, self.process, self.codec, self.config = model, process, codec, config
        self.image_shape, self.precision, self.seed = tuple(image_shape), precision, seed
        self.settings, self.conditional = config.sample, config.train.mode == "cond"
        self.vis_label = self.settings.get("vis_label")  # checkpoints may be older than the key
        self.z_shape = codec.latent_shape(image_shape)
        self.device = next(model.parameters()).device
        if self.settings.get("fp8"):  # checkpoints may be older than the key, and the next
            fp8.turn_on(model, precision.dtype, "sample.fp8")
        graphs = self.settings.get("cuda_graphs", True)
        self._network = SamplingNetwork(model, precision.dtype, graphs=graphs)
        self._check_labels()
        # Whatever the sampler cannot do is said here, not at the first grid of a long training.
        self._draw(lambda x, t, y: torch.zeros_like(x), [0], self.labels_of([0]))

    def _check_labels(self):
        labels, classes = self.settings.labels, self.model.num_classes
        vis_label = self.vis_label
        if labels not in ("random", "balanced"):
            raise UserError(f"sample.labels is {labels!r}, expected 'random' or 'balanced'")
        if self.conditional and not classes:
            raise UserError("train.mode is 'cond', but nnet.num_classes is 0: give the classes")
        if vis_label is not None and not self.conditional:
            raise UserError(
                f"sample.vis_label is {vis_label}, but this model has no classes: leave it out"
            )
        if vis_label is not None and not 0 <= vis_label < classes:
            raise UserError(
                f"sample.vis_label is {vis_label}, but this model has classes 0 to {classes - 1}"
            )

    def labels_of(self, indices):
        """Labels (B,) int64 of images by index, or None in an unconditional run."""
        if not self.conditional:
            return None
        classes = self.model.num_classes
        if self.vis_label is not None:
            return torch.full((len(indices),), self.vis_label)
        if self.settings.labels == "balanced":
            return torch.tensor([index % classes for index in indices])
        return torch.tensor(
            [utils.derive_seed("label", self.seed, index) % classes for index in indices]
        )

    def recipe(self):
        """What it takes to make these images again, besides the network: dict for the log and the
        result file.
        """
        settings, config = self.settings, self.config
        scale = settings.scale if self.conditional and settings.cfg else 0.0
        upsampling = {key: config.get(f"ug_{key}") for key in ("m", "theta", "eta", "T")}
        return {
            "process": type(self.process).__name__,
            "pred": config.pred,
            "algorithm": settings.algorithm,
            "steps": settings.sample_steps,
            "guidance_scale": scale,
            "guidance_scale_standard": 1 + scale,  # w of uncond + w * (cond - uncond)
            "guidance_interval": settings.guidance_interval if scale else None,
            "upsampling_guidance": upsampling if upsampling["m"] is not None else None,
            "labels": settings.labels if self.conditional and self.vis_label is None else None,
            "vis_label": self.vis_label,
            "seed": self.seed,
            "precision": self.precision.name,
            "fp8": bool(settings.get("fp8")),
            "z_shape": self.z_shape,
            "image_shape": self.image_shape,
            "codec": {"name": type(self.codec).__name__, **self.codec.describe()},
        }

    @torch.no_grad()
    def __call__(self, indices, labels=None, on_step=None):
        """Images (B, C, H, W) float32 in [0, 1] of `indices`; labels (B,) int64 override
        `labels_of`.
        """
        labels = self.labels_of(indices) if labels is None else labels
        with self._network.ready() as network, self.precision.autocast():
            predict = eps_from_model(network, self.process, self.config.pred)
            return self.codec.decode(self._draw(predict, indices, labels, on_step))

    def release(self):
        """Give back the memory that makes sampling fast; the next call takes it again."""
        self._network.release()

    def _draw(self, predict, indices, labels, on_step=None):
        """z (B, *z_shape) of `indices`, by the noise prediction predict(x, t, y)."""
        y = None if labels is None else labels.to(self.device)
        noise = ImageNoise(self.seed, indices, self.z_shape)
        eps_fn = guided_by(
            self.config, predict, self.process, y, self.model.num_classes
        )
        return sample(
            eps_fn,
            self.process,
            noise.initial().to(self.device),
            algorithm=self.settings.algorithm,
            steps=self.settings.sample_steps,
            noise=noise,
            on_step=on_step,
        )


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


def _releasing(function):
    """Decorator: function(generator, ...) leaves the memory to the training around it."""

    @functools.wraps(function)
    def call(generator, *args, **keywords):
        try:
            return function(generator, *args, **keywords)
        finally:
            generator.release()

    return call


def batches_of_rank(n, mini_batch_size, accelerator):
    """Lists of image indices of this process: every num_processes-th index below n,
    `mini_batch_size` at a time.
    """
    indices = range(accelerator.process_index, n, accelerator.num_processes)
    return [list(indices[i : i + mini_batch_size]) for i in range(0, len(indices), mini_batch_size)]


def measured(generator, features, batches, *, quiet, stop=lambda: False):
    """For each batch of indices (indices, images as saved, features (B, dim), agrees), until
    `stop()` comes true; agrees (B,) bool says which images are classified as their labels, None
    where that is not defined.
    """
    classify = getattr(features, "classify", None) if generator.conditional else None
    with tqdm(total=sum(map(len, batches)), desc="sampling", unit="img", disable=quiet) as bar:
        for indices in batches:
            if stop():
                return
            beat("sampling")
            images, agrees = as_saved(generator(indices)), None
            if classify is not None:
                found = classify(images)
                agrees = found == generator.labels_of(indices).to(found.device)
            yield indices, images, features(images), agrees
            bar.update(len(indices))


@_releasing
def measure(generator, features, accelerator, *, n, stop=lambda: False):
    """Make images 0..n-1 and sum up their features.

    Returns:
        (metrics.Moments over all processes, class agreement in [0, 1] or None if it is not
        defined); None if `stop()` came true.
    """
    moments, agreement = metrics.Moments(features.dim, accelerator.device), None
    agreeing = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    batches = batches_of_rank(n, generator.settings.mini_batch_size, accelerator)
    quiet = not accelerator.is_main_process
    for _, _, rows, agrees in measured(generator, features, batches, quiet=quiet, stop=stop):
        moments.update(rows)
        if agrees is not None:
            agreeing += agrees.sum()
    beat(WAITING)
    for tensor in (moments.count, moments.sum, moments.outer, agreeing):
        tensor.copy_(accelerator.reduce(tensor, "sum"))
    if moments.count.item() < n:
        return None
    if hasattr(features, "classify") and generator.conditional:
        agreement = agreeing.item() / n
    return moments, agreement


@_releasing
def make_grid_images(generator, accelerator, n, stop=lambda: False):
    """Images 0..n-1 on every process, (n, C, H, W), each made on one of them; None if `stop()` came
    true. For small n.
    """
    images = torch.zeros(n, *generator.image_shape, device=accelerator.device)
    stopped = torch.zeros((), device=accelerator.device)
    for indices in batches_of_rank(n, generator.settings.mini_batch_size, accelerator):
        if stop():
            stopped += 1
            break
        beat("sampling")
        images[indices] = generator(indices)
    beat(WAITING)
    stopped = accelerator.reduce(stopped, "sum")
    images = accelerator.reduce(images, "sum")
    return None if stopped.item() else images


def recipe_of(generator, features, real, n):
    """What a result of n images depends on, besides the network's weights."""
    source = real and real.source
    return {"n": n, "features": features.name, "statistics": source, **generator.recipe()}


def figures_of(mu, sigma, agreement, real, seed):
    """The figures of generated images whose features have mean mu and covariance sigma, and those
    of two halves of the real images where these are at hand.
    """
    distance = metrics.frechet_distance(mu, sigma, real.mu, real.sigma)
    figures = {"frechet_distance": distance, "class_agreement": agreement}
    if halves := halves_baseline(real, seed):
        figures["real_halves"] = halves
    return figures


def result_of(found, generator, features, real, n):
    """Frechet distance (FID with Inception features) of the n images that `measure` found to the
    real ones, and the recipe: dict for the log.
    """
    moments, agreement = found
    mu, sigma = moments.mean_and_covariance()
    return {
        **figures_of(mu, sigma, agreement, real, generator.seed),
        **recipe_of(generator, features, real, n),
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


def labels_of_classes(classes, n, num_classes, *, conditional, scale=None):
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


def draw_in_batches(generator, labels, n):
    """Images (n, C, H, W) on the CPU, of `labels` (n,) or n without labels, and a progress bar.

    Raises:
        UserError: an image contains NaN.
    """
    n = n if labels is None else len(labels)
    batches = torch.arange(n).split(generator.settings.mini_batch_size)
    with tqdm(unit="step") as bar:

        def on_step(i, steps):
            bar.total = steps * len(batches)
            bar.update()

        images = []
        for rows in batches:
            of_rows = None if labels is None else labels[rows]
            images.append(generator(rows.tolist(), of_rows, on_step).cpu())
            require_finite(images[-1], rows.tolist())
    return torch.cat(images)
