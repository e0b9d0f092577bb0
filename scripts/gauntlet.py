"""
Try to break the fork, as production would, and look at what the database has.

    python scripts/gauntlet.py
    python scripts/gauntlet.py --minutes 60
    python scripts/gauntlet.py --only money --database postgres --mode native
    python scripts/gauntlet.py --only money --seed 42 --rounds 1
    python scripts/gauntlet.py --mutants

Materialise the tree this repository describes in a temporary directory, start
the database servers (postgres.py and mariadb.py say how, and how to use other
ones), and run rounds in turn until the time is over. Each is a process with a
database of its own. The kinds of rounds are the modules of scripts/rounds/,
and what's checked after each one is in rounds/invariants.py.

What's random is decided by the seed, which is shown: the first violation ends
the run, and the command that replays the round is printed. A round that hangs
is ended, and is a violation. With --mutants, break the fork in known ways
instead, and tell which of them are noticed.

Exit codes: 0 if nothing was violated, 1 if something was, 2 if no round can be
run; the error says what to do.
"""

import contextlib
import itertools
import json
import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

import mariadb
import postgres
import run_tests
import shown
from chain import argument_parser
from own_server import ServerError, unwind_on_termination

SCRIPTS = pathlib.Path(__file__).resolve().parent
WORKER = SCRIPTS / "rounds" / "worker.py"

# The package that has the rounds.
PACKAGE = "rounds"

# The modes of the fork that there are on each database.
MODES = {"postgres": ["thread", "native"], "sqlite": ["thread"], "mariadb": ["thread"]}

# Seconds that a round may take, if there's time for it.
SHORTEST, LONGEST = 5, 60

# Seconds until a round is taken for hanging, after those it was given, which
# it may exceed to find a smaller reproduction. It prints its tasks earlier.
MARGIN = 120

LINES_SHOWN = 100

started = time.monotonic()


class GauntletError(Exception):
    """No round can be run. The message says what to do."""


@dataclass
class Combination:
    """A kind of round on a database in a mode, and what came of it."""

    kind: str
    database: str
    mode: str
    rounds: int = 0
    violations: int = 0
    counts: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.kind} {self.database} {self.mode}"

    def add(self, result):
        self.rounds += 1
        self.violations += result["violation"] is not None
        for name, number in result["counts"].items():
            # What's the most or the longest isn't added up.
            combine = max if name.startswith(("most", "longest")) else int.__add__
            self.counts[name] = combine(self.counts.get(name, 0), number)


class Databases:
    """The servers, started when they're needed."""

    def __init__(self, stack, directory):
        self.stack = stack
        self.directory = directory
        self.servers = {}
        self.numbers = itertools.count(1)

    def start(self, database):
        """Start a server. Raise ServerError if there's none to be had."""
        if database == "postgres":
            url = self.stack.enter_context(postgres.server())
            self.servers[database] = postgres.database_settings(url)
        elif database == "mariadb":
            url = self.stack.enter_context(mariadb.server())
            self.servers[database] = mariadb.database_settings(url)

    @contextlib.contextmanager
    def new(self, database):
        """Create a database, and yield its entry of DATABASES."""
        name = f"gauntlet_{os.getpid()}_{next(self.numbers)}"
        if database == "sqlite":
            with tempfile.TemporaryDirectory(dir=self.directory) as directory:
                path = pathlib.Path(directory, name)
                yield run_tests.sqlite_file(pathlib.Path(directory))["default"] | {
                    "NAME": str(path)
                }
            return
        settings = self.servers[database]
        self.execute(database, f"CREATE DATABASE {name}")
        try:
            yield {**settings, "NAME": name}
        finally:
            # The round may have been killed.
            force = " WITH (FORCE)" if database == "postgres" else ""
            self.execute(database, f"DROP DATABASE {name}{force}")

    def execute(self, database, sql):
        from rounds.base import Observer

        with Observer(self.servers[database]) as observer:
            observer.rows(sql)


def progress(message):
    """Show what happens."""
    print(f"[{time.monotonic() - started:5.0f} s] {message}", flush=True)


