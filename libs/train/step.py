"""One optimizer step: gradients of the micro-batches, what came of them, and what follows."""

import logging
import math
import time

import torch

from libs.train.losses import Draws
from utils import UserError

log = logging.getLogger("dim")


class StepStats:
    """Of a step loss, the mean over the processes; grad_norm; stop, whether any process was asked
    to stop; loss_scale: on the host after `fetch`. `take_step` adds lr and seconds.

    found_inf: 0-dim float32 on the device, 1 if loss or gradient norm is not finite, else 0.
    """

    def __init__(self, accelerator, precision, loss, grad_norm, stop):
        # The requests to stop are summed with the losses: one collective a step.
        summed = accelerator.reduce(torch.stack([loss, torch.full_like(loss, stop)]), "sum")
        norm, scale = grad_norm.to(summed), precision.scaler.scale(torch.ones_like(loss))
        self.found_inf = (~(summed[0].isfinite() & norm.isfinite())).float()
        self.num_processes = accelerator.num_processes
        self._values = torch.cat([summed, torch.stack([norm, scale])]).to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream().record_event() if loss.is_cuda else None

    def fetch(self):
        """The one host sync of a step: it waits for the gradients, not for the optimizer's work,
        which keeps the device busy until the host has gone on.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, stops, self.grad_norm, self.loss_scale = self._values.tolist()
        self.loss, self.stop = loss / self.num_processes, stops > 0


def take_step(accelerator, state, objective, batches, draws, accumulation, lr, stop):
    """Gradients of this rank's micro-batches, and the optimizer's step; fetched StepStats.
    batches: Prefetcher of this rank's items; draws: of the global batch, of which a micro-batch
    has the rows that deal_keys gives to it; stop: this process's StopRequest.
    """
    engine, began = state.engine, time.monotonic()
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=accelerator.device)
    size = len(draws.u_time) // (accelerator.num_processes * accumulation)
    for m in range(accumulation):
        start = (m * accelerator.num_processes + accelerator.process_index) * size
        rows = Draws(*(draw if draw is None else draw[start : start + size] for draw in draws))
        x, y, *features = next(batches)
        with engine.accumulating(last=m + 1 == accumulation):
            with state.precision.autocast():
                losses = objective(engine.model, x, y, rows, *features)
            loss = losses.mean() / accumulation
            engine.backward(loss)
        total += loss.detach()
    stats = StepStats(accelerator, state.precision, total, engine.clip(), stop.requested)
    engine.step(stats.found_inf)
    batches.prefetch()
    stats.fetch()
    stats.lr, stats.seconds = lr, time.monotonic() - began
    return stats


def finish_step(state, stats):
    """What follows from a step with these fetched StepStats: if loss and gradient are finite, the
    optimizer has made it, and average and counters follow; returns 'ok', 'overflow' or 'bad'; or
    None for a step that is not finite in a run that stops: the next start makes it.

    Under fp16 a gradient that overflows while the loss is finite halves the loss scale, is not
    counted, and moves nothing but the data, as long as the scale stays at 1 or above; below it, and
    for any non-finite loss, the step counts as bad.
    """
    progress, scaler = state.progress, state.precision.scaler
    finite = math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)
    if stats.stop and not finite:
        return None
    progress.batch += 1
    if finite:
        scaler.update()
        progress.step += 1
        for average in state.averages.values():
            average.update(state.network, progress.step)
        progress.bad_in_a_row = 0
        return "ok"
    if scaler.is_enabled():
        # A broken loss is not the scale's fault, and leaves it as it is.
        scaler.update(None if math.isfinite(stats.loss) else stats.loss_scale)
        if 1 <= scaler.get_scale() < stats.loss_scale:
            return "overflow"
    progress.bad_in_a_row += 1
    return "bad"


def report_bad_step(outcome, progress, stats, max_bad_steps):
    """Log a step that was not made; UserError once max_bad_steps came in a row."""
    values = f"loss {stats.loss:g}, gradient norm {stats.grad_norm:g}, scale {stats.loss_scale:g}"
    where = f"step {progress.step}, batch {progress.batch - 1}"
    level = logging.INFO if outcome == "overflow" else logging.WARNING  # common in fp16
    log.log(level, "%s: %s, skipped: %s", where, outcome, values)
    if progress.bad_in_a_row >= max_bad_steps:
        raise UserError(
            f"{progress.bad_in_a_row} steps in a row had a non-finite loss or gradient, the last "
            f"at step {progress.step} ({values}); lower optimizer.lr, or use bf16 or no mixed "
            "precision, and go on from the last checkpoint"
        )
