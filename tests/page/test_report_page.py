"""report.html in Chromium: on a screen, in the dark on a phone, on paper."""

import pytest
import runs
import torch
from playwright.sync_api import sync_playwright

import utils
from libs.evaluate import write_report
from libs.runtime import MetricsLog, load_config


@pytest.mark.parametrize("media, scheme, width, ground", [
    ("screen", "light", 1280, "rgb(255, 255, 255)"), ("screen", "dark", 390, "rgb(18, 21, 27)"),
    ("print", "dark", 700, "rgb(255, 255, 255)"),
])  # fmt: skip
def test_the_report_opens(media, scheme, width, ground, tmp_path):
    config = load_config(str(runs.ROOT / "configs" / "digits_T_flow.py"))
    utils.write_run_files(tmp_path, config, {"commit": "0" * 40})
    for step in range(1, 1001):
        MetricsLog(tmp_path).write(step, {"loss": 100 / step, "grad_norm": 1.0, "img_s": 2e6})
    (tmp_path / "samples").mkdir()
    for step in range(1, 9):
        utils.save_grid(tmp_path / "samples" / f"{step}.png", torch.rand(16, 3, 256, 256), 4)
    asked, said, path = [], [], write_report(tmp_path)
    assert path.stat().st_size < 5_000_000  # its grids are noise, which compresses worst
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.emulate_media(media=media, color_scheme=scheme)
        page.goto(path.as_uri())
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.evaluate("[...document.images].map(x => [x.naturalWidth, x.clientWidth])")
        assert len(sizes) == 6 and all(own >= shown > 100 for own, shown in sizes)
        assert page.locator("svg .curve").count() == 3
        assert page.evaluate("""[...document.querySelectorAll('svg text')].every(x => {
            const [a, b] = [x, x.ownerSVGElement].map(e => e.getBoundingClientRect());
            return a.left >= b.left - 1 && a.right <= b.right + 1; })"""), "a label is cut off"
        assert [x for x in asked if not x.startswith("data:")] == [path.as_uri()] and said == []
