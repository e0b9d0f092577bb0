import contextlib
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest
from collections import Counter
from unittest import mock

import native_bodies
import run_tests
import run_upstream
from gittree import Git

# Tests that fail in every way there is.
FAILING = """
import unittest

class Tests(unittest.TestCase):
    def test_fail(self):
        '''A docstring.'''
        self.fail("(not.a.name)")

    def test_error(self):
        raise ValueError("=" * 70)

    def test_subtests(self):
        for number in range(3):
            with self.subTest("message (1)", number=number):
                self.assertEqual(number, 1)

    @unittest.expectedFailure
    def test_unexpected(self):
        '''Another docstring.'''

    @unittest.expectedFailure
    def test_unexpected_as_well(self):
        pass

    @unittest.expectedFailure
    def test_expected(self):
        self.fail("expected")

    @unittest.skip("reason")
    def test_skip(self):
        pass

class SetUpTests(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise ValueError

    def test_not_reached(self):
        pass
"""

FAILURES = Counter(
    {
        ("ERROR", "failing.SetUpTests"): 1,
        ("ERROR", "failing.Tests.test_error"): 1,
        ("ERROR", "missing"): 1,
        ("FAIL", "failing.Tests.test_fail"): 1,
        ("FAIL", "failing.Tests.test_subtests"): 2,
        ("UNEXPECTED SUCCESS", "failing.Tests.test_unexpected"): 1,
        ("UNEXPECTED SUCCESS", "failing.Tests.test_unexpected_as_well"): 1,
    }
)

# It reports the lines of its tree's file "outcome", or "outcome-alone" if run
# again, as failures of ten tests.
RUNTESTS = """
import os, pathlib, sys, time
import settings_of_run_upstream
print("settings:", vars(settings_of_run_upstream).get("FROM_DJANGO"))
print("arguments:", sys.argv[1:])
alone = "--parallel=1" in sys.argv
lines = pathlib.Path("outcome-alone" if alone else "outcome").read_text().split("\\n")
if lines[0] == "crash":
    sys.exit("no such table")
if lines[0] == "hang":
    if os.fork():
        os._exit(0)
    print("child:", os.getpid(), flush=True)
    time.sleep(600)
names = [line for line in lines if line]
for name in names:
    print("=" * 70)
    print(f"FAIL: test ({name})")
print("Ran", 9 if "fewer" in names else 10, "tests in 0.1s")
print(f"FAILED (failures={len(names)})" if names else "OK")
sys.exit(bool(names))
"""


