"""One optimizer step: gradients of the micro-batches, what came of them, and what follows."""

import logging
import math

import torch

from libs.train.optimizer import set_learning_rate
from utils import UserError

log = logging.getLogger("dim")


def accumulate_gradients(accelerator, precision, engine, objective, batches, draws, accumulation):
    """Forward and backward of this rank's micro-batches; returns their mean loss, 0-dim float32.

    batches: iterator over (x, y) of this rank; draws: Draws of the global batch, of which a
    micro-batch has the rows that GlobalBatchSampler deals to it.
    """
    total = torch.zeros((), device=accelerator.device)
    size = len(draws.time) // (accelerator.num_processes * accumulation)
    for m in range(accumulation):
        start = (m * accelerator.num_processes + accelerator.process_index) * size
        x, y = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(batches))
        with engine.accumulating(last=m + 1 == accumulation):
            with precision.autocast():
                losses = objective(engine.model, x, y, draws.rows(slice(start, start + size)))
            loss = losses.mean() / accumulation
            engine.backward(loss)
        total += loss.detach()
    return total


class StepStats:
    """loss, the mean over the processes; grad_norm; stop, whether any process was asked to stop;
    and loss_scale of a step: on the host after `fetch`.

    found_inf: 0-dim float32 on the device, 1 if loss or gradient norm is not finite, else 0.
    """

    def __init__(self, accelerator, precision, loss, grad_norm, stop):
        # The requests to stop are summed with the losses: one collective a step.
        summed = accelerator.reduce(torch.stack([loss, torch.full_like(loss, stop)]), "sum")
        norm, scale = grad_norm.to(summed), precision.scaler.scale(torch.ones_like(loss))
        self.found_inf = (~(summed[0].isfinite() & norm.isfinite())).float()
        self.num_processes = accelerator.num_processes
        self._values = torch.cat([summed, torch.stack([norm, scale])]).to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if loss.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def fetch(self):
        """Set loss, grad_norm, stop and loss_scale, and return self.

        The one host sync of a step: it waits for the gradients, not for the optimizer's work that
        was queued since, which keeps the device busy until the host has gone on.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, stops, self.grad_norm, self.loss_scale = self._values.tolist()
        self.loss, self.stop = loss / self.num_processes, stops > 0
        return self


def take_step(accelerator, state, objective, batches, draws, *, accumulation, lr, stop):
    """Gradients and the optimizer's step at learning rate lr; fetched StepStats.

    batches, draws: as of `accumulate_gradients`; stop: whether this process was asked to stop.
    """
    engine, precision = state.engine, state.precision
    set_learning_rate(engine.optimizer, lr)
    engine.zero_grad()
    loss = accumulate_gradients(
        accelerator, precision, engine, objective, batches, draws, accumulation
    )
    stats = StepStats(accelerator, precision, loss, engine.clip(), stop)
    engine.step(stats.found_inf)
    batches.prefetch()
    return stats.fetch()


def update(state, stats):
    """What follows from a step with these fetched StepStats: if loss and gradient are finite, the
    optimizer has made it, and average and counters follow; returns 'ok', 'overflow' or 'bad'.

    Under fp16 a gradient that overflows while the loss is finite halves the loss scale, is not
    counted, and moves nothing but the data, as long as the scale stays at 1 or above; below it, and
    for any non-finite loss, the step counts as bad.
    """
    progress, scaler = state.progress, state.precision.scaler
    progress.batch += 1
    if math.isfinite(stats.loss) and math.isfinite(stats.grad_norm):
        if scaler.is_enabled():
            scaler.update()
        state.ema.update(state.network)
        progress.step += 1
        progress.bad_in_a_row = 0
        return "ok"
    if scaler.is_enabled():
        # A broken loss is not the scale's fault, and leaves it as it is.
        scaler.update(None if math.isfinite(stats.loss) else stats.loss_scale)
        if 1 <= scaler.get_scale() < stats.loss_scale:
            log.info("step %d: the gradient overflows float16; loss scale now %g",
                     progress.step, scaler.get_scale())  # fmt: skip
            return "overflow"
    progress.bad_in_a_row += 1
    log.warning("step %d, batch %d skipped: loss %g, gradient norm %g",
                progress.step, progress.batch - 1, stats.loss, stats.grad_norm)  # fmt: skip
    return "bad"


def require_few_bad(progress, stats, max_bad_steps):
    """UserError once max_bad_steps came in a row; the last good checkpoint stays as it is."""
    if progress.bad_in_a_row >= max_bad_steps:
        raise UserError(
            f"{progress.bad_in_a_row} steps in a row had a non-finite loss or gradient, the last "
            f"at step {progress.step} (loss {stats.loss:g}, gradient norm {stats.grad_norm:g}); "
            "lower optimizer.lr, or use bf16 or no mixed precision, and go on from the last "
            "checkpoint"
        )
