"""make page: checkpoints draw on a page for the browsers of this machine alone. Its command of
sample.py draws the same pictures bit for bit. Pictures go to who asked for them, never to a file.
"""

import base64
import os
import queue
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

import gradio as gr
import torch
from torchvision.io import encode_png

import sample
from libs.diffusion import SAMPLERS
from libs.evaluate import choose_classes
from libs.parts import choose_process
from libs.runtime import file_path, parse_flags, read_class_names, run_main
from utils import UserError, to_uint8

FLAGS = {
    "checkpoint": (file_path, "pretrained/emoji64.ckpt", "the <step>.ckpt directory shown first"),
    "workdir": (file_path, "workdir", "the page lists its <step>.ckpt directories too"),
}
NUMBERS = {  # label: flag of sample.py, step of its arrows; the last two are one flag
    "Per class": ("n", 1), "Seed": ("seed", 1), "Steps": ("config.sample.sample_steps", 1),
    "Guidance": ("scale", 0.1), "Internal guidance": ("config.sample.internal_scale", 0.1),
    "Guide from": ("", 0.1), "Guide to": ("", 0.1),
}  # fmt: skip
DRAWING = ThreadPoolExecutor(max_workers=1)  # a cancelled drawing ends after its network call
PROGRESS = '<p role="status">{} …</p><div class="bar" style="width: {:.1%}"></div>'


def read_model(path):
    """Config with sample.py's settings, and the classes' names, of a checkpoint."""
    args = parse_flags(["sample.py", f"--nnet_path={path}"], sample.FLAGS)
    sample.set_sampling(args.config, args)
    count = args.config.nnet.num_classes if args.config.train.mode == "cond" else 0
    return args.config, (read_class_names(path) or [*map(str, range(count))])[:count]


def write_words(path, classes, algorithm, *numbers):
    """The words of sample.py for the values of the page; UserError for an empty number."""
    if None in numbers:
        raise UserError(f"{[*NUMBERS][numbers.index(None)]} is empty: give a number.")
    words = ["sample.py", f"--nnet_path={path}", f"--algorithm={algorithm}"]
    words += [f"--{k}={x}" for (k, _), x in zip(NUMBERS.values(), numbers[:-2], strict=False)]
    words += [f"--config.sample.guidance_interval={numbers[-2:]}"]
    return words + [f"--classes={','.join(map(str, classes))}"] * bool(classes)


def draw_pictures(args, put, closed):
    """[x_0 as predicted by network call 1, ..., n, pictures], each (rows x n, C, H, W) uint8. After
    call i of n of each batch put((i, n, its x_0 of the batches so far)), unless closed.is_set().
    """
    predicted = {}

    def on_call(i, n, t, x_0):
        if closed.is_set():
            raise InterruptedError
        predicted.setdefault(i, []).append(to_uint8(image_sampler.codec.decode(x_0)))
        put((i, n, torch.cat(predicted[i])))

    with sample.open_sampler(args) as image_sampler:
        pictures = to_uint8(image_sampler.draw_rows(args.classes, args.n, on_call))
    return [*map(torch.cat, predicted.values()), pictures]


def render_grid(images, titles, args):
    """HTML of images (rows x n, C, H, W) below titles of rows, each a link to its own file."""
    parts = [f'<div style="--n: {args.n}; --px: {images.shape[-1]}px">']
    for k, image in enumerate(images):
        name = f"seed{args.seed}-picture{k}.png"
        url = f"data:image/png;base64,{base64.b64encode(encode_png(image).numpy()).decode()}"
        if k % args.n == 0:
            parts.append(f"{'</section>' * bool(k)}<section><h3>{escape(titles[k // args.n])}</h3>")
        parts.append(f'<a href="{url}" download="{name}"><img src="{url}" alt="{name}"></a>')
    return "".join([*parts, "</section></div>"])


def show_model(path):
    """Classes, samplers and numbers of a checkpoint's config, for the page."""
    config, names = read_model(path)
    given, process = config.sample, choose_process(config)
    fit = [k for k, (*_, needs) in SAMPLERS.items() if all(hasattr(process, x) for x in needs)]
    numbers = [2, 0, given.sample_steps, given.scale if given.cfg and names else 0]
    numbers += [given.internal_scale, *(given.guidance_interval or (0, 1))]
    few, choices = [*choose_classes(len(names), 4)], [(x, i) for i, x in enumerate(names)]
    classes = gr.update(choices=choices, value=few, visible=bool(names))
    return [classes, gr.update(choices=fit, value=given.algorithm), *numbers]


