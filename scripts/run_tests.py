"""
Run the fork's tests, and the upstream tests it affects, on one database.

    python scripts/run_tests.py sqlite
    python scripts/run_tests.py postgres --upstream
    python scripts/run_tests.py postgres-native
    python scripts/run_tests.py postgres-mixed async_bridge.test_mixed_aliases
    python scripts/run_tests.py mariadb --upstream
    python scripts/run_tests.py sqlite-memory transactions -- -k savepoint

Materialise the tree this repository describes in a temporary directory, write
a settings module, and call the tree's tests/runtests.py. Arguments after "--"
are passed on to it. PostgreSQL is started by postgres.py, unless DATABASE_URL
is set, and MariaDB by mariadb.py, unless MARIADB_URL is set.

Exit codes: that of runtests.py, 1 also if it ran no test or wrote nothing for
ten minutes, 2 if the tests cannot be run.
"""

import argparse
import os
import pathlib
import pprint
import re
import signal
import subprocess
import sys
import tempfile

import mariadb
import postgres
import shown
from own_server import ServerError, unwind_on_termination

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Test apps of Django's that exercise what the patches touch, among them all
# that the headers of these name.
AFFECTED = [
    "transactions",
    "transaction_hooks",
    "backends",
    "async",
    "handlers",
    "asgi",
    "httpwrappers",
    "responses",
    "signals",
    "dispatch",
    "test_utils",
    "db_utils",
    "basic",
    "queries",
    "lookup",
    "expressions",
    "select_for_update",
    "pagination",
    "generic_relations",
    "sessions_tests",
    "servers",
    "cache.tests.DBCacheTests",
    "middleware",
    "test_client",
    "contenttypes_tests",
    "auth_tests.test_auth_backends",
]

# Everything but DATABASES.
SETTINGS = {
    "SECRET_KEY": "tests",
    "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
    "USE_TZ": False,
    "DEFAULT_AUTO_FIELD": "django.db.models.AutoField",
}

# The aliases that wait on the event loop. In the mixed kind, some do.
NATIVE = {"postgres-native": ["default", "other"], "postgres-mixed": ["other"]}

DATABASES = ["sqlite", "sqlite-memory", "postgres", *NATIVE, "mariadb"]

ALIASES = ["default", "other"]


class TestsError(Exception):
    """The tests cannot be run. The message says what to do."""


def sqlite_file(directory):
    """Return the settings of databases in files, for several writers."""
    return {
        alias: {
            "ENGINE": "django.db.backends.sqlite3",
            # A writer waits for another's transaction to end. Without
            # IMMEDIATE, one that has read before fails instead.
            "OPTIONS": {
                "timeout": 30,
                "transaction_mode": "IMMEDIATE",
                "init_command": "PRAGMA journal_mode=WAL",
            },
            "TEST": {"NAME": str(directory / f"{alias}.sqlite3")},
        }
        for alias in ALIASES
    }


def sqlite_memory():
    """Return the settings of databases in memory, Django's default."""
    return {alias: {"ENGINE": "django.db.backends.sqlite3"} for alias in ALIASES}


def on_server(settings, **test):
    """Return the settings of databases on a server."""
    # The names are unique: a server can serve several runs, and its user's
    # databases are not touched.
    return {
        alias: {**settings, "TEST": {"NAME": f"test_{alias}_{os.getpid()}", **test}}
        for alias in ALIASES
    }


def own_labels():
    """Return the names of the test apps the fork adds."""
    return sorted(path.parent.name for path in ROOT.glob("tests/*/__init__.py"))


def materialise(directory):
    """Create the tree this repository describes."""
    command = [sys.executable, ROOT / "scripts" / "materialise.py", "--dir", directory]
    if subprocess.run(command).returncode:
        raise TestsError("The tree to test cannot be materialised, see above.")


def write_settings(path, databases):
    """Write a settings module."""
    settings = {**SETTINGS, "DATABASES": databases}
    lines = [f"{name} = {pprint.pformat(value)}" for name, value in settings.items()]
    path.write_text("\n".join(lines) + "\n")


