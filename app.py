"""A page on which checkpoints draw, for the browsers of this machine alone: make page.

The page writes a command of sample.py and draws through its functions: the command's pictures are
the page's bit for bit. Pictures are part of the answer to who asked, never files.
"""

import base64
import os
import queue
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr
import torch
from torchvision.io import encode_png

import sample
from libs.diffusion import SAMPLERS
from libs.evaluate import draw_rows
from libs.parts import choose_process
from libs.runtime import file_path, parse_flags, run_main
from utils import UserError, read_json, to_uint8

FLAGS = {
    "checkpoint": (file_path, "pretrained/emoji64.ckpt", "the <step>.ckpt directory shown first"),
    "workdir": (file_path, "workdir", "the page lists its <step>.ckpt directories too"),
    "port": (int, 7860, "of 127.0.0.1"),
}
NUMBERS = {  # label: lowest and highest value, step of its arrows
    "Per class": (1, 64, 1), "Seed": (0, 2**53 - 1, 1), "Steps": (1, 1000, 1),
    "Guidance": (-100, 100, 0.1), "Guidance from": (0, 1, 0.1), "Guidance to": (0, 1, 0.1),
    "Internal": (0, 100, 0.1), "Internal from": (0, 1, 0.1), "Internal to": (0, 1, 0.1),
}  # fmt: skip
MOST = 256  # pictures at once: what is predicted on the way stays in memory
DRAWING = ThreadPoolExecutor(max_workers=1)  # a cancelled drawing ends after its network call
PROGRESS = '<p role="status">{} …</p><div class="bar" style="--share: {:.1%}"></div>'


def read_model(path):
    """(config with sample.py's settings, names of classes) of a checkpoint. Names are those of the
    environment.json in it or in its run directory, else numbers.
    """
    args = parse_flags(["sample.py", f"--nnet_path={path}"], sample.FLAGS)
    sample.set_sampling(args.config, args)
    count = args.config.nnet.num_classes if args.config.train.mode == "cond" else 0
    files = [folder / "environment.json" for folder in (Path(path), Path(path).parent.parent)]
    known = [read_json(file).get("classes") or {} for file in files if file.is_file()] or [{}]
    names = {number: name for name, number in known[0].items()}
    return args.config, [names.get(number, str(number)) for number in range(count)]


def write_words(path, classes, algorithm, *numbers):
    """The words of sample.py for the values of the page; UserError for a number out of range."""
    for (label, (low, high, _)), value in zip(NUMBERS.items(), numbers, strict=True):
        if value is None or not low <= value <= high:
            given = "empty" if value is None else value
            raise UserError(f"{label} is {given}: give a number from {low} to {high:,}.")
    n, seed, steps, scale, *interval, internal, start, end = numbers
    flags = dict(nnet_path=path, classes=",".join(map(str, classes)), n=n, seed=seed)
    flags |= dict(algorithm=algorithm, steps=steps, scale=scale)
    flags["config.sample.guidance_interval"] = tuple(interval) if scale else ""
    flags["config.sample.internal_scale"] = internal
    flags["config.sample.internal_interval"] = (start, end) if internal else ""
    return ["sample.py", *(f"--{flag}={value}" for flag, value in flags.items() if value != "")]


def iter_drawing(args):
    """Yields (i, n, x_0) after network call i of n of each batch, x_0 as predicted (rows so far, C,
    H, W) uint8, then (0, 0, [x_0 of call 1, ..., n, pictures]). Closing it ends the drawing.
    """
    events, closed, batches = queue.SimpleQueue(), threading.Event(), []

    def draw():
        image_sampler = sample.open_sampler(args)

        def on_step(i, n, x_0):
            if closed.is_set():
                raise InterruptedError
            batches.extend([[]] if i == 1 else [])
            batches[-1].append(to_uint8(image_sampler.codec.decode(x_0)))
            events.put((i, n, torch.cat([batch[-1] for batch in batches])))

        pictures = draw_rows(image_sampler, args.classes, args.n, on_step)
        return [*map(torch.cat, zip(*batches, strict=True)), to_uint8(pictures)]

    future = DRAWING.submit(draw)
    future.add_done_callback(events.put)
    try:
        while (event := events.get()) is not future:
            yield event
        yield 0, 0, future.result()
    finally:
        closed.set()


def render_grid(images, titles, args):
    """HTML of images (rows x n, C, H, W) below titles of rows, each a link to its own file."""
    parts = [f'<div style="--n: {args.n}; --px: {images.shape[-1]}px"><section>']
    for k, image in enumerate(images):
        url = f"data:image/png;base64,{base64.b64encode(encode_png(image).numpy()).decode()}"
        if k % args.n == 0:
            parts.append(f"</section><section><h3>{escape(titles[k // args.n])}</h3>")
        parts.append(
            f'<a href="{url}" download="seed{args.seed}-picture{k}.png" title="Save picture {k}">'
            f'<img src="{url}" alt="Picture {k}"><span>{k} ↓</span></a>'
        )
    return "".join([*parts, "</section></div>"])


