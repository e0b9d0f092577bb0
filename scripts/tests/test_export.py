from fixture import ChainTestCase, header

TWENTY = "patches/made-twenty-a-name.patch"
THIRTY = "patches/made-thirty-a-name-too.patch"


class ExportTests(ChainTestCase):
    def test_materialised_tree_changes_no_byte(self):
        content = self.repository.content()
        self.assertIn("0 files changed.", self.assertSucceeds("export"))
        self.assertEqual(self.repository.content(), content)

    def test_content(self):
        content = self.repository.content()
        self.assertEqual(
            sorted(content),
            [
                "django/db/belonging.py",
                "docs/django/howto/blocks.txt",
                THIRTY,
                TWENTY,
                "patches/series",
                "patches/upstream.toml",
                "tests/blocks/tests.py",
            ],
        )
        self.assertEqual(
            content["patches/series"],
            b"made-twenty-a-name.patch\nmade-thirty-a-name-too.patch\n",
        )
        before = "11461f2966c029685cd71c1583e43e469d63e86e"
        after = "e4d4d44a5691bb3c2cd76e314b00ec8347e4358a"
        self.assertEqual(
            content[TWENTY].decode(),
            header(
                "Made twenty a name.", "django/db/belonging.py tests/blocks/tests.py"
            )
            + f"""
diff --git a/django/db/utils.py b/django/db/utils.py
index {before}..{after} 100644
--- a/django/db/utils.py
+++ b/django/db/utils.py
@@ -17,7 +17,7 @@ line_16 = 16
 line_17 = 17
 line_18 = 18
 line_19 = 19
-line_20 = 20
+line_20 = twenty
 line_21 = 21
 line_22 = 22
 line_23 = 23
""",
        )

    def test_new_commit(self):
        self.repository.edit("tests/runtests.py", "import sys\n", "import os, sys\n")
        self.repository.commit(
            header("Made the tests run."), {"tests/blocks/models.py": "x = 1\n"}
        )
        self.assertSucceeds("export")
        content = self.repository.content()
        self.assertIn("made-the-tests-run.patch", content["patches/series"].decode())
        self.assertIn(
            b"\nAdds: tests/blocks/models.py\n",
            content["patches/made-the-tests-run.patch"],
        )
        self.assertEqual(content["tests/blocks/models.py"], b"x = 1\n")
        self.assertSucceeds("check")

    def test_adds_is_wrapped(self):
        names = [f"django/db/a_rather_long_name_{number}.py" for number in range(4)]
        self.repository.commit(header("Made four."), dict.fromkeys(names, ""))
        self.assertSucceeds("export")
        text = self.repository.content()["patches/made-four.patch"].decode()
        self.assertIn(f"Adds: {names[0]} {names[1]}\n    {names[2]} {names[3]}\n", text)
        self.assertSucceeds("check")

    def test_last_content_wins(self):
        """A later commit may edit a file that an earlier one adds."""
        self.repository.edit("tests/runtests.py", "import sys\n", "import os, sys\n")
        self.repository.commit(
            header("Made the tests run."), {"django/db/belonging.py": "owner = 1\n"}
        )
        self.assertSucceeds("export")
        content = self.repository.content()
        self.assertEqual(content["django/db/belonging.py"], b"owner = 1\n")
        self.assertIn(b"\nAdds: none\n", content["patches/made-the-tests-run.patch"])

    def test_commit_without_a_change_of_its_own(self):
        self.repository.commit(
            header("Made nothing."), {"django/db/belonging.py": "owner = 1\n"}
        )
        self.assertFails(
            1, ["Made nothing.", "only touches files that other commits add"], "export"
        )

    def test_file_removed(self):
        self.repository.git("rm", "--quiet", "tests/blocks/tests.py")
        self.repository.git("commit", "--quiet", "--fixup=HEAD^")
        self.repository.git("rebase", "-i", "--autosquash", "--quiet", "pristine")
        self.assertSucceeds("export")
        self.assertNotIn("tests/blocks/tests.py", self.repository.content())
        self.assertIs((self.repository.root / "tests").exists(), False)
        self.assertIn(
            b"\nAdds: django/db/belonging.py\n", self.repository.content()[TWENTY]
        )

    def test_renamed(self):
        """The name follows the subject; the patch of the old one goes."""
        message = self.repository.git("log", "-1", "--format=%B").strip()
        self.repository.git(
            *("commit", "--amend", "--quiet", "--file=-"),
            input=message.replace("Made thirty a name, too.", "Named thirty."),
        )
        self.assertSucceeds("export")
        content = self.repository.content()
        self.assertNotIn(THIRTY, content)
        self.assertIn("patches/named-thirty.patch", content)

    def test_name_is_kept(self):
        root = self.repository.root
        (root / TWENTY).rename(root / "patches" / "twenty.patch")
        self.repository.edit("patches/series", "made-twenty-a-name", "twenty", root)
        self.assertSucceeds("materialise")
        self.assertIn("0 files changed.", self.assertSucceeds("export"))

    def test_fixup(self):
        self.repository.write("django/x.py", "", self.repository.tree)
        self.repository.git("add", "--all")
        self.repository.git("commit", "--quiet", "--fixup=HEAD")
        self.assertFails(1, ["fixup! Refs", "--autosquash"], "export")

    def test_header_field_missing(self):
        for name in ("Adds", "Promises", "Sync-path effect", "Tests"):
            with self.subTest(name=name):
                lines = header("Made x.").splitlines(keepends=True)
                message = "".join(line for line in lines if not line.startswith(name))
                self.repository.commit(message, {"django/x.py": "x = 1\n"})
                self.assertFails(
                    1,
                    ["commit ", "Made x.", f"the field '{name}:' is missing"],
                    "export",
                )
                self.repository.git("reset", "--hard", "--quiet", "HEAD^")

    def test_file_of_django_removed(self):
        self.repository.git("rm", "--quiet", "LICENSE")
        self.repository.commit(header("Removed."))
        self.assertFails(1, ["Removed.", "LICENSE: a patch may only edit"], "export")

    def test_mode_of_a_file_changed(self):
        (self.repository.tree / "LICENSE").chmod(0o755)
        self.repository.commit(header("Made it run."))
        self.assertFails(
            1, ["made-it-run.patch: LICENSE: ", "nor changes the mode"], "export"
        )

    def test_file_outside_of_our_folders(self):
        self.repository.commit(header("Added."), {"notes.txt": ""})
        self.assertFails(1, ["notes.txt: files of ours belong in"], "export")

    def test_file_that_two_commits_claim(self):
        self.repository.commit(
            header("Claimed.", "docs/howto/blocks.txt"), {"django/x.py": ""}
        )
        self.assertFails(1, ["docs/howto/blocks.txt: claimed by commit"], "export")

    def test_merge(self):
        git = self.repository.git
        git("checkout", "--quiet", "-b", "side", "HEAD^")
        self.repository.commit(header("Made x."), {"django/x.py": "x = 1\n"})
        git("checkout", "--quiet", "main")
        git("merge", "--quiet", "--no-ff", "-m", "Merged.", "side")
        self.assertFails(1, ["A merge cannot become a patch"], "export")

    def test_dirty_tree(self):
        self.repository.write("django/x.py", "", self.repository.tree)
        self.assertFails(2, ["has uncommitted changes", "django/x.py"], "export")

    def test_repository_changed_meanwhile(self):
        self.repository.write("django/db/belonging.py", "owner = 2\n")
        self.assertFails(2, ["exporting would undo that"], "export")
        self.assertSucceeds("export", "--force")
        self.assertEqual(
            self.repository.content()["django/db/belonging.py"], b"owner = None\n"
        )

    def test_no_tree(self):
        self.assertFails(
            2, ["not a tree made by"], "export", "--dir", self.repository.home
        )
