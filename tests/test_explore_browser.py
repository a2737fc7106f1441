"""A browser uses every view of `musigma explore`, by pointer and by keyboard.

`python -m tests.test_explore_browser URL FOLDER` saves a picture of each view of a page that is
served; those of docs/explore.md are among them.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
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
CODE = "document.querySelector('#code').textContent"
MAPPED = r"/\b([\d,]+) of \1 examples/.test(document.querySelector('main').textContent)"
SERIOUS = ("serious", "critical")


# --- the pages that are visited ------------------------------------------------------------------


def models(folder):
    """Explorers of tiny models: of images with levels, of points of a plane, of typed rows."""
    from musigma.explore import Explorer

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (60, 1, 8, 8), np.uint8)
    names = {"labels": np.arange(60) % 3, "label_names": ("a", "b", "c")}
    images = musigma.data.Dataset(x, name="digits", **names)
    ladder = randomized(musigma.build("ladder", Spec((1, 8, 8), 256), width=8))
    path = folder / "model.safetensors"
    save(ladder, path)
    state = {
        "state": "finished", "share": 1.0, "step": 3, "best": {"bits_per_dim": 5.0, "step": 3},
        "train": [[1, 7.0], [2, 6.0], [3, 5.5]], "validation": [[3, 5.0]], "kl": [1.0, 0.1],
        "setbacks": [], "skips": [], "warnings": [{"step": 3, "message": "one latent is unused"}],
    }  # fmt: skip
    log = {"training": lambda: state, "training_lines": "# the lines that read the log of the run"}
    yield "image", Explorer(ladder, images, path=path, **log)

    x = random.normal(size=(200, 2)).astype(np.float32)
    maf = musigma.build("maf", Spec((2,), columns=("u", "v")), hidden=8, depth=1)
    yield "plane", Explorer(randomized(maf), musigma.data.Dataset(x, columns=("u", "v")))

    lines = [f"{20 + i % 30},{'fm'[i % 2]},{1.5 + i % 7 / 10}" for i in range(60)]
    (folder / "people.csv").write_text("age,sex,height\n" + "\n".join(lines))
    people = musigma.data.load(folder / "people.csv", schema="infer")
    yield "rows", Explorer(randomized(musigma.build("table", people.spec(), hidden=8)), people)


@contextlib.contextmanager
def serving(explorer):
    """The address of the page of an explorer, which a thread serves."""
    import uvicorn

    from musigma.explore import server

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(server.application(explorer), log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    running.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """The addresses of three pages."""
    pytest.importorskip("fastapi", reason="pip install 'musigma[explore]'")
    with contextlib.ExitStack() as stack:
        made = models(tmp_path_factory.mktemp("models"))
        yield {name: stack.enter_context(serving(explorer)) for name, explorer in made}


@pytest.fixture(scope="module")
def browser():
    """A browser without a window."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        browser = launched(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an image, and with a file that is none."""
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (50, 40), (250, 250, 250)).save(folder / "upload.png")
    (folder / "upload.txt").write_text("this is no image")
    return folder


def launched(playwright):
    return playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


# --- what is done, and what is checked -----------------------------------------------------------


