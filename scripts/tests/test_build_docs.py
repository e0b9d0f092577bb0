import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from fixture import SCRIPTS

sys.path.insert(0, str(SCRIPTS))

import build_docs  # noqa: E402
from gittree import Git  # noqa: E402

CONF = """\
source_suffix = {".txt": "restructuredtext"}
root_doc = "contents"
exclude_patterns = ["_build"]
extensions = ["sphinx.ext.intersphinx"]
# A port that nobody listens to, in place of a network.
intersphinx_mapping = {"python": ("http://127.0.0.1:9", None)}

import sys

if "spelling" in sys.argv:
    extensions.append("sphinxcontrib.spelling")
spelling_warning = True
spelling_word_list_filename = "spelling_wordlist"
"""

CONTENTS = """\
Contents
========

Use :func:`asyncio.run`.

.. toctree::

   topic
"""

TOPIC = """\
Topic
=====

A page.
"""

LINT = """\
import pathlib
import sys

lines = pathlib.Path("topic.txt").read_text().splitlines()
if too_long := [line for line in lines if len(line) > 79]:
    print("Too long:", too_long)
    sys.exit(1)
"""


class BuildDocsTests(unittest.TestCase):
    """A small documentation, in a tree like those of materialise.py."""

    def setUp(self):
        temp_dir = tempfile.TemporaryDirectory()
        self.addCleanup(temp_dir.cleanup)
        self.tree = Path(temp_dir.name, "tree")
        git = Git.create(self.tree)
        self.write("django/__init__.py", "")
        self.write("docs/conf.py", CONF)
        self.write("docs/lint.py", LINT)
        self.write("docs/contents.txt", CONTENTS)
        self.write("docs/spelling_wordlist", "toctree\n")
        self.write("docs/topic.txt", TOPIC)
        git("add", "--all")
        git.commit("Django 6.1.3")
        git("tag", "pristine")

    def write(self, path, content):
        (self.tree / path).parent.mkdir(parents=True, exist_ok=True)
        (self.tree / path).write_text(content)

    def call(self, *arguments):
        command = [sys.executable, SCRIPTS / "build_docs.py", "--tree", self.tree]
        return subprocess.run([*command, *arguments], capture_output=True, text=True)

    def assertProblem(self, *expected):
        process = self.call()
        self.assertEqual(process.returncode, 1, process.stdout + process.stderr)
        for text in expected:
            self.assertIn(text, process.stderr)

    def test_sound(self):
        self.write("docs/topic.txt", f"{TOPIC}\nUse :func:`asyncio.run` here.\n")
        output = self.tree.parent / "output"
        process = self.call("--output", output)
        self.assertEqual(process.returncode, 0, process.stdout + process.stderr)
        self.assertIn("The documentation is sound.", process.stdout)
        self.assertIn("here", (output / "fork/html/topic.html").read_text())
        # Nothing is left in the tree.
        status = subprocess.run(
            ["git", "status", "--short"], cwd=self.tree, capture_output=True, text=True
        )
        self.assertEqual(status.stdout, " M docs/topic.txt\n")

    def test_no_warning(self):
        """Pristine documentation isn't built if there's nothing to compare."""
        self.write("docs/contents.txt", CONTENTS.replace(":func:`asyncio.run`", "it"))
        process = self.call()
        self.assertEqual(process.returncode, 0, process.stdout + process.stderr)
        self.assertNotIn("pristine", process.stdout)

    def test_new_warning(self):
        self.write("docs/topic.txt", f"{TOPIC}\nUse :func:`unknown`.\n")
        self.assertProblem("topic.txt:6", "reference target not found: unknown")
        self.assertNotIn("asyncio.run", self.call().stderr)

    def test_page_in_no_toctree(self):
        self.write("docs/new.txt", TOPIC)
        self.assertProblem("new.txt", "isn't included in any toctree")

    def test_label_removed_that_an_unchanged_page_refers_to(self):
        self.write("docs/topic.txt", f".. _label:\n\n{TOPIC}")
        self.write("docs/contents.txt", f"{CONTENTS}\nSee :ref:`label`.\n")
        git = Git(self.tree)
        git("add", "--all")
        git.commit("Django 6.1.4")
        git("tag", "--force", "pristine")
        self.write("docs/topic.txt", TOPIC)
        self.assertProblem("contents.txt:", "undefined label: 'label'")

    def test_lint(self):
        self.write("docs/topic.txt", f"{TOPIC}\n{'long ' * 20}\n")
        self.assertProblem("Too long:")

    def test_code(self):
        self.write("docs/topic.txt", f"{TOPIC}\nCode::\n\n    f( 'x' )\n")
        self.assertProblem("topic.txt: Requires a rewrite.")

    @unittest.skipUnless(build_docs.can_spell(), "Needs enchant and a dictionary.")
    def test_spelling(self):
        """References that can't be resolved are no matter of spelling."""
        self.write("docs/topic.txt", f"{TOPIC}\nUse :func:`asyncio.run` heer.\n")
        process = self.call()
        self.assertEqual(process.returncode, 1, process.stdout + process.stderr)
        [problem] = process.stderr.partition("problems:\n")[2].splitlines()
        self.assertIn("topic.txt:6: : Spell check: heer: ", problem)

    def test_no_changed_page(self):
        process = self.call()
        self.assertEqual(process.returncode, 2)
        self.assertIn("the fork changes no page", process.stderr)

    def test_not_a_tree(self):
        self.tree = self.tree / "docs"
        process = self.call()
        self.assertEqual(process.returncode, 2)
        self.assertIn("not a tree made by materialise.py", process.stderr)


class WarningTests(unittest.TestCase):
    def test_location_does_not_matter(self):
        known = {"a.txt:1: WARNING: old": "old"}
        warnings = {"b.txt:9: WARNING: old": "old", "b.txt:9: WARNING: new": "new"}
        self.assertEqual(
            build_docs.new_warnings(warnings, known), ["b.txt:9: WARNING: new"]
        )


if __name__ == "__main__":
    unittest.main()
