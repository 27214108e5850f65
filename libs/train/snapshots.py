"""What a training run writes besides its log: checkpoints, grids of samples, FID at intervals."""

import logging

import torch

import utils
from datasets import dataset_of
from libs.evaluate import (
    FEATURES,
    choose_real,
    describe_result,
    load_real,
    make_features,
    make_grid_images,
    measure,
)
from libs.runtime import WAITING, beat, has_logged
from libs.train import checkpoint
from libs.train.sharding import whole_weights
from utils import UserError

log = logging.getLogger("dim")

GRID_COLUMNS = 10


class Outputs:
    """Makes and writes them; every process takes part, the main one writes.

    image_sampler: of the averaged weights' images; dataset: of training; state: () -> (network's
    state_dict, average's, training_state), whole.
    """

    def __init__(self, config, directory, accelerator, image_sampler, dataset, state):
        self.config, self.directory, self.accelerator = config, directory, accelerator
        self.image_sampler, self.dataset, self.state = image_sampler, dataset, state
        self.features, self.real = None, None  # of FID, from the first one on
        self.fid_samples = config.train.fid_samples
        if config.sample.features == "none":
            self.fid_samples = 0
        if self.fid_samples:
            self.expect_fid()

    def expect_fid(self):
        """At the start of a run: UserError for unknown features; a warning where there are no
        statistics yet, which may still come before the first FID.
        """
        if self.config.sample.features not in FEATURES:
            raise UserError(
                f"sample.features is {self.config.sample.features!r}, expected one of "
                f"{', '.join(FEATURES)}"
            )
        try:
            choose_real(self.config.dataset.fid_stats, self.dataset)
        except UserError as error:
            if self.accelerator.is_main_process:
                log.warning("FID will be left out, unless this changes before the first: %s", error)

    def save(self, step):
        """A checkpoint of `step`, written by the main process."""
        beat("saving a checkpoint")
        network, ema, training = self.state()
        if self.accelerator.is_main_process:
            path = checkpoint.save(
                self.directory / "ckpts", step, nnet=network, ema=ema, training_state=training,
                config=self.config.to_dict(), keep_last=self.config.train.keep_last,
            )  # fmt: skip
            log.info("saved %s", path)
        beat(WAITING)
        self.accelerator.wait_for_everyone()

    def grid(self, step, stop):
        """samples/<step>.png, from the averaged weights."""
        n = self.config.train.grid_samples
        with whole_weights(self.image_sampler.model):
            images = make_grid_images(self.image_sampler, self.accelerator, n, stop)
        if images is not None and self.accelerator.is_main_process:
            (self.directory / "samples").mkdir(exist_ok=True)
            utils.save_grid(self.directory / "samples" / f"{step}.png", images, GRID_COLUMNS)

    def due(self, step):
        """What step `step` asks for: a grid every eval_interval steps, FID every save_interval, and
        both at the end.
        """
        settings, last = self.config.train, step == self.config.train.n_steps
        return {
            "grid": bool(settings.grid_samples and (last or step % settings.eval_interval == 0)),
            "fid": bool(self.fid_samples and (last or step % settings.save_interval == 0)),
        }

    def missing(self, step):
        """What is due and was not made, since the run ended after the save of `step`; all processes
        must ask.
        """
        due = [self.due(step)]
        if self.accelerator.is_main_process:
            grid = self.directory / "samples" / f"{step}.png"
            due[0]["grid"] &= not grid.is_file()
            due[0]["fid"] &= not has_logged(self.directory, step, "frechet_distance")
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(due)
        return due[0]

    def make(self, due, step, metrics_log, stop):
        """What `due` names."""
        if due["grid"]:
            self.grid(step, stop)
        if due["fid"]:
            result = self.fid(stop)
            if result and self.accelerator.is_main_process:
                figures = {key: result[key] for key in ("frechet_distance", "class_agreement")}
                metrics_log.write(step, {k: v for k, v in figures.items() if v is not None})
                log.info("step %d: %s", step, describe_result(result))

    def real_side(self):
        """The FeatureSet of the real images, and its features, made once; where images are
        measured, as eval.py opens them, without the augmentation of training.
        """
        config, device = self.config, self.accelerator.device
        if self.real is None:
            chosen = choose_real(config.dataset.fid_stats, self.dataset)
            dataset = dataset_of(config) if chosen is self.dataset else None
            self.features = make_features(
                config.sample.features, config.sample.fid_weights_path, device
            )
            self.real = load_real(
                config.dataset, self.features, dataset,
                side=self.image_sampler.image_shape[-1], device=device,
            )  # fmt: skip
        return self.real

    def by_all(self, part):
        """part() on every process; None on all, and no FID from now on, where it raises a UserError
        on one, which says why: the others would wait for it in the next collective.
        """
        found, failed = None, torch.zeros((), device=self.accelerator.device)
        try:
            found = part()
        except UserError as error:
            log.warning("no FID in this run: %s", error)
            failed += 1
        beat(WAITING)
        if self.accelerator.reduce(failed, "sum").item():
            self.fid_samples, found = 0, None
        return found

    def fid(self, stop):
        """The evaluation of train.fid_samples images; None, with a note, where it cannot be."""
        n, real = self.fid_samples, self.by_all(self.real_side)
        if real is None:
            return None
        with whole_weights(self.image_sampler.model):
            return self.by_all(
                lambda: measure(
                    self.image_sampler, self.features, real, self.accelerator, n=n, stop=stop
                )
            )
