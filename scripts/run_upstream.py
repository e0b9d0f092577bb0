"""
Run Django's own test suite on Django and on the fork, and compare.

    python scripts/run_upstream.py sqlite-memory
    python scripts/run_upstream.py postgres --parallel 4
    python scripts/run_upstream.py postgres-native
    python scripts/run_upstream.py sqlite-memory admin_views auth_tests

Materialise Django and the fork next to each other, without the test apps the
fork adds, run the whole suite (or only the given labels) on both in the same
way, with the settings Django's tests come with, and compare what fails. Some
tests fail on any Django: because root may write everywhere, or because a
package or a server is missing. Only a difference counts. A test that fails on
the fork only is run again on both, alone, and counts if it differs there, too.

PostgreSQL is started by postgres.py, unless DATABASE_URL is set. Then the
server needs ICU and the extensions in contrib, which the embedded one has only
in part: tests that use the rest fail there, on Django as on the fork.

With postgres-native, the fork has ASYNC_NATIVE, and the body of each test is
run on an event loop, by native_bodies.py, while Django is run on postgres. The
waits for PostgreSQL are counted. Each has to be awaited on the event loop.

Exit codes: 0 if the fork fails no other test, 1 if it does, crashes, hangs,
runs fewer tests, or blocks an event loop, 2 if there is nothing to compare.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import pprint
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time

import native_bodies
import postgres
import run_tests
import shown
from chain import ChainError, Unusable
from gittree import Git
from materialise import require_clean, require_tree
from own_server import ServerError, unwind_on_termination
from run_tests import TestsError

SETTINGS_MODULE = "settings_of_run_upstream"

# The settings that Django's tests come with. They must not differ in anything
# but the databases.
SETTINGS = """\
from test_sqlite import *

DATABASES = {}
"""

# Added to them for the fork by postgres-native.
NATIVE_BODIES = """\

import native_bodies

native_bodies.install({!r})
"""

# What the tables of Django's tests need on PostgreSQL, which the embedded
# server doesn't have.
COLLATION = "sv-x-icu"
EXTENSIONS = {"pgcrypto", "uuid-ossp"}

DATABASES = ["sqlite-memory", "postgres", "postgres-native"]

PATHS = ("--name-only", "-z", "--no-renames", "pristine", "HEAD", "--", "tests")

# A failure starts with a line such as
#     ERROR: test_name (app.tests.ClassTests.test_name) (number='of subTest')
#     ERROR: setUpClass (app.tests.ClassTests)
#     ERROR: app.tests (unittest.loader._FailedTest.app.tests)
# below a ruler, which only the first of several unexpected successes has.
FAILURE = re.compile(
    r"^(?:={70}\n(?=FAIL|ERROR)|(?=UNEXPECTED))"
    r"(FAIL|ERROR|UNEXPECTED SUCCESS): [^(\n]*"
    r"\((?:unittest\.loader\._FailedTest\.)?([\w.]+)\)",
    re.MULTILINE,
)


@dataclasses.dataclass
class Result:
    """
    What a run of the suite gave.

    `failures` maps ("ERROR", "app.tests.ClassTests.test_name") and the like to
    how often that was reported; once for each failed subTest().
    """

    failures: collections.Counter
    tests: int
    skipped: int
    seconds: float
    crash: str = ""
    # Of postgres-native only.
    waits: native_bodies.Waits | None = None

    def __str__(self):
        if self.crash:
            return f"{self.crash} after {minutes(self.seconds)}"
        return (
            f"{self.tests} tests, {self.failures.total()} failures, "
            f"{self.skipped} skipped, {minutes(self.seconds)}"
        )

    def save(self, path, key):
        values = dataclasses.asdict(self)
        values["failures"] = sorted(self.failures.elements())
        path.write_text(json.dumps({**values, "key": key}, indent=1) + "\n")

    @classmethod
    def load(cls, path, key):
        values = json.loads(path.read_text())
        if (found := values.pop("key")) != key:
            raise TestsError(f"{path} is the result of {found}, not of {key}.")
        values["failures"] = collections.Counter(map(tuple, values["failures"]))
        return cls(**values)


def minutes(seconds):
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f} minutes"


def parse_output(output, returncode, seconds):
    """Return the result of a run of runtests.py from what it has written."""
    failures = collections.Counter(FAILURE.findall(output))
    passed, failed, skipped = run_tests.count(output)
    crash = ""
    if not passed + failed + skipped:
        crash = f"no test was run, or it crashed (exit code {returncode})"
    elif returncode and not failures:
        crash = f"exit code {returncode} without a failure"
    return Result(failures, passed + failed + skipped, skipped, seconds, crash)


def clone(source, target, revision):
    """Check out a revision of a materialised tree in a new directory."""
    Git(source)("clone", "--quiet", "--shared", "--no-checkout", ".", str(target))
    git = Git(target)
    git("checkout", "--quiet", "--detach", revision)
    return git


def make_trees(source, directory, log=print):
    """Return folders with Django and the fork, each with Django's tests."""
    git = Git(source)
    require_tree(git)
    require_clean(git)
    pristine, fork = directory / "pristine", directory / "fork"
    clone(git.directory, pristine, git.text("rev-parse", "pristine^{commit}"))
    clone(git.directory, fork, git.text("rev-parse", "HEAD"))
    for path in git.paths("diff", "--diff-filter=A", *PATHS):
        (fork / path).unlink()
        with contextlib.suppress(OSError):
            (fork / path).parent.rmdir()
    changed = git.paths("diff", "--diff-filter=a", *PATHS)
    log(f"Files of Django's tests that the fork changes: {', '.join(changed) or '-'}")
    return pristine, fork


