"""How fast the page of `musigma explore` is in a browser: docs/explore.md.

    python benchmarks/explore_page.py FOLDER

A default VAE of 3 x 64 x 64 images with random weights is served for the sliders, and a small one
of 50,000 rows for the map. The browser is Debian's chromium without a window, which renders in
software. Server and browser share the cores of the process; what both spend of them is given
beside the time that passes, since other processes may use the cores too.
"""

import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from playwright.sync_api import sync_playwright

import musigma
from musigma.checkpoint import save
from musigma.spec import Spec

SLIDER = """async () => {
  const later = window.setTimeout; // the strip below, 200 ms after the last move, is no part of it
  window.setTimeout = (then, ms) => (ms === 200 ? 0 : later(then, ms));
  const slider = document.querySelector(".slide input");
  const picture = document.querySelector(".big");
  const out = [];
  for (let i = 0; i < 200; i++) {
    const changed = new Promise((done) => {
      const seen = new MutationObserver(() => { seen.disconnect(); done(); });
      seen.observe(picture, { childList: true });
    });
    const start = performance.now();
    slider.value = 3 * Math.sin(i / 9);
    slider.dispatchEvent(new Event("input"));
    await changed;
    out.push(performance.now() - start);
    await new Promise(requestAnimationFrame);
  }
  return out;
}"""
FRAMES = """async () => {
  const canvas = document.querySelector("canvas.map");
  const box = canvas.getBoundingClientRect();
  const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
  const out = { zoom: [], pan: [] };
  const frame = () => new Promise(requestAnimationFrame);
  let before = await frame();
  for (let i = 0; i < 150; i++) {
    canvas.dispatchEvent(new WheelEvent("wheel", { ...at, deltaY: i % 50 < 25 ? -20 : 20 }));
    const now = await frame();
    out.zoom.push(now - before);
    before = now;
  }
  const pointer = (kind, i) => canvas.dispatchEvent(new PointerEvent(kind, {
    pointerId: 1, clientX: at.clientX + 90 * Math.sin(i / 9), clientY: at.clientY + i % 40,
  }));
  canvas.setPointerCapture = () => {};
  pointer("pointerdown", 0);
  before = await frame();
  for (let i = 0; i < 150; i++) {
    pointer("pointermove", i);
    const now = await frame();
    out.pan.push(now - before);
    before = now;
  }
  pointer("pointerup", 150);
  return out;
}"""


def runs(folder):
    """Two run files and their data."""
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    x = random.integers(0, 256, (40, 3, 64, 64), np.uint8)
    np.savez(folder / "images.npz", x=x)
    save(musigma.build("vae", Spec((3, 64, 64), 256)), folder / "images.safetensors")
    x = random.normal(size=(50_000, 6)).astype(np.float32)
    np.savez(folder / "rows.npz", x=x, labels=random.integers(0, 10, 50_000))
    model = musigma.build("vae", Spec((6,)), latents=4, width=32)
    save(model, folder / "rows.safetensors")


@contextmanager
def served(folder, name):
    """The address of a page, and when it was printed."""
    words = [folder / f"{name}.safetensors", "--data", folder / f"{name}.npz", "--split", "all"]
    command = [sys.executable, "-m", "musigma", "explore", *words, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        text = ""
        while not text.rstrip().endswith("}"):
            text += process.stdout.readline()
        yield json.loads(text)["url"], time.perf_counter()
        process.terminate()


def spent():
    """Processor seconds of this process and of all that it started: server and browser."""
    here = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (here, *here.children(recursive=True)))


def timed(page, script):
    """What a script in the page returns, and processor milliseconds of its run."""
    before = spent()
    found = page.evaluate(script)
    return found, 1000 * (spent() - before)


def quantiles(values):
    """The median and the 95th percentile."""
    return {f"p{q}": round(float(np.percentile(values, q)), 1) for q in (50, 95)}


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    runs(folder)
    found = {}
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or "/usr/bin/chromium"
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        with served(folder, "images") as (url, printed):
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            before = spent()
            page.goto(url)
            page.wait_for_selector(".latent")
            found["first page, ms"] = round(1000 * (time.perf_counter() - printed))
            found["first page, processor ms"] = round(1000 * (spent() - before))
            page.goto(f"{url}#traverse")
            page.wait_for_selector(".slide")
            page.wait_for_timeout(3000)  # until the survey rests
            moves, cost = timed(page, SLIDER)
            found["decode on a slider's move, ms"] = quantiles(moves[10:])
            found["a move, processor ms"] = round(cost / len(moves), 1)
        with served(folder, "rows") as (url, _):
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.goto(f"{url}#map")
            begun = time.perf_counter()
            while "50,000 of 50,000" not in page.inner_text("main"):
                page.wait_for_timeout(300)
            found["survey of 50,000 rows, s"] = round(time.perf_counter() - begun, 1)
            frames_of, cost = timed(page, FRAMES)
            found["a frame, processor ms"] = round(cost / sum(map(len, frames_of.values())), 1)
            for kind, frames in frames_of.items():
                found[f"{kind}, ms a frame"] = quantiles(frames)
                found[f"{kind}, frames a second"] = round(1000 * len(frames) / sum(frames), 1)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
