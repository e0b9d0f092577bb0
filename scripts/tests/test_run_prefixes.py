import contextlib
import io
import unittest
from unittest import mock

import run_prefixes
from chain import ROOT, Chain


class LabelTests(unittest.TestCase):
    def test_each_once(self):
        patches = Chain.load(ROOT).patches[:2]
        labels = run_prefixes.labels_of(patches)
        self.assertIn("db_belonging", labels)
        self.assertEqual(len(labels), len(set(labels)))


class CommandTests(unittest.TestCase):
    def call(self, *arguments):
        stderr = io.StringIO()
        with (
            contextlib.redirect_stderr(stderr),
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch("run_prefixes.unwind_on_termination"),
        ):
            return run_prefixes.main(arguments), stderr.getvalue()

    def test_no_such_patch(self):
        code, message = self.call("sqlite-memory", "--first", "1000")
        self.assertEqual(code, 2)
        self.assertIn("There is no patch 1000.", message)

    def test_last_prefix_that_fails(self):
        last = len(Chain.load(ROOT).patches)
        with mock.patch("run_tests.run_on", return_value=(1, (3, 1, 0))) as run_on:
            code, _ = self.call("sqlite-memory", "--first", str(last))
        self.assertEqual(code, 1)
        run_on.assert_called_once()

    def test_prefix_without_tests(self):
        last = len(Chain.load(ROOT).patches)
        with mock.patch("run_tests.run_on", return_value=(0, (0, 0, 0))):
            code, _ = self.call("sqlite-memory", "--first", str(last))
        self.assertEqual(code, 1)
