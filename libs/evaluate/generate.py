"""Images of a trained network by index, and their features.

The same index gives the same picture, for any batch size and number of processes.
"""

import functools

import torch
from tqdm import tqdm

import utils
from libs.diffusion import ImageNoise, choose_sampler, count_calls, make_guided, reuse_inner, sample
from libs.evaluate.features import round_to_8_bit
from libs.evaluate.metrics import make_feature_set
from libs.ops import turn_on_fp8
from libs.runtime import Precision, SamplingNetwork
from utils import UserError


def require_class(flag, label, num_classes):
    """UserError unless the model has class `label`; num_classes: 0 without classes."""
    if not 0 <= label < num_classes:
        raise UserError(
            f"{flag} asks for class {label}, but the model has {num_classes} classes, from 0 on"
        )


def require_finite(images, indices):
    """UserError naming the first of `indices` whose image contains NaN: a file would show black."""
    finite = images.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise UserError(
            f"the network makes images that are not finite: image {indices[finite.index(False)]} "
            "contains NaN; check the weights, sample.scale and the precision"
        )


def choose_classes(num_classes, most=10):
    """At most `most` of the classes, evenly chosen: a range."""
    return range(num_classes)[:: -(-num_classes // most) or 1]


class ImageSampler:
    """Image by index; the memory that makes sampling fast goes back at the end of a `with` block.

    config: a whole one, in which the section `sample` and what training chose are read. model: the
    network, in eval mode, on its device as codec is; process, codec: of training; seed: keys noise
    and random labels, with the index.

    UserError: a class that the model does not have; an algorithm that cannot be.
    """

    def __init__(self, config, model, process, codec, *, seed):
        self.model, self.process, self.codec, self.seed = model, process, codec, seed
        self.pred, self.conditional = config.pred, config.train.mode == "cond"
        self.settings = settings = config.sample
        steps, algorithm = settings.sample_steps, settings.algorithm
        self._sampling = dict(pred=self.pred, algorithm=algorithm, steps=steps)
        upsample = {key: config[f"ug_{key}"] for key in ("m", "theta", "eta", "T")}
        self.upsample = upsample if config.ug_m else None
        self.z_shape = (model.in_channels, *model.input_size)
        self.image_shape = tuple(codec.image_shape(self.z_shape))
        self.device = next(model.parameters()).device
        self.precision = Precision(config.train.mixed_precision, self.device)
        if settings.vis_label is not None:
            classes = model.num_classes if self.conditional else 0
            require_class("sample.vis_label", settings.vis_label, classes)
        if settings.internal_scale and "internal" not in getattr(model, "heads", ()):
            raise UserError(
                "sample.internal_scale asks for internal guidance, but the network has no head for "
                "it: train with config.loss.internal, or set --config.sample.internal_scale=0"
            )
        if settings.reuse:  # of blocks first to depth - first, or more: routed ones are not parted
            first = settings.reuse_from or model.reuse_from
            if first > model.num_skips:
                raise UserError(f"sample.reuse_from is {first}, expected 1 to {model.num_skips}")
            model.reuse_from = min(first, model.routing.blocks[0]) if model.routing else first
        if settings.fp8:
            turn_on_fp8(model, self.precision.dtype, "sample.fp8")
        self._network = SamplingNetwork(model, self.precision.dtype, graphs=settings.cuda_graphs)
        # A sampler that refuses does so here, not at the first grid of a long training.
        choose_sampler(settings.algorithm, process)
        self._guide(model, None)

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

    def sampling_spec(self):
        """Everything besides the weights that images depend on: dict for records."""
        settings = self.settings
        scale = settings.scale if self.conditional and settings.cfg else 0.0
        by_class = self.conditional and settings.vis_label is None
        y = torch.zeros(1, dtype=torch.int64) if self.conditional else None
        guide = functools.partial(self._guide, y=y)
        return dict(
            process=type(self.process).__name__, pred=self.pred, algorithm=settings.algorithm,
            steps=settings.sample_steps, guidance=settings.guidance, guidance_scale=scale,
            guidance_scale_standard=1 + scale,  # w of uncond + w * (cond - uncond)
            guidance_interval=settings.guidance_interval if scale else None,
            internal_scale=settings.internal_scale,
            internal_interval=settings.internal_interval if settings.internal_scale else None,
            # An image; a guided call of two halves counts twice.
            network_calls=count_calls(self.process, self.z_shape, guide, **self._sampling),
            **self._describe_reuse(guide),
            upsampling_guidance=self.upsample, labels=settings.labels if by_class else None,
            vis_label=settings.vis_label, seed=self.seed, precision=self.precision.name,
            fp8=settings.fp8, z_shape=self.z_shape, image_shape=self.image_shape,
            codec={"name": type(self.codec).__name__, **self.codec.describe()},
        )  # fmt: skip

    def _describe_reuse(self, guide):
        """Of the record: network_cost is network_calls by the number of blocks that run."""
        if not self.settings.reuse:
            return {}
        first = self.model.reuse_from
        given = self._sampling | dict(reused_cost=(2 * first - 1) / self.model.depth)
        cost = count_calls(self.process, self.z_shape, guide, **given)
        return dict(reuse=self.settings.reuse, reuse_from=first, network_cost=round(cost, 3))

    @torch.no_grad()
    def __call__(self, indices, labels=None, on_call=None, generators=None):
        """Images (B, C, H, W) float32 in [0, 1] of `indices`; labels (B,) int64 override
        `get_labels`, generators those of the noise; on_call: of libs.diffusion.sample.
        """
        labels = self.get_labels(indices) if labels is None else labels
        y = None if labels is None else labels.to(self.device)
        noise = ImageNoise(self.seed, indices, self.z_shape, generators)
        given = self._sampling | dict(noise=noise, on_call=on_call)
        with self._network.ready() as network, self.precision.autocast():
            output, z_T = self._guide(network, y), noise.draw().to(self.device)
            return self.codec.decode(sample(output, self.process, z_T, **given))

    def draw_rows(self, classes, n, on_call=lambda *call: None):
        """n images each of `classes`, or of choose_classes, on the CPU, (rows x n, C, H, W), with a
        progress bar; one row of an unconditional model. on_call: of libs.diffusion.sample, batch by
        batch. UserError: a class that the model does not have; an image contains NaN.
        """
        num_classes = self.model.num_classes if self.conditional else 0
        for label in classes or ():
            require_class("--classes", label, num_classes)
        labels = torch.tensor(classes or choose_classes(num_classes)).repeat_interleave(n)
        batches, images = torch.arange(len(labels) or n), []
        batches = batches.split(self.settings.mini_batch_size)
        with tqdm(unit="call") as bar:

            def count(i, calls, t, x_0):
                bar.total = calls * len(batches)
                bar.update()
                on_call(i, calls, t, x_0)

            for rows in batches:
                batch_labels = labels[rows] if num_classes else None
                images.append(self(rows.tolist(), batch_labels, count).cpu())
                require_finite(images[-1], rows.tolist())
        return torch.cat(images)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._network.release()

    def _guide(self, network, y):
        """output(x, t) of the guided network for one batch, of labels y."""
        settings, model = self.settings, self.model
        if settings.reuse:
            network = reuse_inner(network, settings.reuse, model.depth - model.reuse_from)
        given = dict(pred=self.pred, null_label=model.num_classes, settings=settings)
        return make_guided(network, self.process, y, upsample=self.upsample, **given)


def iter_features(source, extractors, batches, *, quiet, stop=lambda: False):
    """For each of `batches` (lists of indices), until stop() is true: indices, images (B, C, H, W)
    as 8-bit files hold them, and, as far as they are defined, {kind: features (B, width)} and
    `correct`, bool (B,): which are classified as their labels. source: ImageSampler, StoredImages.
    """
    classify = extractors.classify if extractors and source.conditional else None
    made = getattr(source, "read_ahead", functools.partial(map, source))(batches)
    with tqdm(total=sum(map(len, batches)), desc="images", unit="img", disable=quiet) as bar:
        for indices in batches:
            if stop():
                return
            images = round_to_8_bit(next(made))
            found = extractors(images) if extractors else {}
            if classify:
                found["correct"] = classify(found["features"]).cpu() == source.get_labels(indices)
            yield indices, images, found
            bar.update(len(indices))


def _deal_indices(n, mini_batch_size, accelerator):
    """This process's image indices, every num_processes-th below n, in lists."""
    indices = range(accelerator.process_index, n, accelerator.num_processes)
    return [list(indices[i : i + mini_batch_size]) for i in range(0, len(indices), mini_batch_size)]


def collect_features(image_sampler, extractors, accelerator, *, n, stop=lambda: False):
    """{kind: FeatureSet} of images 0..n-1 on the CPU, made on all processes; None if stop() came
    true, and on all but the main process. UserError on every process if an image contains NaN.
    """
    device, main = accelerator.device, accelerator.is_main_process
    rows = {kind: torch.zeros(n, dim, device=device) for kind, dim in extractors.dims.items()}
    rows["correct"], rows["made"] = torch.zeros(2, n, device=device)
    batches = _deal_indices(n, image_sampler.settings.mini_batch_size, accelerator)
    made = iter_features(image_sampler, extractors, batches, quiet=not main, stop=stop)
    with image_sampler:
        for indices, _, found in made:
            rows["made"][indices] = 1
            for name, values in found.items():
                rows[name][indices] = values.to(rows[name])
    rows = {kind: accelerator.reduce(values, "sum").cpu() for kind, values in rows.items()}
    if not rows.pop("made").all():
        return None
    require_finite(rows["features"], range(n))
    agreement = rows.pop("correct").double().mean().item()
    known = dict(agreement=agreement) if extractors.classify and image_sampler.conditional else {}
    sets = rows.items() if main else ()
    return {kind: make_feature_set(x.numpy(), "cpu", **known) for kind, x in sets} or None


def make_grid_images(image_sampler, accelerator, n, stop=lambda: False):
    """Images 0..n-1 (n, C, H, W) on every process, each made on one; None if stop() came true."""
    images = torch.zeros(n, *image_sampler.image_shape, device=accelerator.device)
    made = torch.zeros((), device=accelerator.device)
    with image_sampler:
        for indices in _deal_indices(n, image_sampler.settings.mini_batch_size, accelerator):
            if stop():
                break
            images[indices] = image_sampler(indices)
            made += len(indices)
    made, images = accelerator.reduce(made, "sum"), accelerator.reduce(images, "sum")
    return images if made.item() == n else None
