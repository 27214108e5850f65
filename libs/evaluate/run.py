"""A whole evaluation from the command line: resumable image by image, its figures and its recipe
written beside each other.
"""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import utils
from libs.evaluate import metrics
from libs.evaluate.generate import (
    describe,
    figures_of,
    make_image_sampler,
    measured,
    recipe_of,
    require_finite,
)
from libs.evaluate.image_store import (
    RECIPE,
    ImageStore,
    compared,
    create,
    pending,
    read_recipe,
    require_own_folder,
    require_same_recipe,
)
from libs.evaluate.precision_recall import NEIGHBOURS, precision_recall
from libs.evaluate.real_images import moments_of, real_images, require_statistics
from libs.files import sha256_of, weights_file
from libs.runtime import WAITING, Precision, beat, environment, ranks
from utils import UserError


def whole_recipe(image_sampler, features, real, config, nnet_path, changes):
    """Everything that the result depends on: of two evaluations with the same, either can go on
    with the other's images. Hashes the weights.
    """
    file, settings = weights_file(nnet_path), config.sample
    nnet = {key: value for key, value in config.nnet.to_dict().items() if key != "pretrained_path"}
    path = settings.path and str(Path(settings.path).resolve())
    return {
        **recipe_of(image_sampler, features, real, settings.n_samples),
        "weights": {"file": str(file), "sha256": sha256_of(file), "changes": list(changes)},
        "nnet": nnet,
        # The npz is made of what is kept here, so another path for it can still be given.
        "kept": {"path": path, "adm_npz": bool(settings.adm_npz)},
    }


def require_own_place(output_path, png_folder, adm_npz, recipe):
    """UserError if result or pictures of another recipe, or of none, lie where ours would go."""
    own_npz = None
    if output_path.exists():
        found = read_recipe(output_path, "give another --output_path, or move it away")
        own_npz = utils.flatten(found).get("config.sample.adm_npz")
        found = {key: value for key, value in found.items() if key in recipe}
        if lines := utils.config_differences(compared(found), compared(recipe)):
            raise UserError(
                f"{output_path} is the result of another evaluation ({lines[0]}): give another "
                "--output_path, or move it away"
            )
    if adm_npz and adm_npz != own_npz and Path(adm_npz).exists():
        raise UserError(
            f"{adm_npz} is there and not of the evaluation in {output_path}: move it away, or give "
            "another --config.sample.adm_npz"
        )
    if png_folder:
        remedy = "move it away, or give another --config.sample.path"
        require_same_recipe(png_folder, recipe, remedy)
        utils.make_directory(png_folder)
        if not (png_folder / RECIPE).exists() and any(png_folder.glob("*.png")):
            raise UserError(f"{png_folder} holds pictures that are not this evaluation's: {remedy}")


def prepare(folder, png_folder, recipe, config, image_sampler, dim):
    """Make or find the files of the images, by the main process, which holds the folder's lock.

    Raises:
        UserError: they belong to another recipe; nothing is changed.
    """
    n, (_, height, width) = config.sample.n_samples, image_sampler.image_shape
    arrays = {"features": ((n, dim), np.float32), "done": ((n,), np.uint8)}
    if config.sample.adm_npz:
        arrays["pixels"] = ((n, height, width, 3), np.uint8)
    create(folder, recipe, arrays)
    if png_folder:
        utils.remove_leftovers(png_folder)
        utils.write_json(png_folder / RECIPE, recipe)


def from_main_process(value, accelerator):
    """What the main process has, on every process."""
    found = [value]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(found)
    return found[0]


def make_images(store, image_sampler, features, batches, *, quiet):
    """Make the images of `batches` and keep them; the files of a batch are written while the next
    one is computed.
    """
    with ThreadPoolExecutor(1) as writer:
        writing = None
        for indices, images, rows, agrees in measured(
            image_sampler, features, batches, quiet=quiet
        ):
            require_finite(images, indices)
            pixels = (images * 255).round().byte().cpu() if store.keeps_pictures else None
            agrees = None if agrees is None else agrees.cpu()
            rows = rows.cpu()
            if writing:
                writing.result()
            writing = writer.submit(store.write, indices, rows, agrees, pixels)
        if writing:
            writing.result()


def require_all(folder, mini_batch_size, png_folder):
    """UserError unless every image is there, once all processes are through."""
    if lost := pending(folder, mini_batch_size, png_folder):
        raise UserError(
            f"{sum(map(len, lost))} images that were made are not in {folder}, as another process "
            "or machine overwrote or deleted them: run the same command again"
        )


def manifold_figures(real, rows, device):
    """Precision and recall of features (n, dim), or why there are none."""
    reason = None
    if real.features is None:
        reason = (
            "the statistics keep no features of real images; those that "
            "scripts/compute_fid_stats.py makes do"
        )
    elif min(len(rows), len(real.features)) <= NEIGHBOURS:
        reason = f"they need more than {NEIGHBOURS} images on either side"
    if reason:
        return {"precision_recall": None, "no_precision_recall": reason}
    return {"precision_recall": precision_recall(real.features, rows, device)}


