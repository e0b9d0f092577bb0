#!/usr/bin/env python3
"""
Measure the fork next to other ways to use PostgreSQL from asynchronous code.

    python3 scripts/bench/run.py
    python3 scripts/bench/run.py --quick
    python3 scripts/bench/run.py --only native --only raw --operations get

Make an environment for each contender, start a PostgreSQL (or use the one
DATABASE_URL names), and create tables there whose names begin with "bench_".
Let each contender do each operation once, and compare what it has read or
written with what psycopg does. Then, for each operation and number of tasks,
let the contenders take turns, round by round, each in a process of its own.
While one is measured, the others do nothing.

A measurement opens a pool of 10 connections (for pg_sleep(): 50), lets the
tasks repeat the operation until everything is warm, and then measures how
often they do it, and how long each call takes. "Sync" contenders have 10
threads instead, each with a connection. CPU, peak memory and threads are those
of the contender's process. The same rows, in the same order, are read and
written by all. They read objects: those of the ORM, or named tuples.

Write results.json, results.md and plots into docs/benchmarks/. Environments
are kept in build/bench/, named by what they contain. How long the run takes is
estimated at its beginning. --minutes says how long it may take, and --quick
takes a few minutes, whose figures say little.

What transactions need that wait is measured first (see waiting_memory.py). The
instructions that synchronous Django executes are counted by instructions.py;
if it was run before for the same patches, they are in the tables, too. Ctrl-C
ends the run with tables of what was measured until then.

Exit status: 0 done, 1 a contender's result was wrong or it failed, 2 it can't
run here; the error says what to do. A contender that can't be installed, or
can't do an operation, is left out and named.
"""

import contextlib
import itertools
import json
import os
import pathlib
import platform
import select
import shutil
import signal
import subprocess
import sys
import time

BENCH = pathlib.Path(__file__).resolve().parent
# own_server.py and others are used as they are by the other scripts.
sys.path.insert(1, str(BENCH.parent))

import environments  # noqa: E402
import http_load  # noqa: E402
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
from operations import OPERATIONS  # noqa: E402
from own_server import ServerError, ending, unwind_on_termination  # noqa: E402
from waiting_memory import KINDS  # noqa: E402

# What prepares the tables, and knows what's right.
OBSERVER = "raw"

# Seconds that a measurement may take besides those asked for.
PATIENCE = 120

# The seconds that a measurement has at least, if --minutes decides.
SHORTEST = 0.5

# About how many seconds it takes to start and verify a contender, for each
# task to end, and to measure waiting transactions.
STARTING = 1
PER_TASK = 0.002
WAITING = 2

# Whose waiting transactions are measured.
HOLDING = ("native", "stock-async", "stock-sync")

# Seconds between two looks at the threads of a process.
INTERVAL = 0.02

# Who takes part only with --only: it's as fast as stock Django, by design.
BY_REQUEST = ("fork-sync",)

# What is told of an environment.
SHOWN_PACKAGES = {
    "asyncpg",
    "django",
    "django-async-backend",
    "psycopg",
    "sqlalchemy",
    "tortoise-orm",
}

BUSY_HINT = (
    "The load average was {} at the beginning. Who has more threads gets more of the "
    "CPUs then, so only the CPU per operation means anything."
)
WRK_HINT = "Not run, as there is no wrk. On Debian and Ubuntu, install the package wrk."

started = time.monotonic()


def progress(message):
    """Show what happens next, or has happened."""
    print(f"[{time.monotonic() - started:5.0f} s] {message}", flush=True)


class WorkerError(Exception):
    """A contender failed. The traceback is in the log."""


