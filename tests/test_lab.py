"""`make lab` lets in who has the token, and only from this machine, whatever else the user's Jupyter is told; it opens the first
notebook with the Python that has the course, and asks nobody for news.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from course_utils import lab as course_lab
from tests.test_browser import browser  # noqa: F401  a fixture
from tests.test_environment import course_in, environment
from tests.toys import ROOT, write_notebook

pytestmark = pytest.mark.skipif(os.name != "posix", reason="stops the server by a POSIX signal to its group")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The server that `make lab` starts for somebody whose configuration opens it to the world; what it tells about itself."""
    folder = tmp_path_factory.mktemp("lab")
    course = course_in(folder / "my course")
    for name in ("00_toy", "01_toy"):
        write_notebook(course / "notebooks" / f"{name}.ipynb", "print(1)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = {"ip": "0.0.0.0", "port": port, "port_retries": 0, "open_browser": True, "allow_root": True, "token": ""}
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    places += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    own = {name: str(folder / name.lower()) for name in places}
    (folder / "jupyter_config_dir").mkdir()
    (folder / "jupyter_config_dir" / "jupyter_server_config.json").write_text(
        json.dumps({"ServerApp": server, "IdentityProvider": {"token": ""}})
    )
    # A kernel of the user's own takes the name of ours, as `ipykernel install --user` makes it.
    shadow = folder / "jupyter_data_dir" / "kernels" / "python3"
    shadow.mkdir(parents=True)
    (shadow / "kernel.json").write_text(json.dumps({"argv": ["other"], "display_name": "Other", "language": "python"}))
    (folder / "opened").mkdir()
    opener = folder / "opener"
    opener.write_text(f'#!/bin/sh\necho "$1" > "{folder}/opened/address"\n')
    opener.chmod(0o755)
    log = folder / "lab.log"
    with open(log, "w") as file:
        make = subprocess.Popen(
            ["make", "lab", f"PY={sys.executable}", "INSTALLED=installed"],
            cwd=course,
            env=environment() | own | {"BROWSER": f"'{opener}' %s", "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 60
        while not (facts := list((folder / "jupyter_runtime_dir").glob("jpserver-*.json"))) or not answers(port):
            assert make.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield SimpleNamespace(**json.loads(facts[0].read_text()), log=log, opened=folder / "opened" / "address")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(make.pid, signal.SIGKILL)
        make.wait()


def answers(port):
    with contextlib.suppress(OSError):
        return ask(port, "api").status
    return False


def ask(port, path, token=None):
    """Return the answer, that of the page one is led to; an error of HTTP is an answer too."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}")
    if token is not None:
        request.add_header("Authorization", f"token {token}")
    try:
        return urllib.request.urlopen(request, timeout=10)
    except urllib.error.HTTPError as error:
        return error


@pytest.mark.parametrize("token", [None, "", "wrong"])
def test_without_the_token_nobody_gets_in(lab, token):
    assert ask(lab.port, "api/contents", token).status == 403
    assert "/login?" in ask(lab.port, "lab", token).url


def test_with_the_token_the_notebooks_are_there(lab):
    assert len(lab.token) >= 32
    listing = json.load(ask(lab.port, "api/contents", lab.token))
    assert sorted(entry["name"] for entry in listing["content"]) == ["00_toy.ipynb", "01_toy.ipynb"]


def test_it_listens_on_loopback_alone(lab):
    server = psutil.Process(lab.pid)
    listening = [c.laddr for c in server.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    assert lab.port in [address.port for address in listening]
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_the_token_is_on_the_screen_and_in_no_list_of_processes(lab):
    assert f"token: {lab.token}\n" in lab.log.read_text()
    everybody = [psutil.Process(lab.pid), *psutil.Process(lab.pid).parents()]
    assert not [word for process in everybody for word in process.cmdline() if lab.token in word]


def test_it_opens_the_first_notebook(lab):
    deadline = time.monotonic() + 20
    while not lab.opened.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    leads_to = Path(lab.opened.read_text().strip().removeprefix("file://")).read_text()
    assert f"/lab/tree/00_toy.ipynb?token={lab.token}" in leads_to


def test_its_kernel_is_the_python_that_has_the_course(lab):
    request = urllib.request.Request(f"{lab.url}api/kernels", data=b'{"name": "python3"}', method="POST")
    request.add_header("Authorization", f"token {lab.token}")
    urllib.request.urlopen(request, timeout=60)
    kernels = [p.cmdline() for p in psutil.Process(lab.pid).children() if "ipykernel_launcher" in " ".join(p.cmdline())]
    assert [words[0] for words in kernels] == [sys.executable]


def test_news_and_updates_are_off_unless_somebody_turns_them_on(lab):
    setting = json.load(ask(lab.port, "lab/api/settings/@jupyterlab/apputils-extension:notification", lab.token))
    found = {name: setting["schema"]["properties"][name]["default"] for name in ("fetchNews", "checkForUpdates")}
    assert found == {"fetchNews": "false", "checkForUpdates": False}


def test_the_page_does_not_ask_whether_news_are_wanted(lab, browser):  # noqa: F811
    page = browser.new_page()
    elsewhere = []
    page.on("request", lambda request: request.url.startswith(lab.url) or elsewhere.append(request.url))
    page.goto(f"{lab.url}lab?token={lab.token}")
    page.wait_for_selector(".jp-LauncherCard, .jp-Notebook", timeout=60_000)
    page.wait_for_timeout(2_000)  # the question comes when everything else is there
    assert not page.locator(".Toastify__toast").all_inner_texts()
    assert not [address for address in elsewhere if address.startswith("http")]


def test_each_start_has_a_token_of_its_own(tmp_path, monkeypatch, capsys):
    write_notebook(tmp_path / "00_toy.ipynb", "print(1)")
    started = []
    monkeypatch.setattr("jupyterlab.labapp.main", started.append)
    for _ in range(2):
        course_lab.open_lab(tmp_path)
    tokens = [word.partition("=")[2] for words in started for word in words if word.startswith("--IdentityProvider")]
    assert len(set(tokens)) == 2 and all(len(token) >= 32 for token in tokens)
    assert capsys.readouterr().out == "".join(f"token: {token}\n" for token in tokens)


def test_a_folder_without_notebooks_is_not_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="course_utils start DIR"):
        course_lab.open_lab(tmp_path)


def test_make_hands_on_the_folder_of_your_own():
    command = ["make", "-n", "lab", "INSTALLED=installed", "DIR=my folder"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=60).stdout
    assert '-m course_utils lab "my folder"' in printed