def worker_command(*arguments):
    return [sys.executable, str(WORKER), *arguments, "--package", PACKAGE]


def worker_env(tree, **variables):
    return {
        **os.environ,
        "PYTHONPATH": shown.python_path(tree, SCRIPTS),
        "PYTHONFAULTHANDLER": "1",
        **variables,
    }


def describe(tree):
    """Return the kinds of rounds there are, and why others can't be run."""
    process = subprocess.run(
        worker_command("--list"),
        env=worker_env(tree),
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    if process.returncode:
        raise GauntletError("The rounds can't be listed, see above.")
    result = json.loads(process.stdout.splitlines()[-1])
    return result["kinds"], result["errors"]


def combine(kinds, options):
    """Return the Combinations that are asked for."""
    for name in options.only or []:
        if name not in kinds:
            raise GauntletError(
                f"There are no rounds called {name!r}, or they can't be run here. "
                f"There are: {', '.join(sorted(kinds))}."
            )
    combinations = [
        Combination(kind, database, mode)
        for database in MODES
        for mode in MODES[database]
        for kind in sorted(kinds)
        if (not options.only or kind in options.only)
        and (not options.database or database in options.database)
        and options.mode in (None, mode)
        and database in kinds[kind]["databases"]
        and mode in kinds[kind]["modes"]
    ]
    if not combinations:
        raise GauntletError("There are no such rounds. See --list.")
    return combinations


def start_servers(combinations, databases, options):
    """Return the Combinations that can be run, and why others can't."""
    missing = {}
    for database in dict.fromkeys(item.database for item in combinations):
        try:
            databases.start(database)
        except (ServerError, ImportError) as error:
            if database in (options.database or []):
                raise
            missing[database] = str(error)
    return [item for item in combinations if item.database not in missing], missing


def run_round(combination, seed, seconds, tree, databases):
    """Run a round in a process of its own. Return its result."""
    command = worker_command(
        combination.kind,
        *("--seed", str(seed)),
        *("--seconds", f"{seconds:g}"),
        *("--database", combination.database),
        *("--mode", combination.mode),
    )
    with databases.new(combination.database) as settings:
        process = subprocess.Popen(
            command,
            env=worker_env(tree, GAUNTLET_DATABASE=json.dumps(settings)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        hangs = False
        try:
            try:
                output, _ = process.communicate(timeout=seconds + MARGIN)
            except subprocess.TimeoutExpired:
                hangs = True
                shown.end_group(process, signal.SIGABRT)
                output, _ = process.communicate()
        finally:
            shown.end_group(process, signal.SIGTERM)
    return parse_result(output.decode(errors="replace"), process.returncode, hangs)


def parse_result(output, returncode, hangs):
    """Return the result that is the last line of a round's output."""
    *lines, last = output.splitlines() or [""]
    with contextlib.suppress(ValueError, TypeError):
        result = json.loads(last)
        if not hangs and returncode == 0 and "violation" in result:
            if violation := result["violation"]:
                violation["output"] = "\n".join(lines[-LINES_SHOWN:])
            return result
    if hangs:
        message = "The round didn't end in time, and was aborted."
    else:
        message = f"The round ended without a result, with the exit code {returncode}."
    return {
        "counts": {},
        "violation": {
            "message": message,
            "reproduction": "",
            "output": "\n".join([*lines, last][-LINES_SHOWN:]),
        },
    }


def replay_command(combination, seed, seconds, options):
    """Return the command line that runs a round again."""
    command = ["python", "scripts/gauntlet.py", "--only", combination.kind]
    command += ["--database", combination.database, "--mode", combination.mode]
    command += ["--seed", str(seed), "--seconds", f"{seconds:g}", "--rounds", "1"]
    if options.tree:
        command += ["--tree", str(options.tree)]
    return shlex.join(command)


def show_violation(violation, command):
    print(f"\nVIOLATION: {violation['message']}\n", flush=True)
    for part in ("output", "reproduction"):
        if violation[part]:
            print(f"{part.capitalize()}:\n\n{violation[part]}\n")
    print(f"Replay it with:\n\n    {command}\n", flush=True)


def format_counts(counts):
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def show_summary(combinations, left_out):
    """Print what was run, and what wasn't."""
    rows = [("round", "database", "mode", "rounds", "violations", "counts")]
    for item in combinations:
        if item.rounds:
            row = (item.kind, item.database, item.mode, item.rounds, item.violations)
            rows.append((*map(str, row), format_counts(item.counts)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    print()
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("  ".join([*cells, row[-1]]).rstrip())
    for item in combinations:
        if not item.rounds:
            left_out[str(item)] = "The run ended before."
    if left_out:
        print("\nNot run:")
        for name, reason in left_out.items():
            print(f"  {name}: {' '.join(reason.split())}")
    sys.stdout.flush()


def run_rounds(combinations, left_out, options, tree, databases):
    """Run rounds in turn until the time is over. Return the exit code."""
    seed = options.seed
    if seed is None:
        seed = random.randrange(10**6)
    end = time.monotonic() + 60 * options.minutes
    seconds = options.seconds
    if seconds is None:
        seconds = 60 * options.minutes / len(combinations)
        seconds = round(min(max(seconds, SHORTEST), LONGEST))
    violated = False
    for number, item in enumerate(itertools.cycle(combinations)):
        if number == options.rounds or time.monotonic() >= end:
            break
        progress(f"{item}, seed {seed + number}, {seconds:g} s")
        result = run_round(item, seed + number, seconds, tree, databases)
        item.add(result)
        if result["violation"]:
            violated = True
            command = replay_command(item, seed + number, seconds, options)
            show_violation(result["violation"], command)
            break
        progress(f"    {format_counts(result['counts'])}")
    show_summary(combinations, left_out)
    return int(violated)


def parse(arguments):
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--minutes", type=float, default=5, help="how long to go on (default: 5)"
    )
    parser.add_argument("--rounds", type=int, help="stop after so many of them")
    parser.add_argument("--seconds", type=float, help="how long a round takes")
    parser.add_argument("--seed", type=int, help="that of the first round")
    parser.add_argument(
        "--database", action="append", choices=MODES, help="may be repeated"
    )
    parser.add_argument("--mode", choices=["thread", "native"])
    parser.add_argument(
        "--only", action="append", metavar="KIND", help="may be repeated"
    )
    parser.add_argument(
        "--tree",
        type=pathlib.Path,
        help="test this tree (for example build/django, while editing it) instead of "
        "a new one",
    )
    parser.add_argument("--list", action="store_true", help="list the rounds")
    parser.add_argument("--mutants", action="store_true", help="break the fork")
    return parser.parse_args(arguments)


def find_tree(options, directory):
    """Return the tree to test."""
    if options.tree is None:
        tree = directory / "django"
        run_tests.materialise(tree)
        return tree
    tree = options.tree.resolve()
    if not (tree / "django" / "__init__.py").exists():
        raise GauntletError(
            f"{tree} has no Django. Create it with scripts/materialise.py --dir {tree}."
        )
    return tree


def run(options, stack):
    """Do what the options say; return the exit code."""
    name = stack.enter_context(tempfile.TemporaryDirectory(prefix="gauntlet-"))
    directory = pathlib.Path(name)
    tree = find_tree(options, directory)
    if options.mutants:
        from rounds import mutants

        return mutants.main(options, tree)
    kinds, errors = describe(tree)
    combinations = combine(kinds, options)
    if options.list:
        print(*combinations, sep="\n")
        for kind, reason in errors.items():
            print(f"{kind} can't be run: {reason}")
        return 0
    databases = Databases(stack, directory)
    combinations, missing = start_servers(combinations, databases, options)
    if not combinations:
        raise GauntletError("\n".join(missing.values()))
    return run_rounds(combinations, {**errors, **missing}, options, tree, databases)


def main(arguments):
    """Run the command line; return the exit code."""
    options = parse(arguments)
    unwind_on_termination()
    try:
        with contextlib.ExitStack() as stack:
            return run(options, stack)
    except (GauntletError, run_tests.TestsError, ServerError, ImportError) as error:
        print(f"gauntlet.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
