import contextlib
import io
import os
import pathlib
import random
import tempfile
import unittest
from unittest import mock

import gauntlet
import run_tests
from rounds import invariants
from rounds.base import Violation

TESTS = pathlib.Path(__file__).resolve().parent

tree = None


def setUpModule():
    global tree

    temp_dir = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(temp_dir.cleanup)
    tree = pathlib.Path(temp_dir.name, "django")
    with contextlib.redirect_stdout(io.StringIO()):
        run_tests.materialise(tree)


def call(*arguments, tree_argument=None):
    """Return the exit code, and what was written to stdout and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch("gauntlet.unwind_on_termination"),
    ):
        try:
            code = gauntlet.main(["--tree", str(tree_argument or tree), *arguments])
        except SystemExit as exit:
            code = exit.code
    return code, stdout.getvalue(), stderr.getvalue()


class CaseTests(unittest.TestCase):
    """Run rounds of gauntlet_cases."""

    def call(self, kind, *arguments):
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        with (
            mock.patch("gauntlet.PACKAGE", "gauntlet_cases"),
            mock.patch.dict(os.environ, PYTHONPATH=path),
        ):
            return call(
                *("--only", kind, "--database", "sqlite", "--seed", "7"),
                *("--seconds", "1", "--rounds", "2", *arguments),
            )

    def assertViolated(self, result, *expected):
        code, stdout, stderr = result
        self.assertEqual((code, stderr), (1, ""))
        for text in expected:
            self.assertIn(text, stdout)

    def test_passing(self):
        """The rounds have seeds of their own, and empty databases."""
        code, stdout, stderr = self.call("passing")
        self.assertEqual((code, stderr), (0, ""))
        self.assertIn("passing sqlite thread, seed 7, 1 s", stdout)
        self.assertIn("passing sqlite thread, seed 8, 1 s", stdout)
        self.assertRegex(
            stdout.splitlines()[-1],
            r"^passing  sqlite    thread  2       0           2 numbers\b",
        )

    def test_failing(self):
        """The first violation ends the run, and can be replayed."""
        self.assertViolated(
            self.call("failing"),
            "VIOLATION: It fails.\n",
            "Seed 7 says so.",
            "python scripts/gauntlet.py --only failing --database sqlite --mode thread "
            f"--seed 7 --seconds 1 --rounds 1 --tree {tree}\n",
            "failing  sqlite    thread  1       1",
        )

    def test_hanging(self):
        """The stacks show where."""
        with mock.patch("gauntlet.MARGIN", 10):
            self.assertViolated(
                self.call("hanging"),
                "VIOLATION: The round didn't end in time, and was aborted.\n",
                "in wait_for_nobody",
                "--only hanging",
            )

    def test_dying(self):
        self.assertViolated(
            self.call("dying"), "ended without a result, with the exit code 3."
        )

    def test_forgetful(self):
        self.assertViolated(self.call("forgetful"), "forgotten' was never awaited")

    def test_keeping(self):
        self.assertViolated(self.call("keeping"), "2 more descriptors: pipe:[N]")

    def test_holding(self):
        """A reproduction shows what refers to an object that's held."""
        result = self.call("holding")
        self.assertViolated(
            result, "base.DatabaseWrapper (", "module <module 'gauntlet_cases.holding'"
        )

    def test_list(self):
        code, stdout, stderr = self.call("passing", "--list")
        self.assertEqual((code, stdout), (0, "passing sqlite thread\n"))


class CommandTests(unittest.TestCase):
    def test_unknown_option(self):
        code, _, stderr = call("--no-such-option")
        self.assertEqual(code, 2)
        self.assertIn("--no-such-option", stderr)

    def test_unknown_kind(self):
        code, _, stderr = call("--only", "gold")
        self.assertEqual(code, 2)
        self.assertIn("There are no rounds called 'gold'", stderr)

    def test_not_there(self):
        """Native mode is PostgreSQL's."""
        code, _, stderr = call("--database", "sqlite", "--mode", "native")
        self.assertEqual(code, 2)
        self.assertIn("There are no such rounds.", stderr)

    def test_no_tree(self):
        code, _, stderr = call(tree_argument=TESTS)
        self.assertEqual(code, 2)
        self.assertIn(f"scripts/materialise.py --dir {TESTS}", stderr)

    def test_no_server(self):
        url = f"postgresql:///name?host={TESTS}"
        with mock.patch.dict(os.environ, DATABASE_URL=url):
            code, _, stderr = call("--only", "programs", "--database", "postgres")
        self.assertEqual(code, 2)
        self.assertIn("does not answer", stderr)


class Thing:
    pass


class MemoryTests(unittest.TestCase):
    def count(self, operate, number=8):
        counts = []
        for _ in range(number):
            for _ in range(100):
                operate()
            counts.append(invariants.Count())
        return counts

    def test_flat(self):
        counts = self.count(list)
        self.assertLess(invariants.check_growth(counts, 400), 100)
        self.assertEqual(invariants.check_growth(counts[:1] * 7, 400), 0)

    def test_objects(self):
        """One for each operation is too much."""
        leaked = []
        counts = self.count(lambda: leaked.append(Thing()))
        with self.assertRaises(Violation) as cm:
            invariants.check_growth(counts, 400)
        self.assertIn("400 more: test_gauntlet.Thing", cm.exception.message)

    def test_blocks(self):
        """The garbage collector doesn't know numbers."""
        leaked = []
        counts = self.count(lambda: leaked.extend(random.random() for _ in range(10)))
        with self.assertRaises(Violation) as cm:
            invariants.check_growth(counts, 400)
        self.assertIn(" more blocks", cm.exception.message)

    def test_once(self):
        """What's created once isn't lost."""
        kept = []
        counts = self.count(list, 2)
        kept += [Thing() for _ in range(500)]
        counts += self.count(list, 6)
        with self.assertRaises(Violation):
            invariants.check_growth(counts, 400)
        self.assertLess(invariants.check_growth(counts[2:], 300), 100)


class ProgramsTests(unittest.TestCase):
    def test_programs(self):
        code, stdout, stderr = call(
            *("--only", "programs", "--database", "sqlite", "--seed", "1"),
            *("--seconds", "2", "--rounds", "1"),
        )
        self.assertEqual((code, stderr), (0, ""), stdout)
        self.assertRegex(stdout, r"\d+ programs, \d+ steps, \d+ sync programs")


if __name__ == "__main__":
    unittest.main()