def show_model(path):
    """Classes, samplers and numbers of a checkpoint's config, for the page."""
    config, names = read_model(path)
    given, process = config.sample, choose_process(config)
    fit = [k for k, (*_, needs) in SAMPLERS.items() if all(hasattr(process, x) for x in needs)]
    choices = [(name, number) for number, name in enumerate(names)]
    few = list(range(len(names)))[:: -(-len(names) // 4) or 1]
    numbers = [2, 0, given.sample_steps, given.scale if given.cfg and names else 0]
    numbers += [*(given.guidance_interval or (0, 1)), given.internal_scale]
    numbers += given.internal_interval or (0, 1)
    classes = gr.update(choices=choices, value=few, visible=bool(names))
    return [classes, gr.update(choices=fit, value=given.algorithm), *numbers]


def start(first, workdir):
    """Checkpoints, `first` and then the newest, and the model of one; UserError without any."""
    found = sorted(Path(workdir).rglob("*.ckpt"), key=lambda path: -path.stat().st_mtime)
    paths = list(dict.fromkeys(str(path) for path in (Path(first), *found) if path.is_dir()))
    if not paths:
        raise UserError(f"there is no checkpoint {first}, and none in {workdir}: run make demo")
    return [gr.update(choices=paths, value=paths[0]), *show_model(paths[0])]


def answer(status, *, busy=True, grid=None, slider=None, command=None, drawing=None):
    """What changes on the page, in the order of `shown` there."""
    buttons = gr.update(interactive=not busy), gr.update(interactive=busy)
    return status, *buttons, *(x or gr.skip() for x in (grid, slider, command, drawing))


def draw(*values):
    """Yields an answer for each network call."""
    try:
        words = write_words(*values)
        args, (_, names) = parse_flags(words, sample.FLAGS), read_model(values[0])
        titles = [names[label] for label in args.classes or range(len(names))] or [""]
        if (count := len(titles) * args.n) > MOST:
            raise UserError(f"{count} pictures at once are too many: give at most {MOST}.")
        command = "python " + " \\\n    ".join(shlex.quote(word) for word in words)
        command = gr.update(value=command, visible=True, lines=len(words))
        yield answer(PROGRESS.format("Loading the network", 0), command=command)
        for i, n, images in iter_drawing(args):
            if i:
                bar = PROGRESS.format(f"Network call {i} of {n}", i / n)
                yield answer(bar, grid=render_grid(images, titles, args))
        slider = gr.update(maximum=len(images) - 1, value=len(images) - 1, visible=True)
        grid, drawing = render_grid(images[-1], titles, args), (images, titles, args)
        text = f"<p>{count} pictures. Press one to save it.</p>"
        yield answer(text, busy=False, grid=grid, slider=slider, drawing=drawing)
    except Exception as error:
        yield answer(f'<p role="alert">{escape(str(error))}</p>', busy=False)
        if not isinstance(error, UserError):
            raise


def add_numbers(labels):
    with gr.Row():
        return [gr.Number(label=x, step=NUMBERS[x][2], min_width=90) for x in labels]


def make_page(*places):
    """The page, on checkpoints of `start(*places)`."""
    labels, quick = list(NUMBERS), dict(queue=False, show_progress="hidden")
    with gr.Blocks(title="DiM", analytics_enabled=False) as page, gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            gr.HTML("<h1>DiM</h1><p>Diffusion with a Mamba backbone, drawing on this machine</p>")
            path = gr.Dropdown(label="Checkpoint")
            classes = gr.Dropdown(label="Classes: all, where none is chosen", multiselect=True)
            numbers, algorithm = add_numbers(labels[:3]), gr.Dropdown(label="Sampler")
            with gr.Accordion("Guidance", open=False):
                gr.HTML("0 is none. Guidance acts in times from 1, noise, to 0, the picture.")
                numbers += add_numbers(labels[3:6]) + add_numbers(labels[6:])
            with gr.Row():
                button = gr.Button("Draw", variant="primary", min_width=90)
                cancel = gr.Button("Cancel", interactive=False, min_width=90)
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML("<p>Your pictures appear here.</p>", elem_id="status")
            grid, drawing = gr.HTML(elem_id="grid"), gr.State()
            slider = gr.Slider(visible=False, step=1, label="As predicted after network call")
            command = gr.Textbox(label="As a command", buttons=["copy"], visible=False)
        model, shown = [classes, algorithm, *numbers], [status, button, cancel, grid]
        shown += [slider, command, drawing]
        page.load(lambda: start(*places), None, [path, *model], **quick)
        path.input(show_model, path, model, **quick)
        wait = partial(answer, PROGRESS.format("Waiting for another drawing", 0))
        waited = button.click(wait, None, shown, **quick)
        drawn = waited.then(draw, [path, *model], shown, show_progress="hidden")
        stop = partial(answer, "<p>Cancelled.</p>", busy=False)
        cancel.click(stop, None, shown, cancels=drawn, **quick)
        given, quick["trigger_mode"] = [slider, drawing], "always_last"
        slider.input(lambda k, x: render_grid(x[0][k], *x[1:]), given, grid, **quick)
    return page


def main(args):
    start(args.checkpoint, args.workdir)  # says at once what is missing
    # No telemetry, no look for newer versions, no proxy on the way to this machine.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", NO_PROXY="*")
    make_page(args.checkpoint, args.workdir).launch(
        server_name="127.0.0.1", server_port=args.port, share=False, ssr_mode=False,
        inbrowser=True, footer_links=[], css_paths="app.css", theme=gr.themes.Base(),
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main, FLAGS)
