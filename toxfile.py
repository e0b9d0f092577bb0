"""Extend tox: say what to do if something that tox.ini needs is missing."""

import atexit
import logging
import os
import pathlib
import subprocess
import sys

from tox.plugin import impl
from tox.tox_env.errors import Fail, Skip

sys.path.append(str(pathlib.Path(__file__).parent / "scripts"))

import mariadb  # noqa: E402

PYTHONS = ["python3.12", "python3.13"]

# Exit unsuccessfully unless it can include "Python.h".
HAS_HEADERS = """
import pathlib, sysconfig
raise SystemExit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
"""


def runs(name, code=""):
    """Return whether a Python runs code; a shim of pyenv may refuse to."""
    try:
        return subprocess.run([name, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


@impl
def tox_add_core_config(core_conf, state):
    """Check the interpreters before anything is run."""
    missing = [name for name in PYTHONS if not runs(name)]
    if missing:
        logging.warning(
            "Not found: %s. Environments that need it will fail. With pyenv, run "
            '"pyenv install 3.12 3.13" (.python-version selects them here), or run '
            'only some environments, for example "tox -e py313-sqlite".',
            ", ".join(missing),
        )


def why_not_mariadb(python):
    """Return what the tests on MariaDB lack, or None."""
    if packages := mariadb.missing_for_tests():
        return f"MariaDB is not installed. {mariadb.install_hint(packages)}."
    if not runs(python, HAS_HEADERS):
        return f"{python} lacks its headers, to build mysqlclient."
    return None


def check_mariadb(tox_env):
    """
    Leave an environment out if it can't have MariaDB, and say so once more
    after tox's summary. Where CI is set, it fails.
    """
    python, _, database = tox_env.conf.name.partition("-")
    if database != "mariadb":
        return
    reason = why_not_mariadb(f"python3.{python.removeprefix('py3')}")
    if reason is None:
        return
    message = f"{tox_env.conf.name}: NOT RUN: {reason}"
    atexit.register(print, message, flush=True)
    raise (Fail if os.environ.get("CI") else Skip)(reason)


@impl
def tox_on_install(tox_env, arguments, section, of_type):
    """Check before mysqlclient is built."""
    check_mariadb(tox_env)


@impl
def tox_before_run_commands(tox_env):
    """Check also if mysqlclient was built in an earlier run."""
    check_mariadb(tox_env)
