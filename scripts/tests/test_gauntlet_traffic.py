import contextlib
import io
import pathlib
import tempfile
import unittest
from importlib.util import find_spec
from unittest import mock

import gauntlet
import run_tests
from rounds.base import Violation

MODULES = ["httpx", "uvicorn", "websockets", "wsproto"]

missing = [name for name in MODULES if find_spec(name) is None]

if not missing:
    from rounds import traffic


@unittest.skipIf(missing, f"{missing} is not installed.")
class CheckTests(unittest.TestCase):
    """What makes a round fail."""

    def setUp(self):
        self.round = traffic.Traffic(1, 1, "sqlite", "thread")
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.round.log_path = pathlib.Path(self.directory.name, "log")
        self.round.log_path.touch()

    def assertViolated(self, message, func, *args):
        with self.assertRaises(Violation) as cm:
            func(*args)
        self.assertIn(message, cm.exception.message)
        return cm.exception.reproduction

    def test_names(self):
        known = {"yes": {"a", "b"}, "no": {"c"}, "unknown": {"d", "e"}}
        self.round.compare("It", ["b", "d", "a"], known)
        for found, message in (
            (["a"], "It was confirmed and isn't there: b (1 in all)."),
            (["a", "b", "c"], "It was refused or failed, and is there: c"),
            (["a", "b", "f"], "It is there and was never asked for: f"),
            (["a", "b", "a"], "It is there twice: a"),
        ):
            with self.subTest(found=found):
                self.assertViolated(message, self.round.compare, "It", found, known)

    def test_steps(self):
        """Those around the request are shown."""
        client = traffic.Client(self.round, 0)
        self.round.clients.append(client)
        for number in range(30):
            client.step("POST", f"/{number}/", f"0-{number}")
        known = {"yes": {"0-20"}, "no": set(), "unknown": set()}
        shown = self.assertViolated("0-20", self.round.compare, "It", [], known)
        self.assertIn("POST /19/ 0-19\nPOST /20/ 0-20\nPOST /21/ 0-21\n", shown)
        self.assertNotIn("/22/", shown)

    def test_log(self):
        self.round.log_path.write_text(
            "socket.send() raised exception.\n"
            "Executing <Task finished> took 0.131 seconds\n"
            "Exception ignored in: <generator object cursor_iter at 0x1>\n"
            "Traceback (most recent call last):\n"
            '  File "compiler.py", line 1, in cursor_iter\n'
            "    cursor.close()\n"
            "sqlite3.ProgrammingError: Cannot operate on a closed database.\n"
        )
        self.round.check_log()
        for text in (
            "Traceback (most recent call last):",
            "a.py:1: ResourceWarning: unclosed database in <sqlite3.Connection>",
            "a.py:1: RuntimeWarning: coroutine 'f' was never awaited",
            "Task exception was never retrieved",
            "Exception ignored in: <function f at 0x1>",
        ):
            with self.subTest(text=text):
                with open(self.round.log_path, "a") as log:
                    log.write(f"{text}\n")
                self.assertViolated(
                    f"The server has logged: {text}", self.round.check_log
                )
                lines = self.round.log_path.read_text().splitlines()
                self.round.log_path.write_text("\n".join(lines[:-1]) + "\n")

    def test_more_than(self):
        before = {"held": {"threads": {"a": 1, "b": 2}, "tasks": {"all": 3}}}
        after = {"held": {"threads": {"b": 3}, "tasks": {"all": 3}}}
        self.assertEqual(traffic.more_than(before, after), ["1 'b' of its threads"])
        self.assertEqual(traffic.more_than(after, before), ["1 'a' of its threads"])

    def test_seed(self):
        """It decides everything."""
        first = traffic.Traffic(1, 1, "postgres", "thread")
        again = traffic.Traffic(1, 9, "postgres", "native")
        self.assertEqual(first.options, again.options)
        options = [
            str(traffic.Traffic(seed, 1, "postgres", "thread").options)
            for seed in range(20)
        ]
        self.assertGreater(len(set(options)), 10)
        wanted = [traffic.Client(this, 3).wanted() for this in (first, again)]
        self.assertEqual(wanted[0], wanted[1])


@unittest.skipIf(missing, f"{missing} is not installed.")
class RoundTests(unittest.TestCase):
    def test_round(self):
        stdout = io.StringIO()
        with (
            tempfile.TemporaryDirectory() as directory,
            contextlib.redirect_stdout(stdout),
            mock.patch("gauntlet.unwind_on_termination"),
        ):
            tree = pathlib.Path(directory, "django")
            run_tests.materialise(tree)
            code = gauntlet.main(
                ["--tree", str(tree), "--only", "traffic", "--database", "sqlite"]
                + ["--seed", "5", "--seconds", "2", "--rounds", "1"]
            )
        self.assertEqual(code, 0, stdout.getvalue())
        self.assertRegex(stdout.getvalue(), r"\d+ requests, \d+ orders")
