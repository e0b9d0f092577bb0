import unittest

import run_prefixes
import run_tests
from chain import ROOT, Chain
from fixture import ChainTestCase, header

# It answers with the output of a run, and an exit code.
RUNTESTS = """\
import sys

print("labels:", *sys.argv[2:])
print({output!r})
sys.exit({code})
"""

# What is imported before the tests are run, and the small Django lacks.
MODULES = dict.fromkeys(
    ["django/core/handlers/asgi.py", "django/db/transaction.py", "django/test.py"], ""
)


class LabelTests(unittest.TestCase):
    def test_each_once(self):
        patches = Chain.load(ROOT).patches[:2]
        labels = run_prefixes.labels_of(patches)
        self.assertIn("db_belonging", labels)
        self.assertEqual(len(labels), len(set(labels)))

    def test_run_with_upstream(self):
        """run_tests.py --upstream leaves none of them out."""
        labels = run_prefixes.labels_of(Chain.load(ROOT).patches)
        run = run_tests.own_labels() + run_tests.AFFECTED
        self.assertEqual([label for label in labels if label not in run], [])


class CommandTests(ChainTestCase):
    """The third patch makes Django importable and its tests run."""

    def call(self, *arguments, output="Ran 4 tests in 0.1s\n\nOK (skipped=1)", code=0):
        """Return the exit code, and what was written to stdout and stderr."""
        self.repository.edit(
            "tests/runtests.py",
            "import sys\n\nsys.exit()\n",
            RUNTESTS.format(output=output, code=code),
        )
        message = header("Made Django run.").replace("Tests: blocks", "Tests: more")
        self.repository.commit(message, MODULES)
        self.assertSucceeds("export")
        process = self.repository.run("run_prefixes", "sqlite-memory", *arguments)
        return process.returncode, process.stdout, process.stderr

    def assertSummary(self, stdout, *lines):
        self.assertEqual(stdout.splitlines()[-len(lines) :], list(lines))

    def test_passed(self):
        """The labels are those of all patches of the prefix."""
        code, stdout, stderr = self.call("--first", "3")
        self.assertEqual((code, stderr), (0, ""))
        self.assertIn("\nlabels: blocks more\n", stdout)
        self.assertSummary(
            stdout, "", "[3/3] made-django-run.patch: 3 passed, 0 failed, 1 skipped"
        )

    def test_each_prefix(self):
        """One that fails doesn't keep the next from being tested."""
        code, stdout, stderr = self.call()
        self.assertEqual(code, 1)
        self.assertEqual(stderr.count("ModuleNotFoundError"), 2)
        self.assertSummary(
            stdout,
            "",
            "[1/3] made-twenty-a-name.patch: cannot be imported",
            "[2/3] made-thirty-a-name-too.patch: cannot be imported",
            "[3/3] made-django-run.patch: 3 passed, 0 failed, 1 skipped",
        )

    def test_failed(self):
        output = "Ran 4 tests in 0.1s\n\nFAILED (failures=1)"
        code, stdout, _ = self.call("--first", "3", output=output, code=1)
        self.assertEqual(code, 1)
        self.assertSummary(
            stdout, "[3/3] made-django-run.patch: 3 passed, 1 failed, 0 skipped"
        )

    def test_no_test_ran(self):
        code, stdout, _ = self.call("--first", "3", output="")
        self.assertEqual(code, 1)
        self.assertSummary(
            stdout, "[3/3] made-django-run.patch: 0 passed, 0 failed, 0 skipped"
        )

    def test_no_such_patch(self):
        code, _, stderr = self.call("--first", "1000")
        self.assertEqual(code, 2)
        self.assertIn("There is no patch 1000.", stderr)


if __name__ == "__main__":
    unittest.main()