class ParserTests(unittest.TestCase):
    def test_output_of_unittest(self):
        """What unittest really writes."""
        with tempfile.TemporaryDirectory() as name:
            pathlib.Path(name, "failing.py").write_text(FAILING)
            process = subprocess.run(
                [sys.executable, "-m", "unittest", "failing", "missing"],
                cwd=name,
                env={**os.environ, "NO_COLOR": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
            )
        result = run_upstream.parse_output(process.stdout, process.returncode, 61)
        self.assertEqual(result.failures, FAILURES)
        self.assertEqual((result.tests, result.skipped), (8, 1))
        self.assertEqual(result.crash, "")
        self.assertEqual(str(result), "8 tests, 8 failures, 1 skipped, 1:01 minutes")

    def test_crashes(self):
        for output, returncode in (
            ("Traceback (most recent call last):\n", 1),
            ("Ran 3 tests in 0.1s\n\nOK\n", -9),
        ):
            with self.subTest(output):
                result = run_upstream.parse_output(output, returncode, 1)
                self.assertIn(f"exit code {returncode}", result.crash)


class CommandTests(unittest.TestCase):
    def setUp(self):
        temp_dir = tempfile.TemporaryDirectory()
        self.addCleanup(temp_dir.cleanup)
        self.directory = pathlib.Path(temp_dir.name)
        self.tree = self.directory / "tree"
        Git.create(self.tree)
        self.write("tests/runtests.py", RUNTESTS)
        self.write("tests/test_sqlite.py", "FROM_DJANGO = True\n")
        self.pristine()

    def write(self, path, text):
        path = self.tree / path
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def outcome(self, *names, alone=None):
        """Write what the tests give, among others and alone."""
        self.write("tests/outcome", "\n".join(names))
        self.write("tests/outcome-alone", "\n".join(names if alone is None else alone))

    def commit(self):
        git = Git(self.tree)
        git("add", ".")
        git.commit("commit")
        return git

    def pristine(self, *names):
        self.outcome(*names)
        self.commit()("tag", "--force", "pristine")

    def fork(self, *names, alone=None):
        self.outcome(*names, alone=alone)
        self.commit()

    def call(self, *arguments):
        """Return the exit code, and what was written to stdout and stderr."""
        stdout, stderr = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            mock.patch("run_upstream.unwind_on_termination"),
        ):
            code = run_upstream.main(
                ["sqlite-memory", "--tree", str(self.tree), *arguments]
            )
            stdout.flush()
        return code, stdout.buffer.getvalue().decode(), stderr.getvalue()

    def assertSummary(self, stdout, *lines):
        summary = stdout.partition("--- summary ---\n")[2]
        self.assertEqual(summary.splitlines()[2:], list(lines))

    def test_same(self):
        self.pristine("app.Tests.test_root")
        code, stdout, stderr = self.call("one", "two", "--parallel", "3")
        self.assertEqual((code, stderr), (0, ""))
        self.assertSummary(
            stdout,
            "Fail on both (1):",
            "  FAIL: app.Tests.test_root",
            "No difference.",
        )
        # Both were run with Django's settings, in the same way.
        self.assertEqual(stdout.count("settings: True"), 2)
        arguments = (
            "arguments: ['--settings=settings_of_run_upstream', '--noinput', 'one', "
            "'two', '--parallel=3']"
        )
        self.assertEqual(stdout.count(arguments), 2)

    def test_difference(self):
        self.fork("app.Tests.test_new")
        code, stdout, _ = self.call()
        self.assertEqual(code, 1)
        self.assertIn("--- again, on Django: 1 labels ---", stdout)
        self.assertSummary(
            stdout,
            "FAIL ON THE FORK ONLY (1):",
            "  FAIL: app.Tests.test_new",
            "The fork differs.",
        )

    def test_more_failures_of_one_test(self):
        """As if more of its subtests failed."""
        self.pristine("app.Tests.test")
        self.fork("app.Tests.test", "app.Tests.test")
        code, stdout, _ = self.call()
        self.assertEqual(code, 1)
        self.assertSummary(
            stdout,
            "Fail on both (1):",
            "  FAIL: app.Tests.test",
            "FAIL ON THE FORK ONLY (1):",
            "  FAIL: app.Tests.test",
            "The fork differs.",
        )

    def test_unstable(self):
        """A test that only fails among others doesn't count, but is shown."""
        self.fork("app.Tests.test_new", alone=[])
        code, stdout, _ = self.call()
        self.assertEqual(code, 0)
        self.assertSummary(
            stdout,
            "Failed on the fork only, but not when run again, alone, on both; "
            "unstable, not counted (1):",
            "  FAIL: app.Tests.test_new",
            "No difference.",
        )

    def test_fixed(self):
        self.pristine("app.Tests.test_old")
        self.fork()
        code, stdout, _ = self.call()
        self.assertEqual(code, 0)
        self.assertSummary(
            stdout,
            "Fail on Django only, not counted (1):",
            "  FAIL: app.Tests.test_old",
            "No difference.",
        )

    def test_fewer_tests(self):
        self.fork("fewer", alone=[])
        code, stdout, _ = self.call()
        self.assertEqual(code, 1)
        self.assertIn("THE FORK DID NOT RUN 1 OF THE TESTS.\n", stdout)

    def test_crash_of_the_fork(self):
        self.fork("crash")
        code, stdout, _ = self.call()
        self.assertEqual(code, 1)
        self.assertIn("no such table", stdout)
        self.assertIn("THE RUN ON THE FORK DID NOT END AS IT SHOULD", stdout)

    def test_hang_of_the_fork(self):
        """Processes that outlive runtests.py are ended as well."""
        self.fork("hang")
        began = time.monotonic()
        code, stdout, _ = self.call("--timeout", "0.03")
        self.assertEqual(code, 1)
        self.assertLess(time.monotonic() - began, 60)
        self.assertIn("THE RUN ON THE FORK DID NOT END AS IT SHOULD", stdout)
        pid = stdout.partition("child: ")[2].split()[0]
        stat = pathlib.Path(f"/proc/{pid}/stat")
        # In a container, nobody may reap it.
        self.assertTrue(not stat.exists() or ") Z " in stat.read_text())

    def test_crash_of_django(self):
        self.pristine("crash")
        code, _, stderr = self.call()
        self.assertEqual(code, 2)
        self.assertIn("The run on Django did not end", stderr)

    def test_tests_of_the_fork(self):
        """Those it adds aren't run; those it changes are named."""
        self.write("tests/added/__init__.py", "raise Exception\n")
        self.write("tests/runtests.py", f"{RUNTESTS}# Changed.\n")
        self.commit()
        log = []
        directory = self.directory / "trees"
        directory.mkdir()
        _, fork = run_upstream.make_trees(self.tree, directory, log.append)
        self.assertEqual(
            log, ["Files of Django's tests that the fork changes: tests/runtests.py"]
        )
        self.assertFalse((fork / "tests" / "added").exists())
        self.assertTrue((self.tree / "tests" / "added").exists())

    def test_baseline(self):
        path = self.directory / "baseline"
        self.pristine("app.Tests.test")
        for runs in (2, 1):
            code, stdout, _ = self.call("--baseline", str(path))
            self.assertEqual(code, 0)
            self.assertEqual(stdout.count("arguments:"), runs)
            self.assertIn("Fail on both (1):\n  FAIL: app.Tests.test\n", stdout)
        code, _, stderr = self.call("--baseline", str(path), "other_labels")
        self.assertEqual(code, 2)
        self.assertIn("is the result of sqlite-memory --parallel=2, not of", stderr)

    def test_uncommitted_changes(self):
        self.outcome("app.Tests.test_new")
        code, _, stderr = self.call()
        self.assertEqual(code, 2)
        self.assertIn("has uncommitted changes", stderr)

    def test_no_tree(self):
        code, _, stderr = self.call("--tree", str(self.directory))
        self.assertEqual(code, 2)
        self.assertIn("not a tree made by materialise.py", stderr)


