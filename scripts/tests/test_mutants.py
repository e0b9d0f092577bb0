import contextlib
import io
import re
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from chain import ROOT, Chain, Unusable
from gittree import Git, apply_patch
from rounds import mutants
from upstream import fetch, read_sdist

MUTANT = """\
The number is another one.

Promise: 1
Caught by: sqlite-memory numbers

diff --git a/django/number.py b/django/number.py
--- a/django/number.py
+++ b/django/number.py
@@ -1 +1 @@
-number = 1
+number = {number}
"""

# It notices an even number, and hangs if it's negative.
RUNTESTS = """\
import time

exec(open("../django/number.py").read())
print("test_number (numbers.Tests.test_number) ... ", flush=True)
if number < 0:
    time.sleep(60)
if number % 2 == 0:
    print("FAIL: test_number (numbers.Tests.test_number)")
print("Ran 1 test in 0.1s")
raise SystemExit(number % 2 == 0)
"""


class PatchTests(unittest.TestCase):
    """Those of this repository."""

    def test_headers(self):
        found = mutants.load()
        self.assertGreaterEqual(len(found), 20)
        promises = {int(mutant.promise) for mutant in found}
        self.assertEqual(promises, set(range(1, 18)))

    def test_labels(self):
        """They name tests that there are."""
        for mutant in mutants.load():
            for label in mutant.labels:
                with self.subTest(mutant.name, label=label):
                    app, module, *names = label.split(".")
                    source = (ROOT / "tests" / app / f"{module}.py").read_text()
                    defined = re.findall(r"(?:class|def) (\w+)\(", source)
                    self.assertLessEqual(set(names), set(defined))

    def test_apply(self):
        found = mutants.load()
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name)
            write_files(tree, {path for mutant in found for path in mutant.paths})
            for mutant in found:
                with self.subTest(mutant.name), mutants.applied(mutant, tree):
                    for path in mutant.paths:
                        compile((tree / path).read_bytes(), path, "exec")


def write_files(tree, paths):
    """Write files of the materialised tree, which takes long as a whole."""
    chain = Chain.load()
    sources = {path: chain.ours[path].read_bytes() for path in paths & set(chain.ours)}
    for path, _, source in read_sdist(fetch(chain.upstream)):
        if path in paths:
            sources[path] = source
    for path, source in sources.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(source)
    for patch in chain.patches:
        for edit in patch.edits:
            if edit.path in paths:
                apply_patch(Git(tree), patch, only=edit.path)


class ParseTests(unittest.TestCase):
    def parse(self, old="", new=""):
        return mutants.Mutant.parse("name", MUTANT.replace(old, new))

    def test_parse(self):
        mutant = self.parse()
        self.assertEqual(mutant.what, "The number is another one.")
        self.assertEqual(mutant.database, "sqlite-memory")
        self.assertEqual(mutant.labels, ["numbers"])
        self.assertEqual(mutant.paths, ["django/number.py"])

    def test_several_labels(self):
        mutant = self.parse("numbers", "numbers\n  letters")
        self.assertEqual(mutant.labels, ["numbers", "letters"])

    def test_unusable(self):
        for old, new in [
            ("another one.", "another one"),
            ("Promise: 1\n", ""),
            (" numbers", ""),
            ("sqlite-memory", "dbase"),
        ]:
            with self.subTest(old):
                with self.assertRaises(Unusable):
                    self.parse(old, new)


class RunTests(unittest.TestCase):
    """A tree of two files, whose tests are quick."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.tree = Path(folder.name, "tree")
        self.patches = Path(folder.name, "patches")
        self.patches.mkdir()
        for path, text in [
            ("django/number.py", "number = 1\n"),
            ("tests/runtests.py", RUNTESTS),
        ]:
            (self.tree / path).parent.mkdir(parents=True)
            (self.tree / path).write_text(text)

    def run_mutants(self, only=None, **numbers):
        """Return the exit status, and what was written."""
        for name, number in numbers.items():
            text = MUTANT.format(number=number)
            (self.patches / f"{name}.patch").write_text(text)
        options = SimpleNamespace(only=only, list=False)
        load = mutants.load
        output = io.StringIO()
        with (
            mock.patch.object(
                mutants, "load", lambda only: load(self.patches, only=only)
            ),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            status = mutants.main(options, self.tree)
        return status, output.getvalue()

    def test_caught(self):
        status, output = self.run_mutants(two=2, four=4)
        self.assertEqual(status, 0, output)
        self.assertIn("2 caught, 0 survived, 0 did not run", output)
        for name in ("two", "four"):
            line = rf"(?m)^{name} +1 +numbers\.Tests\.test_number +\d+$"
            self.assertRegex(output, line)
        # It was a copy.
        self.assertIn("number = 1", (self.tree / "django/number.py").read_text())

    def test_survived(self):
        status, output = self.run_mutants(two=2, three=3)
        self.assertEqual(status, 1, output)
        self.assertIn("1 caught, 1 survived, 0 did not run", output)
        self.assertRegex(output, r"(?m)^three +1 +SURVIVED +\d+$")

    def test_hung(self):
        with mock.patch.object(mutants, "TIME_LIMIT", 1):
            status, output = self.run_mutants(negative=-2)
        self.assertEqual(status, 0, output)
        self.assertIn("numbers.Tests.test_number (hung)", output)

    def test_did_not_run(self):
        """What fails before its tests isn't caught by them."""
        status, output = self.run_mutants(broken="]", two=2)
        self.assertEqual(status, 2, output)
        self.assertIn("SyntaxError", output)
        self.assertIn("1 caught, 0 survived, 1 did not run", output)

    def test_unbroken_tree_fails(self):
        (self.tree / "django/number.py").write_text("number = 1\n\nnumber = 2\n")
        text = MUTANT.format(number=4).replace("@@ -1 +1 @@", "@@ -1,2 +1,2 @@")
        (self.patches / "four.patch").write_text(text + " \n")
        status, output = self.run_mutants()
        self.assertEqual(status, 1, output)
        self.assertIn("have to pass on the unbroken tree", output)

    def test_does_not_apply(self):
        (self.tree / "django/number.py").write_text("number = 7\n")
        status, output = self.run_mutants(two=2)
        self.assertEqual(status, 2)
        self.assertIn("two.patch doesn't apply", output)

    def test_only(self):
        status, output = self.run_mutants(only=["four"], two=2, four=4)
        self.assertIn("1 caught, 0 survived", output)
        status, output = self.run_mutants(only=["five"])
        self.assertEqual(status, 2)
        self.assertIn("There is no mutant 'five'", output)

    def test_list(self):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            mutants.main(SimpleNamespace(only=["turns-off"], list=True), None)
        self.assertRegex(output.getvalue(), r"(?m)^turns-off +3 +The turn is ")