class Visit:
    """One open page, and what went wrong in it.

    Attributes:
        faults: Errors of the console and of scripts, requests to other hosts, and more.
        refused: Whether requests are made that the server refuses.
    """

    def __init__(self, browser, url, folder):
        self.browser, self.url, self.folder = browser, url, folder
        self.faults, self.refused = [], False
        self.page = browser.new_page(viewport={"width": 1200, "height": 900})
        self.page.set_default_timeout(WAIT)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        self.page.on("request", self._request)

    def _console(self, message):
        expected = self.refused and "400" in message.text
        if message.type in ("error", "warning") and not expected:
            self.faults.append(f"console: {message.text}")

    def _request(self, request):
        if not request.url.startswith((self.url, "blob:")):
            self.faults.append(f"request: {request.url}")

    def open(self, name):
        self.page.goto(f"{self.url}#{name}")
        self.until(f"document.querySelector('nav a[data-view={name}][aria-current]') !== null")

    def until(self, expression):
        """Wait until an expression is true, which the policy of the page keeps it from polling."""
        end = time.monotonic() + WAIT / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)

    def settled(self):
        """Wait until no request is under way and the code has not changed for a moment."""
        self.until(f"{CODE}.length > 30")
        before = None
        while before != (before := self.page.evaluate(f"location.hash + {CODE}")):
            self.page.wait_for_timeout(350)

    def check_picture(self, path):
        """Save the view as a PNG."""
        with self.page.expect_download() as download:
            self.page.click("#save")
        download.value.save_as(path)
        with Image.open(path) as image:
            levels = np.asarray(image.convert("L"))
        if levels.shape[1] < 800 or levels.std() < 5:
            self.faults.append(f"png: {path.name} has shape {levels.shape}, or is empty")

    def check_link(self):
        """Open the address in another page."""
        address, wanted = self.page.evaluate(f"[location.href, {CODE}]")
        other = Visit(self.browser, self.url, self.folder)
        other.page.goto(address)
        end = time.monotonic() + WAIT / 1000
        while (got := other.page.evaluate(CODE)) != wanted and time.monotonic() < end:
            other.page.wait_for_timeout(50)
        other.page.close()
        if got != wanted:
            self.faults.append(f"link: {address} does not restore the view")

    def check_access(self):
        """Run axe-core; only findings that are serious are faults."""
        for finding in self.page.evaluate("axe.run(document)")["violations"]:
            if finding["impact"] in SERIOUS:
                where = [node["html"][:120] for node in finding["nodes"][:3]]
                self.faults.append(f"axe: {finding['id']}: {finding['help']}: {where}")

    def check_schemes(self):
        """Run all rules of axe-core in both color schemes."""
        import axe_playwright_python

        source = Path(axe_playwright_python.__file__).with_name("axe.min.js")
        self.page.evaluate(source.read_text(encoding="utf-8") + "; 0")
        for scheme in ("dark", "light"):
            self.page.emulate_media(color_scheme=scheme)
            self.page.wait_for_timeout(50)
            self.check_access()

    def check_phone(self):
        """The view is not wider than a phone."""
        self.page.set_viewport_size({"width": 390, "height": 844})
        self.page.wait_for_timeout(150)
        width = self.page.evaluate("document.documentElement.scrollWidth")
        if width > 390:
            self.faults.append(f"phone: the view is {width} pixels wide")

    # --- views -----------------------------------------------------------------------------------

    def one(self):
        page = self.page
        page.wait_for_selector(".latent")
        page.click("text=→")
        self.until("document.querySelector('.index').value === '1'")
        page.click("text=Draw again")
        slider = page.locator(".latent input[type=range]").first
        for _ in range(3):
            slider.press("ArrowRight")
        page.wait_for_selector(".latent.set")
        page.locator(".latent button", has_text="off").nth(1).click()
        self.until("document.querySelectorAll('.latent.set').length === 2")
        page.locator(".latent button:not([disabled])", has_text="×").last.click()
        self.until("document.querySelectorAll('.latent.set').length === 1")
        if (upload := page.locator("input[type=file]")).count():
            self.refused = True
            upload.set_input_files(self.folder / "upload.txt")
            page.wait_for_selector("#error:not([hidden]) >> text=upload.txt")
            upload.set_input_files(self.folder / "upload.png")
            page.wait_for_selector("text=your own")
            self.refused = False
        page.locator(".index").fill("3")
        page.locator(".index").press("Enter")
        self.until("!location.hash.includes('upload') && location.hash.includes('index=3')")

    def rows(self):
        page = self.page
        page.wait_for_selector(".columns-list figure")
        self.until("document.querySelector('.cells input').value !== ''")
        page.click("text=Type a row")
        field = page.locator(".cells input").first
        field.fill("41")
        page.click("text=Use this row")
        page.wait_for_selector("text=your own")
        self.until("/ = 41/.test(document.querySelector('.columns-list').textContent)")

    def plane(self):
        self.page.wait_for_selector("text=1,000 draws of the model")
        self.page.wait_for_selector("canvas.plane")
        self.until("document.querySelectorAll('.cells input')[1].value === '-0.85792637'")
        self.rows()

    def traverse(self):
        page = self.page
        page.wait_for_selector(".slide")
        sliders = page.locator(".slide input")
        for _ in range(5):
            sliders.first.press("ArrowRight")
        self.until("document.querySelector('.slide output').textContent === '0.10'")
        sliders.last.press("ArrowLeft")
        self.until("location.hash.includes('move=')")
        page.click("text=Undo")
        self.until("!location.hash.includes('move=') && location.hash.includes('set=')")
        page.click("text=Reset")
        self.until("!location.hash.includes('set=')")
        page.locator("main select").first.select_option("example")
        page.click("text=Random >> nth=0")
        page.wait_for_selector(".gallery canvas, .plane")

    def map(self):
        page = self.page
        self.until(MAPPED)
        canvas = page.locator("canvas.map")
        box = canvas.bounding_box()
        for share in np.linspace(0.2, 0.8, 90):  # until an example is under the pointer
            page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
            if page.locator("text=Open it as one input").count():
                break
            page.wait_for_timeout(30)
        page.wait_for_selector("text=Open it as one input")
        page.locator("select").nth(1).select_option("score")
        page.wait_for_selector("text=unlikely")
        page.mouse.wheel(0, -120)
        self.until("location.hash.includes('box=')")
        page.mouse.down()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.3 * box["height"], steps=4)
        page.mouse.up()
        assert "at=" not in page.evaluate("location.hash")  # a drag is no click
        page.click("text=Show all")
        self.until("!location.hash.includes('box=')")
        for x, y in ((0.35, 0.55), (0.65, 0.4)):
            canvas.click(position={"x": x * box["width"], "y": y * box["height"]})
        self.until("document.querySelectorAll('.card figure, .card td').length >= 2")
        self.until("/at=[^&]*(;|%3B)/.test(location.hash)")

    def levels(self):
        self.page.wait_for_selector(".level")
        self.page.locator("text=Redraw this level").last.click()
        self.page.click("text=Draw again")
        self.until("/level=\\d/.test(location.hash) && location.hash.includes('seed=1')")
        self.page.locator("text=Redraw this level").first.press("Enter")
        self.page.wait_for_selector("[aria-pressed=true]:focus")  # which was made anew

    def anomalies(self):
        page = self.page
        page.wait_for_selector(".ranked tbody tr")
        page.locator("select[name=rate]").select_option("0.2")
        page.wait_for_selector(".flagged")
        page.click("text=Less strange ones")
        self.until("document.querySelector('.ranked td').textContent === '25'")
        page.click("text=Stranger ones")
        self.until("document.querySelector('.ranked td').textContent === '1'")

    def head(self):
        page = self.page
        page.locator("select[name=layout]").select_option("interleaved")
        page.wait_for_selector("text=interleaved mean-first")
        page.locator("select[name=kl]").select_option("log_std")
        page.wait_for_selector("text=They agree")
        page.locator("select[name=kl]").select_option("log_var")
        page.wait_for_selector("text=the KL charges for")

    def training(self):
        self.page.wait_for_selector(".problems li")


