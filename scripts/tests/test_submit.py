from fixture import ChainTestCase


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
