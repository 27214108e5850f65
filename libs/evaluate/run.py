"""A whole evaluation: images in batches that survive an interruption, figures and their record.

Batch k is images [k m, (k + 1) m), m = sample.mini_batch_size. Any process makes any batch and
writes it into one file, aside, then renamed: a batch whose file is there is done.
"""

import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object

import utils
from libs.evaluate.features import Extractors
from libs.evaluate.generate import ImageSampler, iter_features, require_finite
from libs.evaluate.metrics import choose_metrics, compute_metrics, make_feature_set
from libs.evaluate.real import load_real
from libs.evaluate.report import describe_setting, summarize
from libs.evaluate.run_report import report_run
from libs.evaluate.stored import StoredImages
from libs.files import hash_file, weights_file
from libs.runtime import config_beside, environment, wait_without_timeout
from utils import UserError

RECORD = "evaluation.json"  # beside batches and PNG files: the evaluation_spec they belong to
PNG_THREADS = 8


def _open_source(args, config, device, parts):
    """The images to measure."""
    if args.images:
        return StoredImages(args.images, config.dataset.resolution, device)
    model, codec = parts["model"].to(device).eval(), parts["codec"].to(device)
    return ImageSampler(config, model, parts["process"], codec, seed=config.seed)


def _describe_network(path, config, changes):
    """What records say of the network."""
    file = weights_file(path)
    weights = {"file": str(file), "sha256": hash_file(file), "changes": list(changes)}
    nnet = {key: value for key, value in config.nnet.to_dict().items() if key != "pretrained_path"}
    return {"weights": weights, "nnet": nnet}


def evaluation_spec(source, extractors, metrics, real, settings, n, seeds):
    """All that batches and result depend on but the network: dict. settings: config.sample."""
    return {
        "n": n, "metrics": metrics, "repeats": seeds,
        "features": extractors.name if extractors else "none",
        "extractors": extractors.hashes if extractors else {},
        "statistics": next(iter(real.values())).source if real else None,
        **source.sampling_spec(), "mini_batch_size": settings.mini_batch_size,
        "pictures": {"path": settings.path, "adm_npz": settings.adm_npz},
    }  # fmt: skip


def require_same_spec(path, spec, flag):
    """UserError if the json file `path` differs, but for names of files: their hashes count."""
    found = {key: value for key, value in utils.read_json(path).items() if key in spec}
    differences = utils.config_differences(found, spec)
    if lines := [line for line in differences if ".file: " not in line]:
        raise UserError(
            f"{path} is of another evaluation ({lines[0]}): move it away, or give another {flag}"
        )


def claim_folder(folder, spec, flag):
    """Make `folder` this evaluation's; UserError if it is another's, or holds files of none."""
    record = utils.make_directory(folder) / RECORD
    if record.exists():
        require_same_spec(record, spec, flag)
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} holds other files: move them away, or give another {flag}")
    utils.write_json(record, spec)


def claim_places(output_path, folder, settings, spec):
    """UserError where a file cannot be written, or another evaluation's would be replaced."""
    utils.file_to_write(output_path, "--output_path")
    if output_path.exists():
        require_same_spec(output_path, spec, "--output_path")
    elif settings.adm_npz and Path(settings.adm_npz).exists():
        raise UserError(f"{settings.adm_npz} is of another evaluation: move it away")
    if settings.adm_npz:
        utils.file_to_write(settings.adm_npz, "--config.sample.adm_npz")
    claim_folder(folder, spec, "--output_path")
    if settings.path:
        claim_folder(Path(settings.path), spec, "--config.sample.path")
        utils.remove_leftovers(settings.path)


def write_batches(source, extractors, batches, path=None, adm_npz=None, *, quiet):
    """Make the images of `batches`; write PNG files and, last, each one's file: features (B, width)
    float32 of each kind, correct (B,) bool, pixels (B, H, W, 3) uint8, as far as they are defined.
    path: of PNG files; adm_npz: where pixels go in the end; None: neither.
    """
    made = iter_features(source, extractors, [i for _, i in batches], quiet=quiet)
    with ThreadPoolExecutor(PNG_THREADS) as threads:
        for (file, _), (indices, images, arrays) in zip(batches, made, strict=True):
            require_finite(images, indices)
            if path:
                paths = [Path(path, f"{index}.png") for index in indices]
                list(threads.map(utils.save_png, paths, images.cpu()))
            if adm_npz:
                arrays["pixels"] = utils.to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
            arrays = {name: x.cpu().numpy() for name, x in arrays.items()}
            with utils.replacing(file) as temporary, open(temporary, "wb") as target:
                np.savez(target, **arrays)


def load_batches(batches, name):
    """The array `name` of each batch in order, as far as batches have it."""
    for path, _ in batches:
        with np.load(path, allow_pickle=False) as arrays:
            if name in arrays:
                yield arrays[name]