def run(tree, directory, databases, arguments):
    """Run runtests.py and show its output. Return its exit code and counts."""
    write_settings(directory / "settings_of_run_tests.py", databases)
    env = {**os.environ, "PYTHONPATH": shown.python_path(tree, directory)}
    command = [sys.executable, "runtests.py", "--settings=settings_of_run_tests"]
    returncode, output = shown.run_shown(
        [*command, *arguments], tree / "tests", env, shown.STALL_TIMEOUT
    )
    return returncode, count(output)


def count(output):
    """Return the number of tests that passed, failed and were skipped."""
    ran = sum(map(int, re.findall(r"^Ran (\d+) tests? in ", output, re.MULTILINE)))
    counts = dict.fromkeys(["failures", "errors", "unexpected successes", "skipped"], 0)
    for result in re.findall(r"^(?:OK|FAILED) \((.*)\)$", output, re.MULTILINE):
        for name, number in re.findall(r"([a-z ]+)=(\d+)", result):
            counts[name.strip()] = counts.get(name.strip(), 0) + int(number)
    failed = counts["failures"] + counts["errors"] + counts["unexpected successes"]
    return ran - failed - counts["skipped"], failed, counts["skipped"]


def run_on(database, tree, directory, arguments):
    """Run the tests on one kind of database."""
    if database == "sqlite":
        # Django copies the database for each process, but not its WAL.
        arguments = [*arguments, "--parallel=1"]
        return run(tree, directory, sqlite_file(directory), arguments)
    if database == "sqlite-memory":
        return run(tree, directory, sqlite_memory(), arguments)
    if database == "mariadb":
        with mariadb.server() as url:
            # Whatever the server's default is.
            databases = on_server(mariadb.database_settings(url), CHARSET="utf8mb4")
            return run(tree, directory, databases, arguments)
    with postgres.server() as url:
        databases = on_server(postgres.database_settings(url))
        for alias in NATIVE.get(database, []):
            databases[alias]["ASYNC_NATIVE"] = True
        return run(tree, directory, databases, arguments)


def run_apart(database, tree, directory, labels, passed_on):
    """
    Run the fork's tests, and then upstream's in processes of their own: one of
    those fails if it finds what others have left to the garbage collector.
    """
    apps = own_labels()
    own = [label for label in labels if label.split(".")[0] in apps]
    returncode, counts = 0, [0, 0, 0]
    for group in (own, [label for label in labels if label not in own]):
        if group:
            code, result = run_on(database, tree, directory, [*group, *passed_on])
            returncode = returncode or code
            counts = [sum(pair) for pair in zip(counts, result)]
    return returncode, counts


def parse(arguments):
    """Return the options, and the arguments for runtests.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("database", choices=DATABASES)
    parser.add_argument(
        "labels", nargs="*", help="what to run instead of all of the fork's tests"
    )
    parser.add_argument(
        "--upstream", action="store_true", help="add " + ", ".join(AFFECTED)
    )
    parser.add_argument(
        "--tree",
        type=pathlib.Path,
        help="test this tree (for example build/django, while editing it) instead of "
        "a new one",
    )
    # argparse cannot keep apart arguments for two programs.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return parser.parse_intermixed_args(arguments[:end]), arguments[end + 1 :]


def main(arguments):
    """Run the command line; return the exit code."""
    options, passed_on = parse(arguments)
    unwind_on_termination()
    try:
        labels = options.labels or own_labels()
        if options.upstream:
            labels = [*labels, *AFFECTED]
        if not labels:
            raise TestsError(f"There are no test apps in {ROOT / 'tests'}.")
        with tempfile.TemporaryDirectory(prefix="run-tests-") as name:
            directory = pathlib.Path(name)
            tree = options.tree and options.tree.resolve()
            if tree is None:
                tree = directory / "django"
                materialise(tree)
            elif not (tree / "tests" / "runtests.py").exists():
                raise TestsError(
                    f"{tree} has no tests/runtests.py. Create it with "
                    f"scripts/materialise.py --dir {tree}."
                )
            print(f"{options.database}: {' '.join(labels)}", flush=True)
            returncode, (passed, failed, skipped) = run_apart(
                options.database, tree, directory, labels, passed_on
            )
    except (TestsError, ServerError) as error:
        print(f"run_tests.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(
        f"{options.database}: {passed} passed, {failed} failed, {skipped} skipped",
        flush=True,
    )
    if not passed + failed + skipped:
        print("run_tests.py: No test was run.", file=sys.stderr)
        return 1
    # A signal's is negative.
    return returncode if returncode >= 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