# Its tests wait for PostgreSQL in the ways that the fork's do.
NATIVE_TESTS = """
import asyncio
import contextvars
import unittest

import psycopg
from django.db import bridge, connection, connections
from django.test import TestCase, TransactionTestCase
from native_bodies import OUTSIDE, waits

OUTSIDE["native_suite.tests.OutsideTests"] = "A test."
var = contextvars.ContextVar("var", default=None)


def query():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return cursor.fetchone()


class Tests(TestCase):
    def setUp(self):
        self.assertIsNone(bridge.current())

    def tearDown(self):
        self.assertIsNone(bridge.current())
        self.assertEqual(var.get(), self._testMethodName)

    def test_function(self):
        var.set("test_function")
        self.assertIsNotNone(bridge.current())
        self.assertIs(connection.in_atomic_block, True)
        before = waits.awaited
        self.assertEqual(query(), (1,))
        self.assertGreater(waits.awaited, before)

    async def test_coroutine(self):
        var.set("test_coroutine")
        self.assertIsNone(bridge.current())
        self.assertIsNotNone(asyncio.current_task())

    def test_in_test(self):
        var.set("test_in_test")
        result = unittest.TestResult()
        InnerTests("method").run(result)
        self.assertIs(result.wasSuccessful(), True)


class InnerTests(unittest.TestCase):
    def method(self):
        self.assertEqual(query(), (1,))


class TransactionTests(TransactionTestCase):
    available_apps = []

    def test_function(self):
        self.assertEqual(query(), (1,))


class OutsideTests(TestCase):
    def test_function(self):
        self.assertIsNone(bridge.current())


class PlainTests(unittest.TestCase):
    def test_query(self):
        # Its connection is open until the database is to be dropped.
        self.assertEqual(query(), (1,))
"""