def load_generated(batches, kinds, device):
    """{kind: FeatureSet} of the images of all batches."""
    correct = list(load_batches(batches, "correct"))
    agreement = float(np.concatenate(correct).mean()) if correct else None
    rows = {kind: np.concatenate(list(load_batches(batches, kind))) for kind in kinds}
    return {kind: make_feature_set(x, device, agreement=agreement) for kind, x in rows.items()}


def write_adm_npz(path, batches, shape):
    """The pictures as arr_0, uint8 of `shape` (n, H, W, 3), in an uncompressed .npz, as
    evaluator.py of openai/guided-diffusion reads it; batch by batch, whole or not at all.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with utils.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as target:
            np.lib.format.write_array_header_1_0(target, header)
            for pixels in load_batches(batches, "pixels"):
                target.write(pixels.tobytes())


def write_result(path, spec, figures, config):
    """Write the json file of a result; print the setting, the figures and the setting in a line."""
    more = {"config": config.to_dict(), "environment": environment()}
    utils.write_json(path, {**figures, **spec, **more})
    for key, value in utils.flatten({**spec, **figures}).items():
        print(f"  {key} = {value!r}")
    print(describe_setting(spec))
    print(f"figures, setting, config and environment are in {path}")


def _name_batches(folder, n, m, repeats):
    """For each repeat, the (file, indices) of its batches of m of n images."""
    parts = [range(i, min(i + m, n)) for i in range(0, n, m)]
    names = [f"{repeat}-" if repeat else "" for repeat in range(repeats)]
    return [[(folder / f"{name}{k:06}.npz", x) for k, x in enumerate(parts)] for name in names]


def _choose_output(args):
    """Where the result goes by default: into the run that made the weights, if that is known."""
    if args.images:
        return f"{args.images.rstrip('/')}.json"
    checkpoint = config_beside(args.nnet_path).parent
    if checkpoint.parent.name == "ckpts" and not args.workdir:
        return checkpoint.parents[1] / f"evaluation_{checkpoint.stem}.json"
    directory = utils.run_directory(args.config_path, args.overrides, args.workdir)
    return directory / "evaluation.json"


def run_evaluation(args, config, accelerator, *, dataset=None, changes=(), **parts):
    """Make sample.n_samples images, compare them with the real images, write and print the result.

    The same command goes on with an interrupted evaluation, on any number of processes; batches
    lie in <output path without suffix>.partial until the result is written.

    Args:
        args: flags with nnet_path or images (a path of StoredImages), output_path, workdir,
            config_path and overrides.
        dataset: of real images, or None with dataset.fid_stats; changes: sentences on the network.
        parts: model, with the weights of nnet_path, and process and codec of training.

    UserError: no statistics that fit; files of another evaluation; a path that cannot be written;
    images that are not finite.
    """
    settings, device, main = config.sample, accelerator.device, accelerator.is_main_process
    output_path = Path(args.output_path or _choose_output(args))
    folder = output_path.with_name(f"{output_path.stem}.partial")

    metrics = choose_metrics(settings.metrics)
    extractors = None if settings.features == "none" else Extractors(settings, metrics, device)
    if not (extractors or settings.path or settings.adm_npz):
        raise UserError("sample.features is 'none': give the pictures a folder, sample.path")
    source = _open_source(args, config, device, parts)
    side, all_ranks = source.image_shape[-1], gather_object([accelerator.process_index])
    n, seeds = (source.count, 1) if args.images else (settings.n_samples, settings.repeats)
    repeats = _name_batches(folder, n, settings.mini_batch_size, seeds)
    if main:
        given = dict(metrics=metrics, side=side, device=device)
        real = extractors and load_real(config.dataset, extractors, dataset, **given)
        spec = evaluation_spec(source, extractors, metrics, real, settings, n, seeds)
        spec |= {} if args.images else _describe_network(args.nnet_path, config, changes)
        claim_places(output_path, folder, settings, spec)
        made = sum(len(indices) for x in repeats for path, indices in x if not path.exists())
    wait_without_timeout(accelerator)
    began = time.monotonic()
    for repeat, batches in enumerate(repeats):
        source.seed = config.seed + repeat
        files = () if repeat else (settings.path, settings.adm_npz)
        own = batches[accelerator.process_index :: accelerator.num_processes]
        own = [(path, indices) for path, indices in own if not path.exists()]
        write_batches(source, extractors, own, *files, quiet=not main)
    wait_without_timeout(accelerator)
    accelerator.end_training()  # with gloo, a process that exits without it aborts now and then
    if not main:
        return

    seconds, kinds = time.monotonic() - began, extractors.dims if extractors else ()
    speed = {"images_made_now": made, "img_s": made / seconds, "ranks": all_ranks}
    began = time.monotonic()
    found = [compute_metrics(load_generated(x, kinds, device), real, metrics) for x in repeats]
    speed["figures_s"] = time.monotonic() - began
    write_result(output_path, spec, {**speed, **summarize(found)}, config)
    if settings.adm_npz:
        write_adm_npz(settings.adm_npz, repeats[0], (n, side, side, 3))
    shutil.rmtree(folder)
    if (output_path.parent / "metrics.jsonl").exists():
        report_run(output_path.parent)