def start(first, workdir):
    """Checkpoints, `first` and then the newest, and the model of one; UserError without any."""
    found = sorted(Path(workdir).rglob("*.ckpt"), key=lambda path: -path.stat().st_mtime)
    paths = [str(path) for path in (Path(first), *found) if (path / "config.json").is_file()]
    if not paths:
        raise UserError(f"there is no checkpoint {first}, and none in {workdir}: run make demo")
    return [gr.update(choices=[*dict.fromkeys(paths)], value=paths[0]), *show_model(paths[0])]


def answer(status, *, busy=True, grid=None, slider=None, command=None, drawing=None):
    """What changes on the page, in the order of `shown` there."""
    buttons = gr.update(interactive=not busy), gr.update(interactive=busy)
    return status, *buttons, *(x or gr.skip() for x in (grid, slider, command, drawing))


def draw(*values):
    """Yields an answer for each network call."""
    events, closed = queue.SimpleQueue(), threading.Event()
    try:
        words = write_words(*values)
        args, (_, names) = parse_flags(words, sample.FLAGS), read_model(values[0])
        titles = [names[label] for label in args.classes or choose_classes(len(names))] or [""]
        if not 1 <= (count := len(titles) * args.n) <= 256:  # predictions stay in memory
            raise UserError(f"{count} pictures cannot be drawn at once: ask for 1 to 256.")
        command = "python " + " \\\n    ".join(shlex.quote(word) for word in words)
        command = gr.update(value=command, visible=True, lines=len(words))
        yield answer(PROGRESS.format("Loading the network", 0), command=command)
        future = DRAWING.submit(draw_pictures, args, events.put, closed)
        future.add_done_callback(events.put)
        while (event := events.get()) is not future:
            i, n, images = event
            bar = PROGRESS.format(f"Network call {i} of {n}", i / n)
            yield answer(bar, grid=render_grid(images, titles, args))
        drawing = frames, *_ = future.result(), titles, args
        slider = gr.update(maximum=len(frames) - 1, value=len(frames) - 1, visible=True)
        grid, text = render_grid(frames[-1], titles, args), "Press any picture to save it."
        yield answer(f"<p>{text}</p>", grid=grid, slider=slider, drawing=drawing)
    except UserError as error:
        yield answer(f'<p role="alert">{escape(str(error))}</p>')
    finally:
        closed.set()


def end(status):
    """The answer after a drawing; one that leaves its progress on the page was not finished."""
    return answer("<p>Stopped before the end.</p>" if "</div>" in status else status, busy=False)


def make_page(*places):
    """The page, on checkpoints of `start(*places)`."""
    quick = dict(queue=False, show_progress="hidden", trigger_mode="always_last")
    with gr.Blocks(title="DiM") as page, gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            gr.HTML("<h1>DiM</h1><p>Diffusion with a Mamba backbone, drawing on this machine</p>")
            path = gr.Dropdown(label="Checkpoint")
            classes = gr.Dropdown(label="Classes; without any, up to ten", multiselect=True)
            algorithm, fields = gr.Dropdown(label="Sampler"), NUMBERS.items()
            with gr.Row():
                numbers = [gr.Number(label=k, step=x, min_width=110) for k, (_, x) in fields]
            with gr.Row():
                button = gr.Button("Draw", variant="primary", min_width=90)
                cancel = gr.Button("Cancel", interactive=False, min_width=90)
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML("<p>Your pictures appear here.</p>", elem_id="status")
            grid, drawing = gr.HTML(elem_id="grid"), gr.State()
            slider = gr.Slider(visible=False, step=1, label="Predicted pictures by calls made")
            command = gr.Textbox(label="As a command", buttons=["copy"], visible=False)
        model, shown = [classes, algorithm, *numbers], [status, button, cancel, grid]
        shown += [slider, command, drawing]
        page.load(lambda: start(*places), None, [path, *model], **quick)
        path.input(show_model, path, model, **quick)
        waiting = PROGRESS.format("Waiting for another drawing", 0)
        waited = button.click(lambda: answer(waiting), None, shown, **quick)
        drawn = waited.then(draw, [path, *model], shown, show_progress="hidden")
        drawn.then(end, status, shown, **quick)  # also after the last answer on its way
        cancel.click(end, status, shown, cancels=drawn, **quick)
        slider.input(lambda k, x: render_grid(x[0][k], *x[1:]), [slider, drawing], grid, **quick)
    return page


def main(args):
    start(args.checkpoint, args.workdir)  # says at once what is missing
    # No telemetry, no look for newer versions, no proxy on the way to this machine.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", NO_PROXY="*")
    make_page(args.checkpoint, args.workdir).launch(
        server_name="127.0.0.1", share=False, ssr_mode=False, inbrowser=True, footer_links=[],
        css_paths="app.css", theme=gr.themes.Base(),
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main, FLAGS)
