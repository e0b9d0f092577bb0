import re
import unittest
from importlib.util import find_spec

import verification
from chain import ROOT, Chain, Unusable
from fixture import ChainTestCase, header
from test_run_prefixes import MODULES, RUNTESTS


class SubmitTests(ChainTestCase):
    def test_mails(self):
        self.assertIn("2 patches, applied and compared", self.assertSucceeds("submit"))
        path = self.repository.root / "build" / "submit" / "series.mbox"
        mails = path.read_text()
        self.assertEqual(mails.count(f"From {'0' * 40} "), 2)
        self.assertIn("Subject: [PATCH 1/2] Refs #35629 -- Made twenty a name.", mails)
        self.assertIn("+++ b/django/db/belonging.py\n", mails)
        self.assertIn("+++ b/docs/howto/blocks.txt\n", mails)
        first = path.read_bytes()
        self.assertSucceeds("submit", "--output", self.repository.home / "mails")
        self.assertEqual((self.repository.home / "mails").read_bytes(), first)

    def test_applies_with_plain_git(self):
        self.assertSucceeds("submit")
        git = self.repository.git
        expected = git("rev-parse", "HEAD^{tree}")
        git("reset", "--hard", "--quiet", "pristine")
        git("am", "--quiet", "../submit/series.mbox")
        self.assertEqual(git("rev-parse", "HEAD^{tree}"), expected)

    def test_message_that_mail_cuts(self):
        self.repository.edit_patch("There is a reason.", "Index: a reason.")
        self.assertFails(1, ["git am makes other messages"], "submit")

    def test_patch_does_not_apply(self):
        self.repository.edit_patch("-line_20 = 20", "-line_20 = 21")
        self.assertFails(1, ["django/db/utils.py: the hunk '@@ -17'"], "submit")

    def test_empty_series(self):
        self.repository.git("reset", "--hard", "--quiet", "pristine")
        self.assertSucceeds("export")
        self.assertFails(2, ["The series is empty"], "submit")


class KitTests(unittest.TestCase):
    """docs/submitting.md."""

    def test_commits(self):
        """Its table names the commits of the series, in their order."""
        text = (ROOT / "docs" / "submitting.md").read_text()
        rows = re.findall(r"^\|.*\| (\d+) \| (.*) \| (.*) \|$", text, re.MULTILINE)
        self.assertEqual(
            [f"{ticket} -- {subject}" for _, ticket, subject in rows],
            [patch.header.subject for patch in Chain.load(ROOT).patches],
        )
        self.assertEqual(
            [int(number) for number, _, _ in rows], list(range(1, len(rows) + 1))
        )


class SelectTests(unittest.TestCase):
    def test_all(self):
        self.assertEqual(verification.select(3, None, 1), [1, 2, 3])

    def test_from(self):
        self.assertEqual(verification.select(3, None, 3), [3])

    def test_only(self):
        self.assertEqual(verification.select(3, [3, 1], 1), [3, 1])

    def test_no_such_patch(self):
        for only, first in (([4], 1), ([0], 1), (None, 4), (None, 0)):
            with self.subTest(only=only, first=first), self.assertRaises(Unusable):
                verification.select(3, only, first)


class VerifyTests(ChainTestCase):
    def verify(self, code, *args, **env):
        """Return the output of a verification that ends with a code."""
        process = self.repository.run("submit", "--verify", *args, **env)
        self.assertEqual(process.returncode, code, process.stdout + process.stderr)
        self.assertNotIn("Traceback", process.stderr)
        return process.stdout + process.stderr

    def commit(self, files, adds="none"):
        """Make a third commit."""
        self.repository.commit(header("Made a third.", adds), files)
        self.assertSucceeds("export")

    def test_applies(self):
        output = self.verify(0, "--checks", "applies")
        self.assertIn("1  made-twenty-a-name.patch      applies: ok\n", output)
        self.assertIn("2  made-thirty-a-name-too.patch  applies: ok\n", output)
        self.assertIn("2 of 2 commits verified.", output)
        build = self.repository.root / "build"
        self.assertFalse((build / "submit").exists())

    def test_one_does_not_apply(self):
        """The other one does, on the commit that its mail doesn't make."""
        self.repository.edit_patch("There is a reason.", "Index: a reason.")
        output = self.verify(1, "--checks", "applies")
        self.assertIn("git am makes another commit of its mail.", output)
        self.assertRegex(output, r"(?m)^  1 .* applies: FAILED$")
        self.assertRegex(output, r"(?m)^  2 .* applies: ok$")
        self.assertIn("error: not sound on their own: 1\n", output)
        self.verify(0, "--checks", "applies", "--from", "2")

    @unittest.skipUnless(
        all(map(find_spec, verification.NEEDED["lint"])), "The linters are required."
    )
    def test_lint(self):
        """Each commit answers for what it does itself."""
        self.commit({"tests/blocks/more.py": "import sys\nimport os\nx=os\n"})
        output = self.verify(1, "--checks", "lint")
        self.assertEqual(output.count("F821: undefined name 'twenty'"), 1)
        self.assertEqual(output.count("F821: undefined name 'thirty'"), 1)
        self.assertIn("tests/blocks/more.py: black would change it.", output)
        self.assertIn("tests/blocks/more.py: isort would change it.", output)
        self.assertIn("tests/blocks/more.py:1:F401: 'sys' imported", output)
        self.assertIn("not sound on their own: 1, 2, 3", output)

    def run_tests(self, expected, **result):
        self.repository.edit(
            "tests/runtests.py",
            "import sys\n\nsys.exit()\n",
            RUNTESTS.format(**result),
        )
        self.commit(MODULES)
        return self.verify(expected, "--only", "3", "--checks", "applies,tests")

    @unittest.skipUnless(find_spec("tblib"), "tblib is required.")
    def test_tests(self):
        output = self.run_tests(0, output="Ran 4 tests in 0.1s\n\nOK", code=0)
        self.assertIn("\nlabels: blocks\n", output)
        self.assertIn("applies: ok      tests: ok\n", output)
        self.assertIn("1 of 3 commits verified.", output)

    @unittest.skipUnless(find_spec("tblib"), "tblib is required.")
    def test_tests_fail(self):
        output = "Ran 4 tests in 0.1s\n\nFAILED (failures=1)"
        output = self.run_tests(1, output=output, code=1)
        self.assertIn("sqlite-memory: 3 passed, 1 failed, 0 skipped", output)
        self.assertIn("applies: ok      tests: FAILED\n", output)

    @unittest.skipUnless(
        all(map(find_spec, verification.NEEDED["docs"])), "Sphinx is required."
    )
    def test_docs(self):
        """They're built if a commit touches them: these can't be."""
        # Sphinx leaves its traceback there.
        output = self.verify(1, "--checks", "docs", TMPDIR=str(self.repository.home))
        self.assertRegex(output, r"(?m)^  1 .* docs: -$")
        self.assertRegex(output, r"(?m)^  2 .* docs: FAILED$")
        self.assertIn("Sphinx failed", output)

    def test_unusable(self):
        for args, message in (
            (
                ["--verify", "--checks", "applies", "--only", "3"],
                "There is no patch 3.",
            ),
            (["--verify", "--checks", "applies,luck"], "luck: no such check."),
            (["--only", "1"], "--checks and --database require --verify."),
        ):
            with self.subTest(args=args):
                self.assertFails(2, [message], "submit", *args)
