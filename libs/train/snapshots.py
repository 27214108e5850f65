"""What a run makes of its averaged weights at intervals: grids of samples, and FID."""

import logging

import torch

import utils
from datasets import dataset_of
from libs.evaluate import (
    choose_real,
    describe_result,
    load_real,
    make_features,
    make_grid_images,
    measure,
)
from libs.runtime import has_logged, wait_without_timeout
from libs.train.engine import whole_weights
from utils import UserError

log = logging.getLogger("dim")

GRID_COLUMNS = 10


class Snapshots:
    """Every process makes its share of the images, the main one writes.

    image_sampler: of the averaged weights; dataset: of training; metrics_log: the main process's;
    stop: the StopRequest, which leaves out what is being made.
    """

    def __init__(self, config, directory, accelerator, image_sampler, dataset, metrics_log, stop):
        self.config, self.directory, self.accelerator = config, directory, accelerator
        self.image_sampler, self.metrics_log, self.stop = image_sampler, metrics_log, stop
        self.features = self.real = None
        if config.train.fid_samples and config.sample.features != "none":
            self.prepare_fid(dataset)

    def prepare_fid(self, dataset):
        """The feature network, and on the main process the real side, as eval.py opens it, without
        the augmentation of training; no FID in this run, with a warning, where they cannot be had.
        """
        config, device = self.config, self.accelerator.device
        made = torch.zeros((), device=device)
        try:
            features = make_features(
                config.sample.features, config.sample.fid_weights_path, device
            )
            if self.accelerator.is_main_process:
                chosen = choose_real(config.dataset.fid_stats, dataset)
                self.real = load_real(
                    config.dataset, features, dataset_of(config) if chosen is dataset else None,
                    side=self.image_sampler.image_shape[-1], device=device,
                )  # fmt: skip
            made += 1
        except UserError as error:
            log.warning("no FID in this run: %s", error)
        wait_without_timeout(self.accelerator)
        if self.accelerator.reduce(made, "sum").item() == self.accelerator.num_processes:
            self.features = features

    def due(self, step):
        """What step `step` asks for: a grid every eval_interval steps, a checkpoint and FID every
        save_interval, and all at the end.
        """
        settings, last = self.config.train, step == self.config.train.n_steps
        due = {"save", "fid"} if last or step % settings.save_interval == 0 else set()
        due |= {"grid"} if last or step % settings.eval_interval == 0 else set()
        return due - {"grid" if not settings.grid_samples else "", "" if self.features else "fid"}

    def missing(self, step):
        """What is due and was not made, since the run ended after the save of `step`; all processes
        must ask.
        """
        due = [self.due(step)]
        if self.accelerator.is_main_process:
            if (self.directory / "samples" / f"{step}.png").is_file():
                due[0].discard("grid")
            if has_logged(self.directory, step, "frechet_distance"):
                due[0].discard("fid")
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(due)
        return due[0]

    def make(self, due, step):
        """Of what `due` names, grid and FID."""
        with whole_weights(self.image_sampler.model):
            if "grid" in due:
                self.make_grid(step, self.config.train.grid_samples)
            if "fid" in due:
                self.measure_fid(step, self.config.train.fid_samples)

    def stopped(self):
        """Whether this process was asked to stop."""
        return self.stop.requested

    def make_grid(self, step, n):
        """samples/<step>.png, of n images."""
        images = make_grid_images(self.image_sampler, self.accelerator, n, self.stopped)
        if images is not None and self.accelerator.is_main_process:
            (self.directory / "samples").mkdir(exist_ok=True)
            utils.save_grid(self.directory / "samples" / f"{step}.png", images, GRID_COLUMNS)

    def measure_fid(self, step, n):
        """The figures of n images, in the log."""
        result = measure(
            self.image_sampler, self.features, self.real, self.accelerator, n=n, stop=self.stopped
        )
        if result is not None:
            figures = {key: result[key] for key in ("frechet_distance", "class_agreement")}
            self.metrics_log.write(step, {k: v for k, v in figures.items() if v is not None})
            log.info("step %d: %s", step, describe_result(result))
        wait_without_timeout(self.accelerator)