BLOCKING_TESTS = """

def parameters():
    params = connection.get_connection_params()
    return {name: params[name] for name in ("dbname", "host", "port", "user")}


class BlockingTests(TestCase):
    def test_connect(self):
        psycopg.connect(**parameters()).close()

    def test_query(self):
        self.conn.execute("SELECT 1")

    def test_swallowed(self):
        with self.assertRaises(ZeroDivisionError):
            self.conn.execute("SELECT 1")
            1 / 0

    def setUp(self):
        self.conn = psycopg.connect(**parameters())
        self.addCleanup(self.conn.close)
"""


class NativeTests(unittest.TestCase):
    """postgres-native, on a tiny suite."""

    @classmethod
    def setUpClass(cls):
        temp_dir = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temp_dir.cleanup)
        cls.tree = pathlib.Path(temp_dir.name, "django")
        with contextlib.redirect_stdout(io.StringIO()):
            run_tests.materialise(cls.tree)

    def run_suite(self, text, *arguments):
        """Return the result of a test module, and what was written."""
        app = self.tree / "tests" / "native_suite"
        app.mkdir(exist_ok=True)
        (app / "__init__.py").write_text("")
        (app / "tests.py").write_text(text)
        stdout = io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stdout(stdout):
            result = run_upstream.run_suite(
                "postgres-native", self.tree, ["native_suite", *arguments], 120
            )
            stdout.flush()
        output = stdout.buffer.getvalue().decode()
        self.assertEqual(result.crash, "", output)
        return result, output

    def test_bodies(self):
        result, output = self.run_suite(NATIVE_TESTS, "--parallel=1")
        self.assertEqual(result.failures, {}, output)
        self.assertEqual(result.tests, 6)
        self.assertEqual(result.waits.bodies, 5)
        self.assertGreater(result.waits.awaited, 3)
        self.assertIs(result.waits.are_good(), True)

    def test_blocking(self):
        """In the processes of a parallel run, too."""
        text = NATIVE_TESTS + BLOCKING_TESTS
        result, output = self.run_suite(text, "--parallel=2")
        names = ["test_connect", "test_query", "test_swallowed"]
        failures = {
            ("FAIL", f"native_suite.tests.BlockingTests.{name}"): 1 for name in names
        }
        self.assertEqual(result.failures, failures, output)
        self.assertIn("in test_swallowed", output)
        self.assertEqual(result.waits.bodies, 8)
        self.assertGreaterEqual(result.waits.blocking, 3)
        self.assertIs(result.waits.are_good(), False)


class WaitsTests(unittest.TestCase):
    def test_summary(self):
        """A run fails if it blocked an event loop, or awaited nothing."""
        pristine = run_upstream.Result(Counter(), 1, 0, 1)
        for awaited, blocking, good in ((3, 0, True), (3, 1, False), (0, 0, False)):
            with self.subTest(awaited=awaited, blocking=blocking):
                waits = native_bodies.Waits(1, awaited, blocking)
                fork = run_upstream.Result(Counter(), 1, 0, 1, waits=waits)
                stdout = io.StringIO()
                with contextlib.redirect_stdout(stdout):
                    result = run_upstream.compare(pristine, fork, None)
                self.assertIs(result, good)
                self.assertIn(
                    f"1 bodies in the bridge, {awaited} waits awaited, {blocking} that",
                    stdout.getvalue(),
                )


class PostgreSQLTests(unittest.TestCase):
    def test_embedded_server(self):
        """Its databases have what the tables of Django's tests refer to."""
        import psycopg

        with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(os.environ):
            os.environ.pop("DATABASE_URL", None)
            with run_upstream.databases("postgres") as databases:
                settings = databases["default"]
                options = {
                    "host": settings["HOST"],
                    "port": settings["PORT"],
                    "user": settings["USER"],
                    "autocommit": True,
                }
                with psycopg.connect(dbname="postgres", **options) as connection:
                    connection.execute("CREATE DATABASE test")
                with psycopg.connect(dbname="test", **options) as connection:
                    for name in run_upstream.EXTENSIONS:
                        connection.execute(f'CREATE EXTENSION "{name}"')
                    connection.execute("SELECT 'a' COLLATE \"sv-x-icu\"")


if __name__ == "__main__":
    unittest.main()
