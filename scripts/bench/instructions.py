#!/usr/bin/env python3
"""
Count what synchronous Django costs on the fork and without it.

    python3 scripts/bench/instructions.py
    python3 scripts/bench/instructions.py --databases sqlite --rounds 1

Run the pieces of micro.py (a get(), a save(), an empty atomic(), ...) under
valgrind's callgrind, with stock Django and with the fork, in the same
environment. The pieces use SQLite in memory, and PostgreSQL: one started for
this, or what DATABASE_URL names. Nothing is timed, so the machine needn't be
quiet: callgrind counts the instructions that the process executes, outside of
the kernel. What n repetitions need is taken off what 2n need. Hashes aren't
random, and nothing is garbage-collected meanwhile.

The pieces are counted several times, as the addresses of objects differ, and
what a dictionary or the allocator does with them. The figure is the median,
and the ratio is shown with its least and greatest.

Write instructions.json and instructions.md into docs/benchmarks/. It takes
about ten minutes.

Exit status: 0 no piece takes more than the limit allows, 1 one does, 2 it
can't run here; the error says what to do.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from statistics import median

BENCH = pathlib.Path(__file__).resolve().parent
# own_server.py and others are used as they are by the other scripts.
sys.path.insert(1, str(BENCH.parent))

import environments  # noqa: E402
import postgres  # noqa: E402
import report  # noqa: E402
from chain import (  # noqa: E402
    ChainError,
    Unusable,
    Upstream,
    argument_parser,
    run_script,
)
from contenders import contenders  # noqa: E402
from own_server import ServerError, ending, unwind_on_termination  # noqa: E402
from report import DATABASES  # noqa: E402

# Of the instructions that stock Django executes.
LIMIT = 0.01

# Each piece writes down what came before it, itself, and itself twice.
DUMPS = 3

# In seconds, for all pieces.
PATIENCE = 900

HINT = (
    "There is no valgrind. On Debian and Ubuntu, install the package valgrind; its "
    "tool callgrind counts."
)

started = time.monotonic()


def progress(message):
    """Show what happens next, or has happened."""
    print(f"[{time.monotonic() - started:5.0f} s] {message}", flush=True)


def count(python, path, url, repetitions, log):
    """Return the instructions for one repetition of each piece, by name."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONHASHSEED": "0",
    }
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *("valgrind", "--quiet", "--tool=callgrind", "--dump-before=getppid"),
            *(f"--callgrind-out-file={directory}/out", python, BENCH / "micro.py"),
            *(url, str(repetitions)),
        ]
        process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True
        )
        with ending(process):
            try:
                names = process.communicate(timeout=PATIENCE)[0].splitlines()
            except subprocess.TimeoutExpired:
                raise ChainError(f"micro.py takes more than {PATIENCE} s.") from None
        if process.returncode:
            log.seek(0)
            raise ChainError(f"micro.py failed:\n{log.read()[-2000:]}")
        return {
            name: per_repetition(pathlib.Path(directory), number, repetitions)
            for number, name in enumerate(names)
        }


def per_repetition(directory, number, repetitions):
    once, twice = (
        dumped((directory / f"out.{DUMPS * number + nth}").read_text())
        for nth in (2, 3)
    )
    return (twice - once) / repetitions


def dumped(text):
    """Return the instructions that a file of callgrind's tells of."""
    if (found := re.search(r"^summary: (\d+)$", text, re.M)) is None:
        raise ChainError("callgrind has written no summary.")
    return int(found[1])


def page(results):
    """Give the lines of the page in Markdown."""
    yield "# Instructions executed by synchronous Django"
    yield ""
    yield (
        "Counted by `scripts/bench/instructions.py` with callgrind: what one of each "
        f"executes outside of the kernel, the median of {results['rounds']} counts. "
        "The difference is that of the fork to stock Django, with the least and the "
        "greatest in parentheses."
    )
    for database, pieces in results["databases"].items():
        yield ""
        yield f"## {DATABASES[database]}"
        yield ""
        yield from report.row("", "Stock Django", "Fork", "More (%)")
        yield from report.row("-", "-:", "-:", "-:")
        for name, counts in pieces.items():
            yield from report.row(
                name,
                *(f"{median(counts[tree]):,.0f}" for tree in ("stock", "fork")),
                report.spread([change - 1 for change in changes(counts)], 2, 100),
            )


def changes(counts):
    """Return the ratios of the fork to stock Django, round by round."""
    return [fork / stock for stock, fork in zip(counts["stock"], counts["fork"])]


def parse():
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--repetitions", type=int, default=20, help="default: 20")
    parser.add_argument(
        "--databases", nargs="+", choices=list(DATABASES), default=list(DATABASES)
    )
    parser.add_argument(
        "--tree",
        type=pathlib.Path,
        help="count this tree (for example build/django, while editing it) instead "
        "of what the series makes",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=environments.OUTPUT,
        help="default: docs/benchmarks",
    )
    parser.add_argument(
        "--cache",
        type=pathlib.Path,
        default=environments.CACHE,
        help="default: build/bench",
    )
    options = parser.parse_args()
    options.cache = options.cache.resolve()
    options.tree = options.tree and options.tree.resolve()
    return options


def server(options):
    """Return a context manager that gives the URL of PostgreSQL, if needed."""
    if "postgresql" not in options.databases:
        return contextlib.nullcontext()
    path = None
    if not os.environ.get("DATABASE_URL"):
        path = [str(environments.server_binaries(options.cache, progress))]
    return postgres.server(path)


def count_all(options):
    """Return the counts by database, piece and tree: one for each round."""
    fork = contenders(f"Django==={Upstream.load().version}")["fork-sync"]
    python = environments.environment(options.cache, fork.requirements, progress)
    tree = options.tree or environments.fork(options.cache, progress)
    found = {}
    with (
        tempfile.TemporaryFile("w+") as log,
        server(options) as url,
    ):
        for database, number in itertools.product(
            options.databases, range(options.rounds)
        ):
            for name, paths in (("stock", []), ("fork", [tree])):
                progress(f"{DATABASES[database]}, round {number + 1}: {name}")
                address = url if database == "postgresql" else ""
                counts = count(python, paths, address, options.repetitions, log)
                for piece, value in counts.items():
                    by_tree = found.setdefault(database, {}).setdefault(piece, {})
                    by_tree.setdefault(name, []).append(value)
    return tree.name, found


def main():
    options = parse()
    if shutil.which("valgrind") is None:
        raise Unusable(HINT)
    unwind_on_termination()
    try:
        tree, found = count_all(options)
    except (ServerError, environments.NotInstalled) as error:
        raise Unusable(str(error)) from error
    results = {"rounds": options.rounds, "tree": tree, "databases": found}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "instructions.json").write_text(
        json.dumps(results, indent=1) + "\n"
    )
    lines = "\n".join(page(results)) + "\n"
    (options.output / "instructions.md").write_text(lines)
    print()
    print(lines)
    above = [
        f"{DATABASES[database]}, {name}"
        for database, pieces in found.items()
        for name, counts in pieces.items()
        if median(changes(counts)) > 1 + LIMIT
    ]
    if above:
        raise ChainError(f"More than {LIMIT:.0%} more: {'; '.join(above)}.")


if __name__ == "__main__":
    run_script(main)
