"""JupyterLab on the first notebook of a folder, for who has the token: `make lab`, or `python -m course_utils lab DIR`."""

import secrets
from pathlib import Path

# No news, no search for updates, and no question whether you want them.
SETTINGS = Path(__file__).with_name("jupyterlab")


def open_lab(folder):
    """Start JupyterLab in `folder` on its first notebook and wait for its end. Raises `FileNotFoundError` where there is none.

    Whatever a configuration says, it listens on loopback and asks for a token. It looks for no news or updates, and does not ask
    whether it may.
    """
    folder = Path(folder).expanduser().resolve()
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise FileNotFoundError(
            f"there are no notebooks in {folder}: `python -m course_utils start DIR` copies them to a folder"
        )
    from jupyterlab.labapp import main

    # Made here, so that no configuration can leave it empty, and inside the process, so that no list of processes shows it.
    # Jupyter prints a token only when it made it itself.
    token = secrets.token_hex(24)
    print("token:", token, flush=True)
    main(
        [
            str(notebooks[0]),
            f"--ServerApp.root_dir={folder}",
            "--ServerApp.ip=127.0.0.1",
            f"--IdentityProvider.token={token}",
            f"--LabApp.app_settings_dir={SETTINGS}",
        ]
    )
