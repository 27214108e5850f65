"""The page and report.html in Debian's Chromium, on a wide screen and on a phone's."""

import base64
import io
import json
import shlex
import shutil
import threading

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import app
import sample
from libs.evaluate import write_report
from libs.runtime import MetricsLog, SamplingNetwork, load_config, parse_flags
from utils import save_grid, write_run_files

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "<ibis>", "jay"]
SCREENSHOTS = runs.ROOT / "build" / "page"  # for people to open
WIDTHS = pytest.mark.parametrize("width", [1280, 390])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of a model of ten named classes, with two network calls, and one without classes."""
    folder = tmp_path_factory.mktemp("runs")
    named, plain = folder / "named.ckpt", folder / "plain" / "ckpts" / "8.ckpt"
    for path in named, plain:
        shutil.copytree(runs.ROOT / "tests/data/release_0_1/8.ckpt", path)
    (named / "environment.json").write_text(json.dumps({"classes": dict.fromkeys(NAMES)}))
    config = (plain / "config.json").read_text()
    (plain / "config.json").write_text(config.replace('"mode": "cond"', '"mode": "uncond"'))
    return folder


@pytest.fixture(scope="module")
def url(checkpoints):
    words = [f"--checkpoint={checkpoints / 'named.ckpt'}", f"--workdir={checkpoints}"]
    process = runs.start("app.py", *words, BROWSER="true")
    while "Running on" not in (line := process.stdout.readline()):
        assert process.poll() is None, line
    yield line.split()[-1] + "/"
    process.kill()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as play:
        yield play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])


@pytest.fixture
def visit(chromium, url):
    """visit(width): the page, or an address, as a new person opens it; nothing may be asked of
    another address.
    """
    asked, complaints, allowed = [], [], ["data:", "blob:"]

    def open_page(width, address=url, **media):
        page = chromium.new_page(viewport={"width": width, "height": 900})
        page.emulate_media(**media)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        allowed.append(address)
        if address == url:
            expect(page.get_by_label("Steps")).to_have_value("2", timeout=30_000)
        return page

    yield open_page
    assert complaints == [] and len(asked) > 0
    assert [x for x in asked if not x.startswith(tuple(allowed))] == []


def draw(page):
    page.get_by_role("button", name="Draw").click()
    for state in ":disabled", ":enabled":
        page.wait_for_selector(f"button.primary{state}")
    expect(page.locator("#status")).to_contain_text("to save it")


def read_pictures(page):
    """uint8 (n, H, W) of the grid's links to files, which are what it shows."""
    links = page.locator("#grid a").evaluate_all("all => all.map(a => [a.href, a.firstChild.src])")
    assert all(file == shown for file, shown in links)
    files = [base64.b64decode(file.partition(",")[2]) for file, _ in links]
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def assert_the_commands(page, in_process, tmp_path):
    """The command that the page shows draws the grid of its pictures."""
    text = page.locator("textarea").input_value().replace("\\\n", "")
    words = shlex.split(text.removeprefix("python sample.py"))
    assert in_process("sample", [*words, f"--out={tmp_path / 'command.png'}"]) == 0
    save_grid(tmp_path / "page.png", torch.from_numpy(read_pictures(page))[:, None], 2)
    assert (tmp_path / "page.png").read_bytes() == (tmp_path / "command.png").read_bytes()


