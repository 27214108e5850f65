"""What a run makes of its averaged weights at intervals: grids of samples, and FID."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor

from accelerate.utils import broadcast_object_list, gather_object

import utils
from libs import evaluate
from libs.parts import open_dataset
from libs.runtime import wait_without_timeout
from libs.train.engine import whole_weights
from utils import UserError, look_up

log = logging.getLogger("dim")

GRID_COLUMNS = 10


class Snapshots:
    """Every process makes its share of the images, the main one writes.

    process, codec: of training; metrics_log: the main process's; stop: the StopRequest, which
    leaves out what is being made.
    """

    def __init__(self, config, directory, accelerator, state, process, codec, metrics_log, stop):
        self.config, self.directory, self.accelerator = config, directory, accelerator
        self.metrics_log, self.is_stopped = metrics_log, lambda: stop.requested
        parts = state.averages["nnet_ema"].model, process, codec
        self.image_sampler = evaluate.ImageSampler(config, *parts, seed=config.seed)
        self.extractors = self.real = self.pending = None
        self.metrics = evaluate.choose_metrics(config.train.metrics, "train.metrics")
        self.thread = ThreadPoolExecutor(1)  # training goes on while figures are computed
        self.wants_fid = bool(config.train.fid_samples and config.sample.features != "none")
        if self.wants_fid:
            look_up(evaluate.FEATURES, config.sample.features, "sample.features")
            self.prepare_fid()

    def prepare_fid(self):
        """The feature networks, and on the main process the real side, as eval.py opens it, without
        the augmentation of training. A warning says where they cannot be had; the next FID tries
        again.
        """
        config, device, extractors = self.config, self.accelerator.device, None
        try:
            extractors = evaluate.Extractors(config.sample, self.metrics, device)
            if self.accelerator.is_main_process:
                images = None if config.dataset.fid_stats else open_dataset(config)
                given = dict(metrics=self.metrics, side=self.image_sampler.image_shape[-1])
                parts = config.dataset, extractors, images
                self.real = evaluate.load_real(*parts, **given, device="cpu")
        except UserError as error:
            log.warning("no FID until this is mended: %s", error)
            extractors = None
        wait_without_timeout(self.accelerator)
        self.extractors = extractors if all(gather_object([extractors is not None])) else None

    def due(self, step):
        """What step `step` asks for: a grid every eval_interval steps, a checkpoint and FID every
        save_interval, and all at the end.
        """
        settings, last = self.config.train, step == self.config.train.n_steps
        saving = last or step % settings.save_interval == 0
        drawing = settings.grid_samples and (last or step % settings.eval_interval == 0)
        due = {"save": saving, "fid": saving and self.wants_fid, "grid": drawing}
        return {name for name, wanted in due.items() if wanted}

    def missing(self, step):
        """What is due at `step` and was not made, since the run ended after its save; all processes
        must ask.
        """
        missing = self.due(step) - {"save"}
        if self.accelerator.is_main_process:
            path = self.directory / "metrics.jsonl"
            lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
            if any(line["step"] == step and "loss" not in line for line in lines):
                missing -= {"fid"}
            if (self.directory / "samples" / f"{step}.png").is_file():
                missing -= {"grid"}
        return broadcast_object_list([missing])[0]

    def make(self, due, step):
        """Of what `due` names, samples/<step>.png, and the figures of FID in the log."""
        if "grid" in due:
            self.make_grid(self.directory / "samples" / f"{step}.png")
        if "fid" in due:
            self.measure_fid(step)

    def make_grid(self, path):
        """The picture `path` of train.grid_samples images."""
        n = self.config.train.grid_samples
        with whole_weights(self.image_sampler.model):
            images = evaluate.make_grid_images(
                self.image_sampler, self.accelerator, n, self.is_stopped
            )
        if images is not None and self.accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            utils.save_grid(path, images, GRID_COLUMNS)

    def measure_fid(self, step):
        """Make train.fid_samples images; their figures are computed while training goes on."""
        self.write_figures(wait=True)
        if self.extractors is None:
            self.prepare_fid()
        if self.extractors is None:  # on every process
            return
        parts, n = (self.image_sampler, self.extractors), self.config.train.fid_samples
        try:
            with whole_weights(self.image_sampler.model):
                given = dict(n=n, stop=self.is_stopped)
                found = evaluate.collect_features(*parts, self.accelerator, **given)
        except UserError as error:  # on every process
            log.warning("no FID at step %d: %s", step, error)
            return
        if found is not None:
            call = evaluate.compute_metrics, found, self.real, self.metrics
            self.pending = step, self.thread.submit(*call)

    def write_figures(self, *, wait=False):
        """The figures of the last measurement into the log, if they are there or `wait`."""
        if self.pending and (wait or self.pending[1].done()):
            (step, future), self.pending = self.pending, None
            figures = future.result()
            numbers = {k: x for k, x in utils.flatten(figures).items() if isinstance(x, float)}
            self.metrics_log.write(step, numbers)
            log.info("step %d: %s", step, figures)
