"""
A project that is tested with pytest-django and pytest-asyncio: see
pytest_project.
"""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import unittest
from xml.etree import ElementTree

import postgres
import run_tests

PROJECT = pathlib.Path(__file__).resolve().parent / "pytest_project"

# Seconds, for a run that takes five.
TIMEOUT = 300


def setUpModule():
    """Create the fork, and the release that it's made of."""
    global FORK, STOCK
    directory = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(directory.cleanup)
    FORK = pathlib.Path(directory.name) / "fork"
    STOCK = pathlib.Path(directory.name) / "stock"
    run_tests.materialise(FORK)
    archive = subprocess.run(
        ["git", "archive", "pristine"], cwd=FORK, capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(STOCK, filter="data")


class Run:
    """The results of the project's tests, on one tree and one database."""

    def __init__(self, tree, databases, *arguments):
        with tempfile.TemporaryDirectory() as directory:
            report = pathlib.Path(directory) / "report.xml"
            process = subprocess.run(
                [
                    *(sys.executable, "-m", "pytest"),
                    *("-p", "no:cacheprovider", f"--junitxml={report}"),
                    *arguments,
                ],
                cwd=PROJECT,
                env={
                    **os.environ,
                    "DATABASES": json.dumps(databases),
                    "PYTHONPATH": str(tree),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT,
            )
            self.output = process.stdout
            # That tests failed is no error of pytest.
            if process.returncode not in (0, 1):
                raise AssertionError(self.output)
            cases = list(ElementTree.parse(report).iter("testcase"))
        # What fails after a test is reported under its name, once more.
        self.names = {self.name(case) for case in cases}
        self.failed = {
            self.name(case)
            for case in cases
            if any(element.tag in ("error", "failure") for element in case)
        }

    def name(self, case):
        return f"{case.get('classname')}.{case.get('name')}"

    def count(self, module):
        return sum(name.startswith(f"{module}.") for name in self.names)


class ProjectTestsMixin:
    def test_stock(self):
        """What works today, and that the tests of `db` need the fork."""
        run = Run(
            STOCK, self.databases(), "test_today.py", "test_async.py::test_connection"
        )
        self.assertEqual(
            run.failed,
            {f"test_async.test_connection[{number}]" for number in (1, 2)},
            run.output,
        )
        self.assertEqual(run.count("test_today"), 24)

    def test_fork(self):
        run = Run(FORK, self.databases())
        self.assertEqual(run.failed, set(), run.output)
        self.assertEqual(run.count("test_today"), 24)
        self.assertEqual(run.count("test_async"), 20)
        self.assertEqual(run.count("test_blocks"), 18)


class SQLiteMemoryTests(ProjectTestsMixin, unittest.TestCase):
    def databases(self):
        return run_tests.sqlite_memory()


class SQLiteFileTests(ProjectTestsMixin, unittest.TestCase):
    def databases(self):
        directory = self.enterContext(tempfile.TemporaryDirectory())
        return run_tests.sqlite_file(pathlib.Path(directory))


class PostgreSQLTests(ProjectTestsMixin, unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.url = cls.enterClassContext(postgres.server())

    def databases(self):
        return run_tests.on_server(postgres.database_settings(self.url))


if __name__ == "__main__":
    unittest.main()
