"""In JupyterLab, in a real browser: keys move a widget's control, and the picture and the text on the page change; a click
unfolds an answer of a quiz.

It needs playwright (in the `test` extra) and a Chromium of the system, none is downloaded. Without them it is skipped; where
COURSE_BROWSER=1 is set, as CI does, it fails instead. COURSE_SCREENSHOTS=folder keeps a picture of the page in each theme.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from course_utils import exercises
from course_utils.tools.clean import KERNELSPEC
from tests.explorers import MAKERS
from tests.toys import ROOT, edit, write_notebook

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
RUN_ALL = """async () => {
    const late = new Promise((_, reject) => setTimeout(() => reject(new Error("no kernel after three minutes")), 180000));
    const app = window.jupyterapp;
    await app.restored;
    const { sessionContext } = app.shell.currentWidget.context;
    await Promise.race([sessionContext.ready, late]);
    await Promise.race([sessionContext.session.kernel.info, late]);  // before that a run is dropped in silence
    app.commands.execute("notebook:run-all-cells");
}"""
THEME = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
BYTES = """async picture => {
    const bytes = new Uint8Array(await (await fetch(picture.src)).arrayBuffer());
    return btoa(String.fromCharCode(...bytes));
}"""
# WCAG 2: the contrast of a text with the first background behind it that is not transparent.
CONTRAST = """text => {
    const light = colour => colour.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const rgba = colour => colour.match(/[0-9.]+/g).map(Number);
    let behind = text;
    while ((rgba(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const [dark, bright] = [getComputedStyle(text).color, getComputedStyle(behind).backgroundColor]
        .map(colour => light(rgba(colour).slice(0, 3))).sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
}"""


@contextlib.contextmanager
def chromium():
    """Yield the Chromium of this machine; without one the test is skipped, or fails where a browser is demanded."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        absent("there is no Chromium here; on Debian and Ubuntu: apt-get install chromium fonts-dejavu-core")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def browser():
    with chromium() as browser:
        yield browser


def absent(reason):
    (pytest.fail if os.environ.get("COURSE_BROWSER") == "1" else pytest.skip)(reason)


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a notebook with one of each widget, and a quiz; yields the notebook's address."""
    cells = [*(f"explorers.MAKERS['{name}']()" for name in MAKERS), "exercises.quiz('00.1')"]
    imports = "from course_utils import exercises\nfrom tests import explorers"
    notebook = write_notebook(tmp_path / "lesson" / "widgets.ipynb", imports, *cells)
    edit(notebook, lambda found: found.metadata.update(kernelspec=KERNELSPEC))  # or Lab asks for a kernel
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    folders += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    own = {name: str(tmp_path / name.lower()) for name in folders}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--ServerApp.root_dir={tmp_path / 'lesson'}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"]
    log = tmp_path / "lab.log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            command, env=os.environ | own | {"PYTHONPATH": str(ROOT)}, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}/api?token={token}"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/widgets.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def seen(area):
    """Return what a widget shows: its picture as base64, and its text."""
    return area.locator("img").evaluate(BYTES), area.locator(".widget-html-content").inner_text()


def changed(area, before):
    """Wait until both picture and text are others than `before`; False if they stay."""
    deadline = time.monotonic() + 120
    while not all(new != old for new, old in zip(seen(area), before, strict=True)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_keys_change_picture_and_text_of_every_widget_in_light_and_dark(browser, lab):
    page = browser.new_page(viewport={"width": 1200, "height": 6000})  # tall: cells out of sight are not on the page
    page.set_default_timeout(180_000)  # a busy machine, on which other tests run too
    page.goto(lab)
    page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget")
    page.evaluate(RUN_ALL)
    areas = {name: page.locator(".jp-CodeCell").nth(i).locator(".jp-OutputArea") for i, name in enumerate(MAKERS, 1)}
    stuck = []
    for name, area in areas.items():
        area.locator("img").wait_for()
        before = seen(area)
        if name == "NumberBits":
            area.locator("input").fill("-3")
            area.locator("input").press("Enter")
        else:
            area.locator(".noUi-handle").first.press("ArrowRight")
        stuck += [] if changed(area, before) else [name]
    assert not stuck, "a key did not change both picture and text"

    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        page.evaluate(THEME, theme)
        page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)
        contrasts = {name: area.locator(".widget-html-content p").evaluate(CONTRAST) for name, area in areas.items()}
        assert min(contrasts.values()) >= 4.5, f"{theme}: {contrasts}"
        if folder := os.environ.get("COURSE_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{theme.split()[1].lower()}.png")

    quiz = page.locator(".jp-CodeCell").nth(len(MAKERS) + 1).locator(".jp-OutputArea")
    for option, answer in zip(exercises.quiz("00.1").questions[0].options, quiz.locator("details").all(), strict=True):
        explanation = answer.locator("p")
        assert not explanation.is_visible()
        answer.locator("summary").click()
        explanation.wait_for()
        assert ("Right" if option.right else "No") in explanation.inner_text()
