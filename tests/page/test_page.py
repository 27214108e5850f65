"""The page in Debian's Chromium, on a wide screen and on a phone's: make test-page."""

import base64
import io
import json
import shlex
import shutil
import socket
import time
import urllib.request

import numpy as np
import pytest
import runs
from PIL import Image
from playwright.sync_api import expect, sync_playwright

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "<ibis>", "jay"]
RELEASE = runs.ROOT / "tests" / "data" / "release_0_1"
SCREENSHOTS = runs.ROOT / "build" / "page"  # for people to open
WIDTHS = pytest.mark.parametrize("width", [1280, 390])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model of ten named classes, two network calls; below it one without classes."""
    folder = tmp_path_factory.mktemp("runs")
    named, plain = folder / "named.ckpt", folder / "plain" / "ckpts" / "8.ckpt"
    for path in named, plain:
        shutil.copytree(RELEASE / "8.ckpt", path)
    classes = {name: number for number, name in enumerate(NAMES)}
    (named / "environment.json").write_text(json.dumps({"classes": classes}))
    config = json.loads((plain / "config.json").read_text())
    config["train"]["mode"] = "uncond"
    (plain / "config.json").write_text(json.dumps(config))
    return named, plain


@pytest.fixture(scope="module")
def url(checkpoints):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named, _ = checkpoints
    words = [f"--checkpoint={named}", f"--workdir={named.parent}", f"--port={port}"]
    process, url = runs.start("app.py", *words, BROWSER="true"), f"http://127.0.0.1:{port}/"
    for _ in range(600):
        try:
            urllib.request.urlopen(url).close()
            break
        except OSError:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
    yield url
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as play:
        options = dict(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        browser = play.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, url):
    """visit(width): the page as a new person opens it; nothing may be asked of another machine."""
    contexts, asked, complaints = [], [], []

    def open_page(width=1280):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        expect(page.get_by_label("Steps")).to_have_value("2", timeout=30_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == [] and len(asked) > 10
    assert [x for x in asked if not x.startswith((url, "data:", "blob:"))] == []


def draw(page):
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#status")).to_contain_text("Press one to save it", timeout=30_000)


def read_pictures(page):
    """uint8 (n, H, W) of the grid's links to files, which are what it shows."""
    links = page.locator("#grid a").evaluate_all("all => all.map(a => [a.href, a.firstChild.src])")
    assert all(file == shown for file, shown in links)
    files = [base64.b64decode(file.partition(",")[2]) for file, _ in links]
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


@pytest.fixture
def run_command(in_process, tmp_path):
    """run_command(page): pictures of the command that the page shows, cut out of its grid."""

    def run(page, n=2, scale=38):
        text = page.locator("textarea").input_value()
        python, script, *words = shlex.split(text.replace("\\\n", ""))
        assert (python, script) == ("python", "sample.py")
        assert in_process("sample", [*words, f"--out={tmp_path / 'grid.png'}"]) == 0
        grid, side, gap = np.asarray(Image.open(tmp_path / "grid.png"))[..., 0], 8 * scale, 2
        tops = range(gap, len(grid), side + gap)
        cells = [(y, gap + k * (side + gap)) for y in tops for k in range(n)]
        return np.stack([grid[y : y + side : scale, x : x + side : scale] for y, x in cells])

    return run


@WIDTHS
def test_pictures_are_the_commands_and_files_have_names(visit, run_command, width):
    page = visit(width)
    page.screenshot(path=SCREENSHOTS / f"{width}-start.png", full_page=True)
    draw(page)
    assert page.locator("h3").all_inner_texts() == ["ant", "dog", "gnu", "jay"]
    page.screenshot(path=SCREENSHOTS / f"{width}-drawn.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    found = read_pictures(page)
    assert found.shape == (8, 8, 8) and len(np.unique(found, axis=0)) == 8
    np.testing.assert_array_equal(found, run_command(page))
    with page.expect_download() as started:
        page.locator("#grid a").nth(3).click()
    assert started.value.suggested_filename == "seed0-picture3.png"
    np.testing.assert_array_equal(np.asarray(Image.open(started.value.path())), found[3])


@WIDTHS
def test_change_of_class_seed_and_guidance(visit, run_command, width):
    page = visit(width)
    classes = page.get_by_label("Classes")
    for _ in range(4):
        classes.press("Backspace")
    classes.fill("ibis")
    classes.press("Enter")
    page.get_by_label("Seed").fill("7")
    page.get_by_text("Guidance", exact=True).click()
    page.get_by_label("Guidance from").fill("0.3")
    page.screenshot(path=SCREENSHOTS / f"{width}-guidance.png", full_page=True)
    draw(page)
    assert page.locator("h3").all_inner_texts() == ["<ibis>"]
    found = read_pictures(page)
    np.testing.assert_array_equal(found, run_command(page))
    first = page.locator("#grid a").first
    picture = first.get_attribute("href")
    page.get_by_role("slider").press("Home")  # what the first of two calls predicts
    expect(first).not_to_have_attribute("href", picture)
    page.get_by_role("slider").press("End")
    expect(first).to_have_attribute("href", picture)