class Worker:
    """The process of a contender."""

    def __init__(self, contender, python, url, tree, log):
        path = [tree] if contender.is_fork else []
        environ = {
            name: value
            for name, value in os.environ.items()
            if name not in ("DJANGO_SETTINGS_MODULE", "DJANGO_ALLOW_ASYNC_UNSAFE")
        }
        environ["PYTHONPATH"] = os.pathsep.join(map(str, path))
        command = [python, BENCH / "worker.py", contender.module, url]
        self.contender = contender
        self.threads = 0
        self._process = subprocess.Popen(
            [*command, json.dumps(contender.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environ,
        )

    @contextlib.contextmanager
    def running(self):
        with ending(self._process):
            self._answer(PATIENCE)
            yield self

    def ask(self, command, seconds=0, **arguments):
        """Return the result of one of the worker's commands."""
        if command == "measure":
            arguments["seconds"] = seconds
        request = json.dumps({"command": command, **arguments})
        try:
            self._process.stdin.write(f"{request}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError("Its process has ended.") from None
        return self._answer(seconds + PATIENCE)

    def _answer(self, timeout):
        self.threads = 0
        deadline = time.monotonic() + timeout
        # An answer is one line, and there is but one.
        while not select.select([self._process.stdout], [], [], INTERVAL)[0]:
            self.threads = max(self.threads, self._count_threads())
            if time.monotonic() > deadline:
                raise WorkerError(f"No answer after {timeout:.0f} seconds.")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"Its process has ended: {self._process.wait()}.")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def _count_threads(self):
        with contextlib.suppress(OSError):
            return len(os.listdir(f"/proc/{self._process.pid}/task"))
        return 0


class Benchmark:
    """The contenders, and what is known of them."""

    def __init__(self, options):
        self.options = options
        self.pythons = {}
        self.results = {
            "about": {},
            "titles": {},
            "versions": {},
            "left_out": [],
            "measurements": [],
            "waiting": [],
        }
        self.failed = False

    def leave_out(self, what, why):
        progress(f"LEFT OUT: {what}: {why}")
        self.results["left_out"].append([what, why])

    def install(self):
        """Make the environments."""
        everybody = contenders(f"Django==={Upstream.load().version}")
        cache = self.options.cache
        for name, contender in everybody.items():
            if name != OBSERVER and name not in self.options.only:
                continue
            try:
                python = environments.environment(
                    cache, contender.requirements, progress
                )
            except environments.NotInstalled as error:
                if name == OBSERVER:
                    raise Unusable(f"pip failed:\n{error}") from error
                self.leave_out(contender.title, f"It can't be installed: {error}")
                continue
            self.pythons[name] = python
            if name in self.options.only:
                self.results["titles"][name] = contender.title
                self.results["versions"][name] = versions(python)
                if contender.is_fork:
                    self.results["versions"][name] += ", the fork's patches"
        self.contenders = {name: everybody[name] for name in self.pythons}
        self.tree = self.options.tree or environments.fork(cache, progress)
        try:
            self.plotting = environments.environment(cache, ["matplotlib"], progress)
        except environments.NotInstalled as error:
            self.plotting = None
            self.leave_out("Plots", f"matplotlib can't be installed: {error}")

    def start(self, name, stack):
        """Start a worker that runs as long as the stack is open."""
        worker = Worker(
            self.contenders[name], self.pythons[name], self.url, self.tree, self.log
        )
        return stack.enter_context(worker.running())

    def run(self, url):
        self.url = url
        with contextlib.ExitStack() as stack:
            self.log = stack.enter_context(open(self.options.cache / "log", "w+"))
            self.observer = self.start(OBSERVER, stack)
            self.observer.ask("call", method="prepare")
            stack.callback(self.clean_up)
            load = " ".join(f"{value:.1f}" for value in os.getloadavg())
            if os.getloadavg()[0] > os.cpu_count() / 2:
                self.leave_out("A quiet machine", BUSY_HINT.format(load))
            self.results["about"] = {
                "rounds": self.options.rounds,
                "cpus": os.cpu_count(),
                "machine": platform.machine(),
                "load": load,
                "python": platform.python_version(),
                "postgresql": self.observer.ask("call", method="server"),
            }
            self.plan()
            self.results["about"]["seconds"] = self.options.seconds
            self.measure_waiting()
            for name in self.options.operations:
                operation = OPERATIONS[name]
                if operation.view_of and not shutil.which("wrk"):
                    self.leave_out(operation.title, WRK_HINT)
                else:
                    self.compare(operation)
                    # If it's interrupted, these aren't lost.
                    self.write_measurements()

    def clean_up(self):
        # A terminal's Ctrl-C has ended the observer, too.
        with contextlib.ExitStack() as stack:
            self.start(OBSERVER, stack).ask("call", method="clean_up")

    def compare(self, operation):
        """Measure an operation with all contenders that can do it."""
        with contextlib.ExitStack() as stack:
            workers = {}
            unable = []
            for name in self.results["titles"]:
                try:
                    worker = self.start(name, stack)
                    if not worker.ask("can", operation=operation.name):
                        unable.append(worker.contender.title)
                        continue
                    self.verify(worker, operation)
                except WorkerError as error:
                    self.fail(self.results["titles"][name], operation, error)
                else:
                    workers[name] = worker
            if unable:
                why = f"There is no such operation: {', '.join(unable)}."
                self.leave_out(operation.title, why)
            for tasks in self.tasks(operation):
                for number in range(self.options.rounds):
                    self.run_round(workers, operation, tasks, number)
                    self.done += self.duration(operation, tasks, self.options.seconds)

    def tasks(self, operation):
        """Return the numbers of tasks to measure it with."""
        return self.options.tasks or operation.tasks

    def plan(self):
        """Fit the measurements into the time there is, and tell how long."""
        options = self.options
        if options.minutes:
            fixed = self.estimate(0)
            slope = self.estimate(1) - fixed
            options.seconds = (options.minutes * 60 - fixed) / slope if slope else 0
            if options.seconds < SHORTEST:
                raise Unusable(
                    f"{options.minutes:g} minutes are too short: {SHORTEST} s for each "
                    f"measurement need {(fixed + SHORTEST * slope) / 60:.0f}."
                )
        self.done = 0
        self.whole = self.estimate(options.seconds)
        self.started = time.monotonic()
        progress(
            f"Estimated: {self.whole / 60:.0f} minutes, {options.rounds} rounds, "
            f"{options.seconds:.2f} s for each measurement"
        )

    def estimate(self, seconds):
        """Return how long all takes, with so many seconds per measurement."""
        operations = [OPERATIONS[name] for name in self.options.operations]
        a_round = self.waiting_duration() + sum(
            self.duration(operation, tasks, seconds)
            for operation in operations
            for tasks in self.tasks(operation)
        )
        starting = STARTING * len(operations) * len(self.participants())
        return self.options.rounds * a_round + starting

    def duration(self, operation, tasks, seconds):
        """Return how long a round takes."""
        number = len(self.participants())
        if operation.view_of:
            # Other ORMs and threads have no views here.
            number, seconds = min(number, 3), http_load.whole(seconds)
        if operation.once:
            seconds = 0
        else:
            # When the time is up, each task has a call that hasn't returned.
            seconds += PER_TASK * tasks
        return number * (seconds + operation.overhead)

    def waiting_duration(self):
        return WAITING * (1 + 2 * len(self.waiting_participants()))

    def participants(self):
        return self.results["titles"]

    def waiting_participants(self):
        if self.options.no_waiting:
            return []
        return [name for name in HOLDING if name in self.participants()]

    def left(self):
        """Return how long it still takes, in words."""
        passed = time.monotonic() - self.started
        # At the beginning, the estimate is better than what it took so far.
        pace = (passed + 60) / (self.done + 60)
        return f"about {(self.whole - self.done) * pace / 60:.0f} minutes left"

    def measure_waiting(self):
        """Measure the memory of waiting transactions, in new processes."""
        names = self.waiting_participants()
        for number in range(self.options.rounds if names else 0):
            connection = self.hold(OBSERVER, "bare")
            for name, kind in itertools.product(names, KINDS):
                try:
                    memory = self.hold(name, kind)
                except WorkerError as error:
                    self.failed = True
                    title = self.results["titles"][name]
                    self.leave_out(f"{title}: waiting", f"It failed: {error}")
                    continue
                self.results["waiting"].append(
                    {
                        "contender": name,
                        "kind": kind,
                        "round": number,
                        "memory": memory,
                        "connection": connection,
                    }
                )
            self.done += self.waiting_duration()
            progress(f"Waiting transactions, round {number + 1}; {self.left()}")

    def hold(self, name, kind):
        with contextlib.ExitStack() as stack:
            worker = self.start(name, stack)
            return worker.ask("hold", kind=kind, url=self.url)

    def verify(self, worker, operation):
        """Raise WorkerError unless the contender does what psycopg does."""
        before = self.observer.ask("call", method="written")
        done = worker.ask("verify", operation=operation.name)
        after = self.observer.ask("call", method="written")
        expected = self.observer.ask(
            "verify", operation=operation.view_of or operation.name
        )["read"]
        if done["read"] != expected:
            raise WorkerError(f"It has read {done['read']!r:.200}.")
        if done["elapsed"] < operation.at_least:
            raise WorkerError(f"It took only {done['elapsed']:.4f} s.")
        written = [new - old for old, new in zip(before, after)]
        if written != list(operation.written):
            raise WorkerError(f"It has written {written}.")

    def run_round(self, workers, operation, tasks, number):
        shown = []
        for name, worker in list(workers.items()):
            self.observer.ask("call", method="empty")
            try:
                measurement = worker.ask(
                    "measure",
                    self.options.seconds,
                    operation=operation.name,
                    tasks=tasks,
                )
            except WorkerError as error:
                self.fail(worker.contender.title, operation, error)
                del workers[name]
                continue
            self.results["measurements"].append(
                {
                    "operation": operation.name,
                    "tasks": tasks,
                    "round": number,
                    "contender": name,
                    "threads": worker.threads,
                    **measurement,
                }
            )
            shown.append(f"{name} {measurement['rate']:,.4g}")
        case = report.case_title(operation.name, tasks)
        progress(f"{case}, round {number + 1}: {', '.join(shown)}; {self.left()}")

    def fail(self, title, operation, error):
        self.failed = True
        self.leave_out(f"{title}: {operation.title}", f"It failed: {error}")

    def write_measurements(self):
        """Write what was found so far, and return the file."""
        self.options.output.mkdir(parents=True, exist_ok=True)
        results = self.options.output / "results.json"
        results.write_text(json.dumps(self.results, indent=1) + "\n")
        return results

    def write(self):
        """Write what was found into files."""
        output = self.options.output
        instructions = output / "instructions.json"
        if instructions.exists():
            found = json.loads(instructions.read_text())
            if found["tree"] == self.tree.name:
                self.results["instructions"] = found["databases"]
            else:
                self.leave_out(
                    "Instructions", "Those of other patches: run instructions.py again."
                )
        results = self.write_measurements()
        (output / "results.md").write_text("\n".join(report.page(self.results)) + "\n")
        if self.plotting:
            progress("Drawing")
            command = [self.plotting, BENCH / "plots.py", results, output]
            subprocess.run(command, check=True)


def versions(python):
    """Return what of an environment matters, in one line."""
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name: d.version for d in m.distributions()}))"
    )
    found = json.loads(subprocess.check_output([python, "-c", code]))
    return ", ".join(
        f"{name} {version}"
        for name, version in sorted(found.items(), key=lambda item: item[0].lower())
        if name.lower() in SHOWN_PACKAGES
    )


