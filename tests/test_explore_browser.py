"""A browser uses every view of `musigma explore`.

`python -m tests.test_explore_browser URL FOLDER` does the same with a page that is served, and
saves a picture of each view; docs/figures/explore.png is one of them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import musigma
from musigma.checkpoint import save
from musigma.spec import Spec
from musigma.testing import randomized

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
WAIT = 30_000  # milliseconds
MAP = "document.querySelector('canvas.map')"
MAPPED = r"/\b(\d+) of \1 examples/.test(document.querySelector('main').textContent)"


def visit(url: str, folder: Path) -> list[str]:
    """Use every view; returns what went wrong. Pictures of the views are in `folder`."""
    from playwright.sync_api import sync_playwright

    faults: list[str] = []
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (50, 40), (250, 250, 250)).save(folder / "upload.png")
    (folder / "upload.txt").write_text("this is no image")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(WAIT)
        refused: list[str] = []  # requests that the visit itself makes fail
        watch(page, url, faults, refused)
        page.goto(url)
        page.wait_for_selector("nav a[aria-current]")
        names = [link.get_attribute("data-view") for link in page.query_selector_all("nav a")]
        for name in names:
            page.click(f"nav a[data-view={name}]")
            USES[name](page, folder, refused)
            until(page, "document.querySelector('#code').textContent.length > 30")
            page.wait_for_timeout(500)
            page.mouse.move(0, 0)
            page.screenshot(path=folder / f"{name}.png", full_page=True)
            faults += saved(page, folder / f"saved-{name}.png")
            faults += restored(browser, page, url, name)
        for name in names:
            faults += fits(browser, url, name, folder)
        browser.close()
    return faults


def until(page, expression: str) -> None:
    """Wait until an expression is true, which the policy of the page keeps it from polling."""
    end = time.monotonic() + WAIT / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(100)


def watch(page, url, faults, refused):
    """Collect errors of the console and of scripts, and requests to other hosts."""

    def console(message):
        if message.type in ("error", "warning") and not (refused and "400" in message.text):
            faults.append(f"console: {message.text}")

    def request(request_):
        if not request_.url.startswith((url, "blob:")):
            faults.append(f"request: {request_.url}")

    page.on("console", console)
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("request", request)


def use_one(page, folder, refused):
    page.wait_for_selector(".latent")
    page.click("text=→")
    until(page, "document.querySelector('.index').value === '1'")
    for _ in range(3):
        page.click("text=Draw again")
    slider = page.locator(".latent input[type=range]").first
    for _ in range(5):
        slider.press("ArrowRight")
    page.wait_for_selector(".latent.set")
    page.locator(".latent button", has_text="off").nth(1).click()
    until(page, "document.querySelectorAll('.latent.set').length === 2")
    page.locator(".latent button:not([disabled])", has_text="×").last.click()
    until(page, "document.querySelectorAll('.latent.set').length === 1")
    upload = page.locator("input[type=file]")
    if upload.count():
        refused.append("upload")
        upload.set_input_files(folder / "upload.txt")
        page.wait_for_selector("#error:not([hidden]) >> text=upload.txt")
        upload.set_input_files(folder / "upload.png")
        page.wait_for_selector("text=your own")
        refused.clear()
    page.locator(".index").fill("3")
    page.locator(".index").press("Enter")
    until(page, "!location.hash.includes('upload') && location.hash.includes('index=3')")


def use_traverse(page, folder, refused):
    page.wait_for_selector(".slide")
    slider = page.locator(".slide input").first
    for _ in range(20):
        slider.press("ArrowRight")
    until(page, "document.querySelector('.slide output').textContent === '0.40'")
    page.click("text=Undo")
    page.click("text=Random")
    page.click("text=Reset")
    until(page, "!location.hash.includes('set=')")
    page.locator("main select").first.select_option("example")
    page.click("text=Random >> nth=0")
    page.wait_for_selector(".gallery canvas, table")


def use_map(page, folder, refused):
    until(page, MAPPED)
    canvas = page.locator("canvas.map")
    box = canvas.bounding_box()
    for share in np.linspace(0.3, 0.7, 60):  # until an example is under the pointer
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
        if page.locator("text=Open it as one input").count():
            break
        page.wait_for_timeout(60)
    page.wait_for_selector("text=Open it as one input")
    canvas.click(position={"x": 0.4 * box["width"], "y": 0.5 * box["height"]})
    canvas.click(position={"x": 0.6 * box["width"], "y": 0.4 * box["height"]})
    until(page, "location.hash.includes(';') || location.hash.includes('%3B')")
    page.click("text=Clear")
    canvas.focus()
    for key in ("ArrowRight", "Enter", "ArrowUp", "ArrowUp", "Enter"):
        canvas.press(key)
    page.locator("main select").nth(0).select_option(index=1)
    page.locator("main select").nth(1).select_option("score")
    page.wait_for_selector("text=unlikely")
    page.locator("main select").nth(0).select_option("components")
    page.locator("main select").nth(1).select_option(index=0)
    for x, y in ((0.35, 0.55), (0.65, 0.4)):
        canvas.click(position={"x": x * box["width"], "y": y * box["height"]})
    until(page, "document.querySelectorAll('.card figure, .card td').length >= 10")


def use_anomalies(page, folder, refused):
    page.wait_for_selector(".ranked tbody tr")
    page.locator("select[name=rate]").select_option("0.2")
    page.wait_for_selector(".flagged")
    page.click("text=Less strange ones")
    until(page, "document.querySelector('.ranked td').textContent === '25'")
    page.click("text=Stranger ones")
    until(page, "document.querySelector('.ranked td').textContent === '1'")


def use_levels(page, folder, refused):
    page.wait_for_selector(".level")
    page.locator("text=Redraw this level").last.click()
    page.click("text=Draw again")
    until(page, "/level=\\d/.test(location.hash) && location.hash.includes('seed=1')")


def use_head(page, folder, refused):
    page.locator("select[name=layout]").select_option("interleaved")
    page.wait_for_selector("text=interleaved mean-first")
    page.locator("select[name=kl]").select_option("log_std")
    page.wait_for_selector("text=They agree")
    page.locator("select[name=kl]").select_option("log_var")
    page.wait_for_selector("text=the KL charges for")


def use_training(page, folder, refused):
    page.wait_for_selector(".problems li")


USES = {
    "one": use_one,
    "traverse": use_traverse,
    "map": use_map,
    "levels": use_levels,
    "anomalies": use_anomalies,
    "head": use_head,
    "training": use_training,
}


def saved(page, path: Path) -> list[str]:
    """Save the view as a PNG; returns what is wrong with it."""
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(path)
    with Image.open(path) as image:
        levels = np.asarray(image.convert("L"))
    width, height = levels.shape[::-1]
    empty = bool(levels.std() < 5)
    return [f"png: {path.name} is {width} x {height}, empty: {empty}"] * (width < 800 or empty)


def restored(browser, page, url: str, name: str) -> list[str]:
    """Open the address in another page; returns what differs."""
    code = "document.querySelector('#code').textContent"
    address, end = page.evaluate("location.href"), time.monotonic() + WAIT / 1000
    other = browser.new_page()
    other.goto(address)
    until(other, f"{code}.length > 30")
    while (got := other.evaluate(code)) != (wanted := page.evaluate(code)):
        if time.monotonic() > end:
            break
        other.wait_for_timeout(200)
    other.close()
    return [] if got == wanted else [f"link: {address} does not restore {name}"]


def fits(browser, url: str, name: str, folder: Path) -> list[str]:
    """Open a view on a dark phone; returns what is wider than it."""
    phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    phone.goto(f"{url}#{name}")
    until(phone, "document.querySelector('#code').textContent.length > 30 || !!" + MAP)
    phone.wait_for_timeout(500)
    width = phone.evaluate("document.documentElement.scrollWidth")
    phone.screenshot(path=folder / f"phone-{name}.png", full_page=True)
    phone.close()
    return [f"phone: {name} is {width} pixels wide"] * (width > 390)


# --- the test ------------------------------------------------------------------------------------


@contextmanager
def served(run: Path, source: Path):
    """The address of the page of a run."""
    words = [sys.executable, "-m", "musigma", "explore", run, "--data", source, "--port", "0"]
    process = subprocess.Popen([*words, "--json"], stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        text = ""
        for line in lines:
            text += line
            if line.startswith("}"):
                break
        yield json.loads(text)["url"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "vector", "glow"])
def test_a_browser_uses_every_view(kind, tmp_path):
    pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip("there is no chromium: apt-get install chromium")
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    if kind == "vector":
        source = tmp_path / "table.csv"
        rows = "\n".join(",".join(map(str, row)) for row in random.normal(size=(60, 3)).round(4))
        source.write_text(f"u,v,w\n{rows}\n")
        spec = Spec((3,), columns=("u", "v", "w"))
        model = musigma.build("vae", spec, latents=3, width=8)
    else:
        source = tmp_path / "digits.npz"
        x = random.integers(0, 256, (40, 1, 8, 8), np.uint8)
        np.savez(source, x=x, labels=np.array(["a", "b"] * 20))
        options = {"net": "mlp", "latents": 4, "width": 16}
        if kind == "glow":
            options = {"levels": 2, "depth": 1, "hidden": 8}
        architecture = "vae" if kind == "image" else kind
        model = musigma.build(architecture, Spec((1, 8, 8), 256), **options)
    run = tmp_path / "run"
    run.mkdir()
    save(randomized(model), run / "model.safetensors")
    rows = [{"kind": "train", "step": i, "bits_per_dim": 5 + 4 / (1 + i)} for i in range(50)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with served(run, source) as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        assert visit(url, tmp_path / "pictures") == []


if __name__ == "__main__":
    for fault in visit(sys.argv[1], Path(sys.argv[2])):
        print(fault)
