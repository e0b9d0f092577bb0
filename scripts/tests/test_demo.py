import ast
import contextlib
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import demo
import own_server
import postgres


def result(*kept, version="6.1.3", load=True):
    """Return what a worker reports."""
    answers = [
        {"question": f"Question {number}?", "kept": value, "observed": "Observed."}
        for number, value in enumerate(kept, 1)
    ]
    return {
        "packages": [f"Django {version}"],
        "python": "3.13.0",
        "postgresql": "18.6",
        "answers": answers,
        "load": {
            "title": "10 transactions",
            "seconds": 0.254,
            "threads": 7,
            "stall": 0.0306,
            "kept": load,
        },
    }


class OutputMixin:
    def call(self, function, *args):
        """Return the result, and what was written to stdout and stderr."""
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            value = function(*args)
        return value, stdout.getvalue(), stderr.getvalue()


class ReportTests(OutputMixin, unittest.TestCase):
    def report(self, stock, fork, native=None, differences=(), **others):
        """Return the exit code, and what was written to stdout and stderr."""
        results = {
            "Stock Django": stock,
            "Thread mode": fork,
            "Native mode": native or fork,
            **others,
        }
        with mock.patch("demo.readme_differences", return_value=differences):
            return self.call(demo.report, results)

    def test_kept(self):
        code, stdout, _ = self.report(
            result(False, True, load=False),
            result(True, True, version="6.1.3+aatomic.1"),
        )
        self.assertEqual(code, 0)
        self.assertIn("Stock Django: Django 6.1.3 ", stdout)
        self.assertIn(" 6.1.3+aatomic.1 ", stdout)
        self.assertIn(
            "As promised: Stock Django 1 of 2, Thread mode 2 of 2, Native mode 2 of 2.",
            stdout,
        )

    def test_broken(self):
        code, stdout, _ = self.report(result(True), result(False), result(True))
        self.assertEqual(code, 1)
        self.assertIn("Thread mode 0 of 1", stdout)

    def test_broken_in_native_mode(self):
        code, stdout, _ = self.report(result(True), result(True), result(False))
        self.assertEqual(code, 1)
        self.assertIn("Native mode 0 of 1", stdout)

    def test_load_broken(self):
        for index, name in ((1, "Thread mode: "), (2, "Native mode: ")):
            results = [result(True), result(True), result(True)]
            results[index]["load"]["kept"] = False
            code, stdout, _ = self.report(*results)
            with self.subTest(name=name):
                self.assertEqual(code, 1)
                self.assertIn(f"\n{name}The transactions ", stdout)

    def test_fork_fails(self):
        for index, name in ((1, "Thread mode: "), (2, "Native mode: ")):
            results = [result(True), result(True), result(True)]
            results[index] = {"error": "Traceback"}
            code, _, stderr = self.report(*results)
            with self.subTest(name=name):
                self.assertEqual(code, 1)
                self.assertIn(f"demo.py: {name}Traceback", stderr)

    def test_stock_fails(self):
        code, _, stderr = self.report({"error": "Traceback"}, result(True))
        self.assertEqual(code, 2)
        self.assertIn("demo.py: Stock Django: Traceback", stderr)

    def test_other_breaks(self):
        """Nobody but the fork has promised anything."""
        others = {demo.ASYNC_BACKEND: result(False)}
        code, stdout, _ = self.report(result(True), result(True), **others)
        self.assertEqual(code, 0)
        self.assertIn("django-async-backend 0 of 1", stdout)

    def test_other_fails(self):
        others = {demo.ASYNC_BACKEND: {"error": "Traceback"}}
        code, stdout, stderr = self.report(result(True), result(True), **others)
        self.assertEqual(code, 0)
        self.assertIn("demo.py: django-async-backend: Traceback", stderr)
        self.assertNotIn("django-async-backend", stdout)

    def test_readme_differs(self):
        code, stdout, _ = self.report(
            result(True), result(True), differences=["Stock Django: no"]
        )
        self.assertEqual(code, 1)
        self.assertIn("says otherwise:\nStock Django: no", stdout)

    def test_table(self):
        results = {
            "Stock Django": result(False, True),
            "Thread mode": result(True, True),
        }
        lines = list(demo.table(results, 100))
        self.assertEqual(max(map(len, lines)), 100)
        columns = [[cell.strip() for cell in line.split("|")] for line in lines]
        self.assertIn(["Question 1?", "NO. Observed.", "Yes. Observed."], columns)

    def test_load_table(self):
        lines = list(
            demo.load_table({"Stock Django": result(), "Thread mode": result()})
        )
        columns = [[cell.strip() for cell in line.split("|")] for line in lines]
        self.assertIn(["Thread mode", "0.25 s", "7", "31 ms"], columns)


class ReadmeTests(unittest.TestCase):
    TABLE = """
| | Stock Django | Native mode |
|-|-|-|
| First | no, both share one | yes |
| Second | yes | yes |
| Threads | one each | 1 in all |
"""

    def differences(self, stock, native, table=TABLE):
        native["load"]["threads"] = 1
        with tempfile.TemporaryDirectory() as name:
            readme = pathlib.Path(name, "README.md")
            readme.write_text(table)
            with mock.patch("demo.README", readme):
                return demo.readme_differences(
                    {"Stock Django": stock, "Native mode": native}
                )

    def test_none(self):
        self.assertEqual(self.differences(result(False, True), result(True, True)), [])

    def test_some(self):
        self.assertEqual(
            self.differences(
                result(True, True),
                result(True, False),
                self.TABLE.replace(
                    "| one each | 1 in all |", "| 1 in all | one each |"
                ),
            ),
            [
                'Stock Django: "First": no',
                'Stock Django: "Threads": 1 in all',
                'Native mode: "Second": yes',
                'Native mode: "Threads": one each',
            ],
        )

    def test_missing_row(self):
        with self.assertRaisesRegex(demo.DemoError, "a row for each question"):
            self.differences(result(True, True, True), result(True, True, True))

    def test_names(self):
        """README.md's table has a column for everybody who is asked."""
        columns = {"", "Stock Django", demo.ASYNC_BACKEND, "Thread mode", "Native mode"}
        for row in demo.readme_table():
            self.assertEqual(set(row), columns)


