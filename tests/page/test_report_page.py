"""report.html in Chromium: on a screen, in the dark, on paper, on a phone."""

import pytest
import runs
import torch

import utils
from libs.evaluate import write_report
from libs.runtime import MetricsLog, load_config

sync_api = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    (run / "samples").mkdir()
    config = load_config(str(runs.ROOT / "configs" / "digits_T_flow.py"))
    utils.write_run_files(run, config, {"commit": "0" * 40})
    for step in range(1, 1001):
        MetricsLog(run).write(step, {"loss": 100 / step, "grad_norm": 1.0, "img_s": 2e6})
    for step in range(1, 9):
        utils.save_grid(run / "samples" / f"{step}.png", torch.rand(16, 3, 64, 64), 4)
    return write_report(run)


@pytest.mark.parametrize("media, scheme, width, ground", [
    ("screen", "light", 1280, "rgb(255, 255, 255)"), ("screen", "dark", 390, "rgb(18, 21, 27)"),
    ("print", "dark", 700, "rgb(255, 255, 255)"),
])  # fmt: skip
def test_the_report_opens(report, media, scheme, width, ground, tmp_path):
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        asked, said = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.emulate_media(media=media, color_scheme=scheme)
        page.goto(f"file://{report}")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.evaluate("[...document.images].map(x => [x.naturalWidth, x.clientWidth])")
        assert len(sizes) == 6 and all(own >= shown > 100 for own, shown in sizes)
        assert page.locator("svg .curve").count() == 3
        inside = page.evaluate("""[...document.querySelectorAll('svg text')].every(x => {
            const [a, b] = [x, x.ownerSVGElement].map(e => e.getBoundingClientRect());
            return a.left >= b.left - 1 && a.right <= b.right + 1; })""")
        assert inside, "a label of an axis is cut off"
        assert [url for url in asked if not url.startswith("data:")] == [f"file://{report}"]
        assert said == []
        browser.close()