@WIDTHS
def test_pictures_are_the_commands_and_files_have_names(visit, in_process, tmp_path, width):
    page = visit(width)
    draw(page)
    assert page.locator("h3").all_inner_texts() == ["ant", "dog", "gnu", "jay"]
    page.screenshot(path=SCREENSHOTS / f"{width}-drawn.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    found = read_pictures(page)
    assert found.shape == (8, 8, 8) and len(np.unique(found, axis=0)) == 8
    assert_the_commands(page, in_process, tmp_path)
    with page.expect_download() as started:
        page.locator("#grid a").nth(3).click()
    assert started.value.suggested_filename == "seed0-picture3.png"
    np.testing.assert_array_equal(np.asarray(Image.open(started.value.path())), found[3])


@WIDTHS
def test_another_class_seed_step_and_checkpoint(visit, in_process, tmp_path, width):
    page = visit(width)
    classes = page.get_by_label("Classes")
    for _ in range(4):
        classes.press("Backspace")
    classes.fill("ibis")
    classes.press("Enter")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Guide from").fill("0.3")
    draw(page)
    assert page.locator("h3").all_inner_texts() == ["<ibis>"]
    assert_the_commands(page, in_process, tmp_path)
    first = page.locator("#grid a").first
    picture = first.get_attribute("href")
    page.get_by_role("slider").press("Home")  # what the first of two calls predicts
    expect(first).not_to_have_attribute("href", picture)
    page.get_by_role("slider").press("End")
    expect(first).to_have_attribute("href", picture)
    page.get_by_label("Checkpoint").click()
    page.get_by_role("option", name="plain").click()
    expect(classes).to_have_count(0)
    page.get_by_label("Sampler").click()
    page.get_by_role("option", name="dpm_solver", exact=True).click()
    draw(page)
    assert_the_commands(page, in_process, tmp_path)


@WIDTHS
def test_a_wrong_value_is_a_sentence(visit, width):
    page = visit(width)
    for label, value, right, said in (
        ("Guide from", "", "0", "Guide from is empty: give a number."),
        ("Per class", "65", "2", "260 pictures cannot be drawn at once: ask for 1 to 256."),
        ("Steps", "0", "2", "config.sample.sample_steps is 0, expected 1 to inf"),
        ("Internal guidance", "0.5", "0", "the network has no head for it"),
    ):
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_role("alert")).to_contain_text(said)
        page.get_by_label(label, exact=True).fill(right)
    draw(page)


def test_two_people_take_turns_and_one_cancels(visit):
    first, second = visit(1280), visit(390)
    first.get_by_label("Steps").fill("1000")
    first.get_by_label("Seed").fill("5")
    first.get_by_role("button", name="Draw").click()
    expect(first.locator("#status")).to_contain_text("of 1000", timeout=30_000)
    second.get_by_role("button", name="Draw").click()
    expect(second.locator("#status")).to_contain_text("Waiting for another drawing")
    first.screenshot(path=SCREENSHOTS / "1280-drawing.png", full_page=True)
    assert second.locator("#grid img").count() == 0
    first.get_by_role("button", name="Cancel").click()
    expect(first.locator("#status")).to_contain_text("Stopped before the end.")
    expect(second.locator("#status")).to_contain_text("Press any picture", timeout=30_000)
    shown = [read_pictures(page) for page in (first, second)]
    assert not (shown[0][:, None] == shown[1]).all((-2, -1)).any()
    first.get_by_label("Steps").fill("2")
    draw(first)


def test_a_drawing_gives_its_memory_back(checkpoints, monkeypatch):
    released = []
    monkeypatch.setattr(SamplingNetwork, "release", lambda network: released.append(network))
    words = app.write_words(checkpoints / "named.ckpt", [3], "dpm_solver", 1, 0, 2, 0, 0, 0, 1)
    args = parse_flags(words, sample.FLAGS)
    assert app.draw_pictures(args, print, threading.Event())[-1].shape == (1, 1, 8, 8)
    assert len(released) == 1


@pytest.mark.parametrize("media, scheme, width, ground", [
    ("screen", "light", 1280, "rgb(255, 255, 255)"), ("screen", "dark", 390, "rgb(18, 21, 27)"),
    ("print", "dark", 700, "rgb(255, 255, 255)"),
])  # fmt: skip
def test_the_report_opens(visit, media, scheme, width, ground, tmp_path):
    write_run_files(tmp_path, load_config(str(runs.ROOT / "configs/digits_T_flow.py")), {})
    for step in range(1, 1001):
        MetricsLog(tmp_path).write(step, {"loss": 100 / step, "grad_norm": 1.0, "img_s": 2e6})
    (tmp_path / "samples").mkdir()
    for step in range(1, 9):
        save_grid(tmp_path / "samples" / f"{step}.png", torch.rand(16, 3, 256, 256), 4)
    path = write_report(tmp_path)
    assert path.stat().st_size < 5_000_000  # its grids are noise, which compresses worst
    page = visit(width, path.as_uri(), media=media, color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate("[...document.images].map(x => [x.naturalWidth, x.clientWidth])")
    assert len(sizes) == 6 and all(own >= shown > 100 for own, shown in sizes)
    assert page.evaluate("""[...document.querySelectorAll('svg text')].every(x => {
        const [a, b] = [x, x.ownerSVGElement].map(e => e.getBoundingClientRect());
        return a.left >= b.left - 1 && a.right <= b.right + 1; })"""), "a label is cut off"
