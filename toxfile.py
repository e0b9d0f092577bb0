"""Extend tox: say what to do if a Python that tox.ini names is missing."""

import logging
import subprocess

from tox.plugin import impl

PYTHONS = ["python3.12", "python3.13"]


def is_found(name):
    """Return whether a Python can be run; a shim of pyenv may refuse to."""
    try:
        return subprocess.run([name, "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


@impl
def tox_add_core_config(core_conf, state):
    """Check the interpreters before anything is run."""
    missing = [name for name in PYTHONS if not is_found(name)]
    if missing:
        logging.warning(
            "Not found: %s. Environments that need it will fail. With pyenv, run "
            '"pyenv install 3.12 3.13" (.python-version selects them here), or run '
            'only some environments, for example "tox -e py313-sqlite".',
            ", ".join(missing),
        )