@contextlib.contextmanager
def databases(kind):
    """Yield DATABASES with empty databases."""
    if kind == "sqlite-memory":
        yield run_tests.sqlite_memory()
    else:
        with postgres.server() as url, postgres.SERVER.directory() as directory:
            settings = postgres.database_settings(url)
            if kind == "postgres-native":
                settings["ASYNC_NATIVE"] = True
            if not os.environ.get("DATABASE_URL"):
                complete_server(url, directory)
            yield run_tests.on_server(settings)


def complete_server(url, directory):
    """
    Let the tables of Django's tests be created on the embedded server.

    It was built without ICU and OpenSSL, so it lacks some of what they refer
    to. Empty extensions, in `directory`, and another collation stand in for
    that. Tests that use them fail then, on Django as on the fork.
    """
    import psycopg
    from psycopg.sql import SQL, Identifier

    with psycopg.connect(url, dbname="template1", autocommit=True) as connection:
        available = connection.execute("SELECT name FROM pg_available_extensions")
        missing = EXTENSIONS.difference(name for (name,) in available)
        if missing:
            print(f"PostgreSQL has no extensions {', '.join(sorted(missing))}.")
            write_extensions(directory, missing)
            command = SQL("ALTER ROLE CURRENT_USER SET extension_control_path = {}")
            connection.execute(command.format(f"{directory}:$system"))
        has_collation = "SELECT FROM pg_collation WHERE collname = %s"
        if not connection.execute(has_collation, [COLLATION]).rowcount:
            print(f"PostgreSQL has no collation {COLLATION}.")
            command = SQL("CREATE COLLATION {} (locale = 'C')")
            connection.execute(command.format(Identifier(COLLATION)))


def write_extensions(directory, names):
    """Write extensions without content."""
    target = directory / "extension"
    target.mkdir()
    for name in names:
        (target / f"{name}.control").write_text("default_version = '0'\n")
        (target / f"{name}--0.sql").write_text("")
    # The server may run as another user.
    for path in [directory, target, *target.iterdir()]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def run_suite(kind, tree, arguments, timeout):
    """Run runtests.py in a tree and return the result."""
    with (
        databases(kind) as settings,
        tempfile.TemporaryDirectory(prefix="run-upstream-") as name,
    ):
        directory = pathlib.Path(name)
        text = SETTINGS.format(pprint.pformat(settings))
        is_native = kind == "postgres-native"
        if is_native:
            reports = directory / "reports"
            reports.mkdir()
            # Alone: a test may import what's called as another script.
            shutil.copy(native_bodies.__file__, directory)
            text += NATIVE_BODIES.format(str(reports))
        (directory / f"{SETTINGS_MODULE}.py").write_text(text)
        env = {
            **os.environ,
            "PYTHONPATH": shown.python_path(tree, tree / "tests", directory),
            # Hundreds of tests start a Python that imports Django.
            "PYTHONDONTWRITEBYTECODE": "",
        }
        command = [sys.executable, "runtests.py", f"--settings={SETTINGS_MODULE}"]
        start = time.monotonic()
        returncode, output = shown.run_shown(
            [*command, "--noinput", *arguments], tree / "tests", env, timeout
        )
        result = parse_output(output, returncode, time.monotonic() - start)
        if is_native:
            result.waits = native_bodies.Waits.read(reports)
        return result


