import contextlib
import io
import os
import pathlib
import tempfile
import unittest
from unittest import mock

import run_tests

RUNTESTS = """
import sys
import settings_of_run_tests
print(sys.argv[1:], settings_of_run_tests.DATABASES["other"], flush=True)
print({output!r}, file=sys.stderr)
sys.exit({code})
"""

STUCK = """
import time

def stuck():
    time.sleep(60)

stuck()
"""


class CountTests(unittest.TestCase):
    def test_ok(self):
        self.assertEqual(run_tests.count("Ran 3 tests in 0.1s\n\nOK\n"), (3, 0, 0))

    def test_skipped(self):
        output = "Ran 12 tests in 0.1s\n\nOK (skipped=4, expected failures=1)\n"
        self.assertEqual(run_tests.count(output), (8, 0, 4))

    def test_failed(self):
        output = (
            "Ran 20 tests in 0.1s\n\n"
            "FAILED (failures=1, errors=2, skipped=3, expected failures=4, "
            "unexpected successes=5)\n"
        )
        self.assertEqual(run_tests.count(output), (9, 8, 3))

    def test_nothing(self):
        self.assertEqual(run_tests.count("Traceback\n"), (0, 0, 0))


class CommandTests(unittest.TestCase):
    def setUp(self):
        temp_dir = tempfile.TemporaryDirectory()
        self.addCleanup(temp_dir.cleanup)
        self.tree = pathlib.Path(temp_dir.name)
        (self.tree / "tests").mkdir()

    def write_runtests(self, output, code=0):
        script = RUNTESTS.format(output=output, code=code)
        (self.tree / "tests" / "runtests.py").write_text(script)

    def call(self, *arguments):
        """Return the exit code, and what was written to stdout and stderr."""
        stdout, stderr = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            mock.patch("run_tests.unwind_on_termination"),
        ):
            code = run_tests.main(["--tree", str(self.tree), *arguments])
        stdout.flush()
        return code, stdout.buffer.getvalue().decode(), stderr.getvalue()

    def test_passed(self):
        self.write_runtests("Ran 5 tests in 1s\n\nOK (skipped=1)")
        code, stdout, stderr = self.call("sqlite-memory", "basic", "--", "-k", "name")
        self.assertEqual((code, stderr), (0, ""))
        self.assertIn("'basic', '-k', 'name'] {'ENGINE'", stdout)
        self.assertEqual(
            stdout.splitlines()[-1], "sqlite-memory: 4 passed, 0 failed, 1 skipped"
        )

    def test_failed(self):
        """The exit code is that of runtests.py."""
        self.write_runtests("Ran 5 tests in 1s\n\nFAILED (errors=2)", code=3)
        code, stdout, _ = self.call("sqlite", "basic")
        self.assertEqual(code, 3)
        self.assertIn("sqlite: 3 passed, 2 failed, 0 skipped", stdout)

    def test_hang(self):
        """The stacks show where."""
        (self.tree / "tests" / "runtests.py").write_text(STUCK)
        with mock.patch("shown.STALL_TIMEOUT", 1):
            code, stdout, _ = self.call("sqlite", "basic")
        self.assertEqual(code, 1)
        self.assertIn("has written nothing for 1 seconds", stdout)
        self.assertIn("in stuck", stdout)

    def test_no_test_ran(self):
        """A run without tests is a failure, whatever runtests.py thinks."""
        self.write_runtests("Ran 0 tests in 0s\n\nNO TESTS RAN")
        code, _, stderr = self.call("sqlite", "basic")
        self.assertEqual((code, stderr), (1, "run_tests.py: No test was run.\n"))

    def test_upstream(self):
        self.write_runtests("Ran 1 test in 0s\n\nOK")
        _, stdout, _ = self.call("sqlite", "mine", "--upstream")
        self.assertIn("'mine', 'transactions', 'transaction_hooks'", stdout)

    def test_sqlite_file(self):
        """Writers queue, and the tests run in one process."""
        self.write_runtests("Ran 1 test in 0s\n\nOK")
        _, stdout, _ = self.call("sqlite", "basic")
        for expected in ("--parallel=1", "IMMEDIATE", "other.sqlite3"):
            self.assertIn(expected, stdout)

    def test_no_labels(self):
        with mock.patch("run_tests.own_labels", return_value=[]):
            code, _, stderr = self.call("sqlite")
        self.assertEqual(code, 2)
        self.assertIn("There are no test apps in", stderr)

    def test_no_tree(self):
        code, _, stderr = self.call("sqlite", "basic")
        self.assertEqual(code, 2)
        self.assertIn(f"scripts/materialise.py --dir {self.tree}", stderr)

    def test_no_server(self):
        self.write_runtests("")
        url = f"postgresql:///name?host={self.tree}"
        with mock.patch.dict(os.environ, DATABASE_URL=url):
            code, _, stderr = self.call("postgres", "basic")
        self.assertEqual(code, 2)
        self.assertIn("does not answer", stderr)

    def test_not_materialised(self):
        with mock.patch("run_tests.subprocess.run") as run:
            run.return_value.returncode = 1
            with self.assertRaisesRegex(run_tests.TestsError, "materialised"):
                run_tests.materialise(self.tree)


class DatabaseTests(unittest.TestCase):
    def test_on_server(self):
        """Two runs can share a server, and its databases are not used."""
        databases = run_tests.on_server({"NAME": "mine"}, CHARSET="utf8mb4")
        names = {alias: entry["TEST"]["NAME"] for alias, entry in databases.items()}
        self.assertEqual(
            names,
            {
                "default": f"test_default_{os.getpid()}",
                "other": f"test_other_{os.getpid()}",
            },
        )
        self.assertEqual(databases["other"]["NAME"], "mine")
        self.assertEqual(databases["other"]["TEST"]["CHARSET"], "utf8mb4")


if __name__ == "__main__":
    unittest.main()
