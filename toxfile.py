"""Extend tox: say what to do if something that tox.ini needs is missing."""

import atexit
import logging
import os
import pathlib
import shutil
import subprocess
import sys
from ctypes.util import find_library

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


def why_not_psycopg(implementation, python):
    """Return what an implementation of psycopg lacks, or None."""
    if implementation == "python" and find_library("pq") is None:
        return 'There is no libpq. On Debian, run "apt-get install libpq5".'
    if implementation != "c":
        return None
    programs = [name for name in ("cc", "pg_config") if shutil.which(name) is None]
    if programs:
        return (
            f"{' and '.join(programs)} not found, to build psycopg-c. On Debian, run "
            '"apt-get install gcc libpq-dev".'
        )
    if not runs(python, HAS_HEADERS):
        return f"{python} lacks its headers, to build psycopg-c."
    return None


def why_not(name):
    """Return what an environment lacks to be run, or None."""
    factors = name.split("-")
    python = f"python3.{factors[0].removeprefix('py3')}"
    if factors[1:] == ["mariadb"]:
        return why_not_mariadb(python)
    if factors[1:2] == ["native"]:
        return why_not_psycopg(factors[-1], python)
    return None


def check(tox_env):
    """
    Leave an environment out if it can't have what it tests, and say so once
    more after tox's summary. Where CI is set, it fails.
    """
    reason = why_not(tox_env.conf.name)
    if reason is None:
        return
    message = f"{tox_env.conf.name}: NOT RUN: {reason}"
    atexit.register(print, message, flush=True)
    raise (Fail if os.environ.get("CI") else Skip)(reason)


@impl
def tox_on_install(tox_env, arguments, section, of_type):
    """Check before mysqlclient or psycopg-c is built."""
    check(tox_env)


@impl
def tox_before_run_commands(tox_env):
    """Check also if it was built in an earlier run."""
    check(tox_env)