def figures(store, real, features, image_sampler):
    """The figures of a store whose images are all done; without real images, none."""
    if real is None:
        return {"frechet_distance": None, "class_agreement": None, "precision_recall": None}
    rows, device = store.features.read(), image_sampler.device
    classified = hasattr(features, "classify") and image_sampler.conditional
    agreement = store.agreement() if classified else None
    mu, sigma = moments_of(rows, device)
    return {
        **figures_of(mu, sigma, agreement, real, image_sampler.seed),
        **manifold_figures(real, rows, device),
    }


def report(result, output_path):
    """Print an evaluation: figures, then every entry of the recipe."""
    apart = {"config", "environment", "real_halves", "precision_recall", "no_precision_recall"}
    entries = {key: value for key, value in result.items() if key not in apart}
    entries["commit"] = result["environment"]["commit"]
    entries["devices"] = result["environment"]["devices"]
    print("\n".join([*describe(result), "the recipe:"]))
    print("\n".join(f"  {key} = {value!r}" for key, value in utils.flatten(entries).items()))
    print(f"figures, recipe, config and environment are in {output_path}")


def run_evaluation(args, config, accelerator, *, model, process, codec, dataset=None, changes=()):
    """Make sample.n_samples images, compare them with the real ones, write and print the result.

    An interrupted evaluation goes on where it was, with any number of processes; its images lie in
    <output path without suffix>.partial until the result is written.

    Args:
        args: flags with nnet_path, output_path, workdir, config_path and overrides.
        model: the network with the weights of nnet_path, of which `changes` are sentences.
        process, codec: of training; the codec decodes.
        dataset: of images, measured where there is no statistics file and it is small; None or one
            of latents needs dataset.fid_stats.

    Raises:
        UserError: no statistics, or of another resolution; files of another recipe; a path that
            cannot be written; another evaluation at work on the same; images that are not finite.
            Nothing of others is overwritten.
    """
    directory = utils.run_directory(args.config_path, args.overrides, args.workdir)
    output_path = Path(args.output_path or directory / "evaluation.json")
    settings, device, main = config.sample, accelerator.device, accelerator.is_main_process
    if output_path.suffix == ".partial":
        raise UserError(
            f"--output_path is {output_path}, but .partial is for the folder of the images until "
            "the result is written: give another, for example with .json"
        )
    measures = settings.features != metrics.NoFeatures.name
    if measures:
        require_statistics(config, dataset)
    elif not (settings.path or settings.adm_npz):
        raise UserError(
            "sample.features is 'none', so the pictures are all there is to be had: give them a "
            "folder, --config.sample.path"
        )
    features = metrics.make_features(settings.features, settings.fid_weights_path, device)
    precision = Precision(config.train.mixed_precision, device)
    model, codec = model.to(device).eval(), codec.to(device)
    image_sampler = make_image_sampler(
        config, model, process, codec, precision=precision, seed=config.seed
    )
    resolution = image_sampler.image_shape[-1]
    real = None
    if measures:
        real = real_images(config, features, dataset, resolution=resolution, device=device)
    png_folder = Path(settings.path) if settings.path else None
    folder = output_path.with_name(f"{output_path.stem}.partial")
    all_ranks, batches = ranks(accelerator), None
    with contextlib.ExitStack() as stack:
        if main:
            utils.file_to_write(output_path, "--output_path")
            if settings.adm_npz:
                utils.file_to_write(settings.adm_npz, "--config.sample.adm_npz")
            recipe = whole_recipe(image_sampler, features, real, config, args.nnet_path, changes)
            require_own_place(output_path, png_folder, settings.adm_npz, recipe)
            require_own_folder(folder)
            stack.enter_context(utils.RunLock(folder, "--output_path"))
            for path in filter(None, (output_path, settings.adm_npz)):
                utils.remove_leftovers(Path(path).parent, name=Path(path).name)
            prepare(folder, png_folder, recipe, config, image_sampler, features.dim)
            batches = pending(folder, settings.mini_batch_size, png_folder)
        batches = from_main_process(batches, accelerator)
        store, began = ImageStore(folder, png_folder), time.monotonic()
        own = batches[accelerator.process_index :: accelerator.num_processes]
        make_images(store, image_sampler, features, own, quiet=not main)
        beat(WAITING)
        accelerator.wait_for_everyone()
        # With gloo, a process that exits without this aborts now and then (4 of 14 tries).
        accelerator.end_training()
        if not main:
            return
        require_all(folder, settings.mini_batch_size, png_folder)
        made, seconds = sum(map(len, batches)), time.monotonic() - began
        speed = {"images_made_now": made, "img_s": made / seconds if made else None}
        result = {
            **figures(store, real, features, image_sampler), **speed, "ranks": all_ranks,
            "mini_batch_size": settings.mini_batch_size, **recipe, "config": config.to_dict(),
            "environment": environment(),
        }  # fmt: skip
        utils.write_json(output_path, result)  # before the npz, which it says is ours
        if settings.adm_npz:
            store.write_adm_npz(settings.adm_npz)
        store.remove()
    report(result, output_path)