def parse():
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="per measurement (default: 1.5)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="how long the whole takes; it decides the seconds of a measurement",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="CONTENDER",
        choices=list(contenders("")),
        help="measure this one, and others given so: " + ", ".join(contenders("")),
    )
    parser.add_argument(
        "--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS)
    )
    parser.add_argument(
        "--tasks", nargs="+", type=int, help="instead of those of each operation"
    )
    parser.add_argument(
        "--no-waiting",
        action="store_true",
        help="don't measure the memory of waiting transactions",
    )
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds of half a second each"
    )
    parser.add_argument(
        "--tree",
        type=pathlib.Path,
        help="measure this tree (for example build/django, while editing it) instead "
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
    options.only = options.only or [
        name for name in contenders("") if name not in BY_REQUEST
    ]
    if options.quick:
        options.rounds, options.seconds = 2, 0.5
    options.cache = options.cache.resolve()
    options.tree = options.tree and options.tree.resolve()
    return options


def main():
    options = parse()
    if sys.platform != "linux":
        raise Unusable("What a process needs is only looked up on Linux.")
    unwind_on_termination()
    benchmark = Benchmark(options)
    try:
        benchmark.install()
        path = None
        if not os.environ.get("DATABASE_URL"):
            path = [str(environments.server_binaries(options.cache, progress))]
        with postgres.server(path) as url:
            benchmark.run(url)
    except (ServerError, environments.NotInstalled, WorkerError) as error:
        raise Unusable(str(error)) from error
    except KeyboardInterrupt:
        if benchmark.results["measurements"]:
            benchmark.leave_out("The rest", "The run was interrupted.")
            benchmark.write()
        sys.exit(128 + signal.SIGINT)
    benchmark.write()
    print()
    print("\n".join(report.page(benchmark.results)))
    if benchmark.failed:
        raise ChainError("Not every contender did what it was asked for.")


if __name__ == "__main__":
    run_script(main)
