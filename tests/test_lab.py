"""`make lab` lets in who has the token, and only from this machine, whatever else the user's Jupyter is told."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import psutil
import pytest

from tests.test_environment import course_in, environment
from tests.toys import ROOT, write_notebook

pytestmark = pytest.mark.skipif(os.name != "posix", reason="stops the server by a POSIX signal to its group")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The server that `make lab` starts for somebody whose configuration opens it to the world; what it tells about itself."""
    folder = tmp_path_factory.mktemp("lab")
    course = course_in(folder / "my course")
    write_notebook(course / "notebooks" / "00_toy.ipynb", "print(1)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = {"ip": "0.0.0.0", "port": port, "port_retries": 0, "open_browser": False, "allow_root": True, "token": ""}
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    places += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    own = {name: str(folder / name.lower()) for name in places}
    (folder / "jupyter_config_dir").mkdir()
    (folder / "jupyter_config_dir" / "jupyter_server_config.json").write_text(
        json.dumps({"ServerApp": server, "IdentityProvider": {"token": ""}})
    )
    log = folder / "lab.log"
    with open(log, "w") as file:
        make = subprocess.Popen(
            ["make", "lab", f"PY={sys.executable}", "INSTALLED=installed"],
            cwd=course,
            env=environment() | own | {"BROWSER": shutil.which("true"), "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 60
        while not (facts := list((folder / "jupyter_runtime_dir").glob("jpserver-*.json"))) or not answers(port):
            assert make.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield SimpleNamespace(**json.loads(facts[0].read_text()), log=log)
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
    assert [entry["name"] for entry in listing["content"]] == ["00_toy.ipynb"]


def test_it_listens_on_loopback_alone(lab):
    server = psutil.Process(lab.pid)
    listening = [c.laddr for c in server.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    assert lab.port in [address.port for address in listening]
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_the_token_is_on_the_screen_and_in_no_list_of_processes(lab):
    assert f"token: {lab.token}\n" in lab.log.read_text()
    everybody = [psutil.Process(lab.pid), *psutil.Process(lab.pid).parents()]
    assert not [word for process in everybody for word in process.cmdline() if lab.token in word]


def test_another_start_has_another_token():
    command = subprocess.run(
        ["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=60
    )
    assert "secrets.token_hex(24)" in command.stdout