# --- the tests -----------------------------------------------------------------------------------

VISITS = [
    *(("image", name, name) for name in
      ("one", "traverse", "map", "levels", "anomalies", "head", "training")),
    ("plane", "one", "plane"),
    pytest.param("plane", "traverse", "traverse", marks=pytest.mark.slow),
    ("rows", "one", "rows"),
    pytest.param("rows", "anomalies", "anomalies", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("site", "name", "use"), VISITS, ids=lambda part: part)
def test_a_view_works_and_can_be_kept_and_read_by_all(site, name, use, sites, browser, files):
    if find_spec("axe_playwright_python") is None:
        pytest.skip("there is no axe-core: pip install axe-playwright-python")
    visit = Visit(browser, sites[site], files)
    visit.open(name)
    getattr(visit, use)()
    visit.settled()
    visit.check_schemes()
    visit.settled()
    visit.check_picture(files / f"{site}-{name}.png")
    if "upload" not in visit.page.url:
        visit.check_link()
    visit.check_phone()
    visit.page.close()
    assert visit.faults == []


def test_answers_to_older_questions_leave_an_error(sites, browser, files):
    visit, held = Visit(browser, sites["image"], files), []
    page = visit.page
    visit.open("one")
    visit.settled()
    page.route("**/api/one?*", lambda route: held.append(route))
    page.locator(".index").fill("3")
    page.locator(".index").press("Enter")
    page.wait_for_timeout(50)
    visit.refused = True
    page.locator("input[type=file]").set_input_files(files / "upload.txt")
    page.wait_for_selector("#error:not([hidden]) >> text=upload.txt")
    (question,) = held
    with page.expect_response("**/api/one?*"):
        question.continue_()
    page.wait_for_timeout(50)
    assert page.is_visible("#error")
    page.unroute("**/api/one?*")
    page.locator(".index").fill("4")
    page.locator(".index").press("Enter")
    page.wait_for_selector("#error", state="hidden")
    page.close()
    assert visit.faults == []


class Held:
    """The first question of a kind, which is answered later."""

    def __init__(self, page, name, act):
        self.page, self.pattern, self.first = page, f"**/api/{name}?*", None
        page.route(self.pattern, self.hold)
        with page.expect_request(self.pattern):
            act()

    def hold(self, route):
        if self.first is None:
            self.first = route
        else:
            route.continue_()

    def answer(self, **other):
        """Let the server answer, or answer something else."""
        with self.page.expect_response(self.pattern):
            self.first.fulfill(**other) if other else self.first.continue_()
        self.page.wait_for_timeout(50)


def test_late_answers_change_nothing(sites, browser, files):
    visit = Visit(browser, sites["image"], files)
    page = visit.page
    visit.open("map")
    visit.until(MAPPED)
    there = {"position": {"x": 100, "y": 100}}
    held = Held(page, "at", lambda: page.locator("canvas.map").click(**there))
    page.click("text=Clear")
    page.wait_for_selector("text=Click the map.")
    held.answer()
    assert page.is_visible("text=Click the map.")

    visit.open("one")
    page.wait_for_selector(".latent")
    visit.settled()
    held = Held(page, "decode", lambda: page.locator(".latent input").first.press("ArrowRight"))
    page.click("text=→")
    visit.settled()
    picture = "document.querySelectorAll('.pictures canvas')[2].toDataURL()"
    before = page.evaluate(picture)
    held.answer()
    assert page.evaluate(picture) == before  # it is not the one of the example before

    held = Held(page, "anomalies", lambda: visit.open("anomalies"))
    visit.open("head")
    visit.refused = True
    held.answer(status=400, json={"message": "late"})
    assert not page.is_visible("#error")
    page.close()
    assert visit.faults == []


def test_a_link_that_is_opened_in_the_page_shows_its_map(sites, browser, files):
    visit = Visit(browser, sites["image"], files)
    page = visit.page
    visit.open("map")
    visit.until(MAPPED)
    axes = page.locator("main select").first
    pair = axes.locator("option").nth(3).get_attribute("value")
    with page.expect_response(lambda response: "api/map" in response.url) as asked:
        page.evaluate("pair => { location.hash = `map?axes=${pair}&color=score`; }", pair)
    assert f"axes={pair.replace(',', '%2C')}&color=score" in asked.value.url
    page.wait_for_selector("text=unlikely")
    assert axes.input_value() == pair
    page.close()
    assert visit.faults == []


@pytest.mark.slow
def test_latents_that_are_unfolded_can_be_folded(sites, browser, files):
    visit = Visit(browser, sites["image"], files)
    page = visit.page

    def few(route):  # as many as are listed
        response = route.fetch()
        route.fulfill(response=response, json={**response.json(), "dims": 48})

    page.route("**/api/about?*", few)
    visit.open("one")
    page.click("text=Show 48")
    page.wait_for_selector("text=Show fewer")
    assert page.locator(".latent").count() == 48
    visit.settled()
    visit.check_link()
    page.click("text=Show fewer")
    visit.until("document.querySelectorAll('.latent').length === 10")
    page.close()
    assert visit.faults == []


@pytest.mark.slow
def test_examples_beyond_the_last_one_are_an_empty_list(sites, browser, files):
    visit = Visit(browser, sites["image"], files)
    visit.page.goto(f"{visit.url}#anomalies?first=999")
    visit.page.wait_for_selector("text=of 60 examples are flagged")
    visit.page.close()
    assert visit.faults == []


@pytest.mark.slow
def test_a_run_that_is_silent_is_asked_again(sites, browser, files):
    visit, answers = Visit(browser, sites["image"], files), []
    page = visit.page

    def answer(route):
        response = route.fetch()
        answers.append({**response.json(), **({} if answers else {"state": "silent"})})
        route.fulfill(response=response, json=answers[-1])

    page.route("**/api/training?*", answer)
    visit.open("training")
    page.wait_for_selector("text=silent, 100 %")
    page.wait_for_selector("text=finished, 100 %")
    for _ in range(2):  # which has two words for a moment, and then its own again
        page.click("#link")
    page.wait_for_timeout(3500)
    assert page.inner_text("#link") == "Copy link"
    page.close()
    assert visit.faults == []


def test_the_keyboard_is_enough(sites, browser, files):
    visit = Visit(browser, sites["image"], files)
    page = visit.page
    visit.open("one")
    page.wait_for_selector(".latent")

    def tab_to(selector):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"{selector} cannot be reached")

    tab_to("nav a[data-view=map]")
    page.keyboard.press("Enter")
    visit.until(MAPPED)
    tab_to("canvas.map")
    for key in ("ArrowRight", "ArrowUp", "Enter", "ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    visit.until("/at=[^&]*(;|%3B)/.test(location.hash)")
    page.keyboard.press("+")
    visit.until("location.hash.includes('box=')")
    page.keyboard.press("0")
    visit.until("!location.hash.includes('box=')")
    tab_to("#python summary")
    page.keyboard.press("Enter")
    visit.until("document.querySelector('#python').open")
    page.close()
    assert visit.faults == []


def test_a_file_that_is_dropped_is_an_upload(sites, browser, files):
    visit = Visit(browser, sites["image"], files)
    visit.open("one")
    visit.page.wait_for_selector(".latent")
    visit.page.evaluate(
        """async () => {
          const canvas = document.createElement("canvas");
          canvas.width = canvas.height = 20;
          canvas.getContext("2d").fillRect(0, 0, 20, 20);
          const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg"));
          const held = new DataTransfer();
          held.items.add(new File([blob], "mine.jpg"));
          dispatchEvent(new DragEvent("drop", { dataTransfer: held, cancelable: true }));
        }"""
    )
    visit.page.wait_for_selector("text=your own")
    visit.page.close()
    assert visit.faults == []


# --- a page that is served -----------------------------------------------------------------------


def pictures(url, folder):
    """Save a picture of each view of a page."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = launched(playwright)
        visit = Visit(browser, url, folder)
        page = visit.page
        page.goto(url)
        page.wait_for_selector("nav a[aria-current]")
        names = [link.get_attribute("data-view") for link in page.query_selector_all("nav a")]
        for name in names:
            visit.open(name)
            if name == "map":
                visit.until(MAPPED)
                box = page.locator("canvas.map").bounding_box()
                for x, y in ((0.35, 0.55), (0.65, 0.4)):
                    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
            visit.settled()
            page.wait_for_timeout(2000)
            visit.settled()
            page.mouse.move(0, 0)
            page.screenshot(path=folder / f"explore-{name}.png", full_page=True)
        browser.close()
    return visit.faults


@pytest.mark.slow
def test_the_command_serves_the_page(tmp_path, browser):
    data = musigma.data.Dataset(
        np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8),
        labels=np.arange(40) % 2,
    )
    np.savez(tmp_path / "digits.npz", x=data.x, labels=data.labels)
    torch.manual_seed(0)
    model = musigma.build("vae", Spec((1, 8, 8), 256), net="mlp", latents=4, width=16)
    save(randomized(model), tmp_path / "model.safetensors")
    words = [tmp_path / "model.safetensors", "--data", tmp_path / "digits.npz", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "musigma", "explore", *words, "--json"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        text = ""
        while not text.rstrip().endswith("}"):
            text += process.stdout.readline()
        url = json.loads(text)["url"]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        visit = Visit(browser, url, tmp_path)
        visit.open("one")
        visit.page.wait_for_selector(".latent")
        process.send_signal(signal.SIGINT)
        process.wait(20)
        visit.refused = True
        visit.page.click("text=→")
        visit.page.wait_for_selector("text=The server does not answer")
        visit.page.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    for fault in pictures(sys.argv[1], Path(sys.argv[2])):
        print(fault)