class PythonTests(OutputMixin, unittest.TestCase):
    def test_old_python_parses(self):
        """An old Python gets as far as the message."""
        for module in (demo, own_server, postgres):
            with self.subTest(module=module.__name__):
                source = pathlib.Path(module.__file__).read_text()
                ast.parse(source, feature_version=(3, 8))

    def test_new_enough(self):
        with mock.patch("os.execv") as execv:
            demo.ensure_python()
        self.assertEqual(execv.mock_calls, [])

    def test_continues_with_newer(self):
        with (
            mock.patch.object(sys, "version_info", (3, 11, 7)),
            mock.patch("demo.find_python", return_value="/python3.13"),
            mock.patch("os.execv") as execv,
            # execv() does not return.
            self.assertRaises(demo.DemoError),
        ):
            execv.side_effect = demo.DemoError
            self.call(demo.ensure_python)
        execv.assert_called_once_with("/python3.13", ["/python3.13", *sys.argv])

    def test_too_old(self):
        with (
            mock.patch.object(sys, "version_info", (3, 11, 7)),
            mock.patch("demo.find_python", return_value=None),
        ):
            code, _, stderr = self.call(demo.main, [])
        self.assertEqual(code, 2)
        self.assertIn("needs Python 3.12 or newer", stderr)
        self.assertIn('run "python3.12 ', stderr)

    def test_find_python(self):
        """A pyenv shim whose version is not active is no Python."""
        with tempfile.TemporaryDirectory() as name:
            shim = pathlib.Path(name) / "python3.13"
            shim.write_text("#!/bin/sh\nexit 127\n")
            shim.chmod(0o755)
            with mock.patch.dict(os.environ, PATH=name, PYENV_VERSION="3.11"):
                self.assertIsNone(demo.find_python("python3.12"))
                self.assertIsNone(demo.find_python("python3.13"))
                shim.write_text("#!/bin/sh\necho /python$PYENV_VERSION\n")
                self.assertEqual(demo.find_python("python3.13"), "/python")


class PreparationTests(unittest.TestCase):
    def test_stock_requirement(self):
        """The fork's own version must not satisfy it."""
        self.assertRegex(demo.stock_requirement(), r"^Django===\d+\.\d+(\.\d+)?$")

    def test_failure(self):
        code = "print('first'); print('no route'); raise SystemExit(1)"
        with self.assertRaises(demo.DemoError) as cm:
            demo.call([sys.executable, "-c", code], "Check the network.")
        self.assertIn("    no route\n\nCheck the network.", str(cm.exception))

    def test_no_network(self):
        with mock.patch.dict(
            os.environ,
            PIP_INDEX_URL="http://127.0.0.1:9/simple",
            PIP_RETRIES="0",
            PIP_CONFIG_FILE=os.devnull,
            PIP_FIND_LINKS="",
        ):
            with self.assertRaises(demo.DemoError) as cm:
                demo.install(sys.executable, "--dry-run", "psycopg===0")
        self.assertIn("check the network", str(cm.exception))


class WorkerTests(unittest.TestCase):
    def run_worker(self, code, *args, **kwargs):
        with tempfile.TemporaryDirectory() as name:
            worker = pathlib.Path(name) / "worker.py"
            worker.write_text(code)
            with mock.patch("demo.WORKER", worker):
                return demo.run_worker(
                    sys.executable, "postgresql:///name", *args, **kwargs
                )

    def test_result(self):
        code = "import json, os; print(json.dumps(os.environ['DATABASE_URL']))"
        self.assertEqual(self.run_worker(code), "postgresql:///name")

    def test_arguments(self):
        code = "import json, sys; print(json.dumps(sys.argv[1:]))"
        self.assertEqual(self.run_worker(code, "--native"), ["--native"])

    def test_tree(self):
        """Only the given tree is imported, whatever PYTHONPATH is."""
        code = "import json, os; print(json.dumps(os.environ.get('PYTHONPATH')))"
        with mock.patch.dict(os.environ, PYTHONPATH="/elsewhere"):
            self.assertIsNone(self.run_worker(code))
            tree = pathlib.Path("/tree")
            self.assertEqual(self.run_worker(code, tree=tree), "/tree")

    def test_crash(self):
        self.assertIn("ZeroDivisionError", self.run_worker("1 / 0")["error"])

    def test_hangs(self):
        with mock.patch("demo.WORKER_TIMEOUT", 0.5):
            result = self.run_worker("import time; time.sleep(600)")
        self.assertEqual(result, {"error": "no answer after 0.5 seconds"})

    def test_no_server(self):
        code = "import sys; print('Start it.', file=sys.stderr); sys.exit(2)"
        with self.assertRaisesRegex(demo.DemoError, "Start it."):
            self.run_worker(code)


class CommandTests(unittest.TestCase):
    def test_help(self):
        result = subprocess.run(
            [sys.executable, demo.__file__, "--help"],
            capture_output=True,
            encoding="utf-8",
        )
        self.assertEqual(result.returncode, 0)
        self.assertIn(demo.__doc__.strip(), result.stdout)
        self.assertIn("--tree", result.stdout)


if __name__ == "__main__":
    unittest.main()