def title(text):
    print(f"\n--- {text} ---", flush=True)


def show(heading, failures):
    if failures:
        print(f"{heading} ({failures.total()}):")
        for (status, name), number in sorted(failures.items()):
            print(f"  {status}: {name}" + (f" ({number} times)" * (number > 1)))


def run_again(runs, failures, timeout):
    """
    Run the tests that fail on the fork only again, alone, on both.

    Return the failures that are still the fork's only.
    """
    labels = sorted({name for _, name in failures})
    results = []
    for name, (kind, tree) in runs.items():
        title(f"again, on {name}: {len(labels)} labels")
        results.append(run_suite(kind, tree, [*labels, "--parallel=1"], timeout))
    pristine, fork = results
    if fork.crash:
        return failures
    return fork.failures - pristine.failures


def compare(pristine, fork, confirm):
    """
    Print the differences; return whether the fork is as good as Django.

    `confirm` returns those of the given failures which are the fork's only.
    """
    differences = fork.failures - pristine.failures
    only_fork = confirm(differences) if differences and not fork.crash else None
    title("summary")
    print(f"Django: {pristine}")
    print(f"fork:   {fork}")
    if fork.waits is not None:
        print(f"        {fork.waits}")
    show("Fail on both", fork.failures & pristine.failures)
    if not fork.crash:
        show("Fail on Django only, not counted", pristine.failures - fork.failures)
    if only_fork is None:
        only_fork = differences
    else:
        show(
            "Failed on the fork only, but not when run again, alone, on both; "
            "unstable, not counted",
            differences - only_fork,
        )
    show("FAIL ON THE FORK ONLY", only_fork)
    if fork.crash:
        print(f"THE RUN ON THE FORK DID NOT END AS IT SHOULD: {fork.crash}.")
    missing = (pristine.tests - pristine.skipped) - (fork.tests - fork.skipped)
    if missing > 0 and not fork.crash:
        print(f"THE FORK DID NOT RUN {missing} OF THE TESTS.")
    good = not only_fork and not fork.crash and missing <= 0
    if fork.waits is not None and not fork.waits.are_good():
        print("NOT ALL WAITS, OR NONE, WERE AWAITED.")
        good = False
    print("No difference." if good else "The fork differs.", flush=True)
    return good


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("database", choices=DATABASES)
    parser.add_argument("labels", nargs="*", help="what to run instead of everything")
    parser.add_argument(
        "--tree",
        type=pathlib.Path,
        help="compare what is committed in this tree (for example build/django) "
        "instead of a new one",
    )
    parser.add_argument("--parallel", default="2", help="processes (default: 2)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=shown.STALL_TIMEOUT / 60,
        help="minutes without output after which a run hangs (default: %(default)g)",
    )
    parser.add_argument(
        "--baseline",
        type=pathlib.Path,
        help="keep Django's result in this file, to run only the fork the next time "
        "while working on it",
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments):
    """Run the command line; return the exit code."""
    options = parse(arguments)
    unwind_on_termination()
    timeout = 60 * options.timeout
    suite = [*options.labels, f"--parallel={options.parallel}"]
    kind = options.database
    pristine_kind = "postgres" if kind == "postgres-native" else kind
    key = shlex.join([pristine_kind, *suite])
    try:
        with tempfile.TemporaryDirectory(prefix="run-upstream-") as name:
            directory = pathlib.Path(name)
            source = options.tree and options.tree.resolve()
            if source is None:
                source = directory / "django"
                run_tests.materialise(source)
            pristine_tree, fork_tree = make_trees(source, directory)
            if options.baseline and options.baseline.exists():
                pristine = Result.load(options.baseline, key)
                print(f"Django's result is taken from {options.baseline}.")
            else:
                title(f"Django, {key}")
                pristine = run_suite(pristine_kind, pristine_tree, suite, timeout)
                if pristine.crash:
                    raise TestsError(f"The run on Django did not end: {pristine}.")
                if options.baseline:
                    pristine.save(options.baseline, key)
            title(f"the fork, {shlex.join([kind, *suite])}")
            fork = run_suite(kind, fork_tree, suite, timeout)
            runs = {
                "Django": (pristine_kind, pristine_tree),
                "the fork": (kind, fork_tree),
            }
            good = compare(
                pristine, fork, lambda failures: run_again(runs, failures, timeout)
            )
            return 0 if good else 1
    except (TestsError, ChainError, Unusable, ServerError) as error:
        print(f"run_upstream.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
