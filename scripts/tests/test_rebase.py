from fixture import DJANGO, UTILS, ChainTestCase

PATCH = "made-twenty-a-name.patch"


class RebaseTests(ChainTestCase):
    def release(self, files):
        return self.repository.release("6.1.4", {**DJANGO, **files})

    def test_moved_lines(self):
        sha256 = self.release({"django/db/utils.py": f"first = 1\n{UTILS}"})
        output = self.assertSucceeds("rebase", "6.1.4")
        self.assertIn(f"The sdist has the sha256 {sha256}.", output)
        content = self.repository.content()
        self.assertIn(b"@@ -18,7 +18,7 @@", content[f"patches/{PATCH}"])
        self.assertIn(b'version = "6.1.4"\n', content["patches/upstream.toml"])
        self.assertIn(sha256.encode(), content["patches/upstream.toml"])
        self.assertIn("sound", self.assertSucceeds("check"))
        self.assertSucceeds("materialise")

    def test_there_and_back(self):
        content = self.repository.content()
        self.release({"django/db/utils.py": f"first = 1\n{UTILS}"})
        self.assertSucceeds("rebase", "6.1.4")
        self.assertSucceeds("rebase", "6.1.3")
        self.assertEqual(self.repository.content(), content)

    def test_conflict(self):
        content = self.repository.content()
        utils = UTILS.replace("line_20 = 20", "line_20 = 0x14")
        self.release({"django/db/utils.py": utils})
        self.assertFails(
            1,
            [
                f"{PATCH} conflicts",
                "django/db/utils.py: hunk at line 20",
                "git cherry-pick --continue",
                "scripts/export.py",
            ],
            *("rebase", "6.1.4"),
        )
        self.assertEqual(self.repository.content(), content)

        # What the message says to do.
        self.repository.write(
            "django/db/utils.py",
            utils.replace("line_20 = 0x14", "line_20 = twenty"),
            self.repository.tree,
        )
        self.repository.git("add", "django/db/utils.py")
        self.repository.git("cherry-pick", "--continue")
        self.assertSucceeds("export")
        self.assertIn(b"-line_20 = 0x14", self.repository.content()[f"patches/{PATCH}"])
        self.assertSucceeds("check")

    def test_giving_up(self):
        content = self.repository.content()
        self.release({"django/db/utils.py": ""})
        self.assertEqual(self.repository.run("rebase", "6.1.4").returncode, 1)
        self.assertFails(2, ["uncommitted changes"], "rebase", "6.1.4")
        self.assertSucceeds("materialise", "--force")
        self.assertSucceeds("export")
        self.assertEqual(self.repository.content(), content)

    def test_release_adds_a_file_of_ours(self):
        self.release({"django/db/belonging.py": "upstream = True\n"})
        self.assertFails(
            1,
            [f"{PATCH} conflicts", "django/db/belonging.py: hunk at line 1"],
            *("rebase", "6.1.4"),
        )

    def test_release_lacks_a_file(self):
        files = {name: text for name, text in DJANGO.items() if "utils" not in name}
        self.repository.release("6.1.4", files)
        self.assertFails(
            1,
            [f"{PATCH} conflicts", "utils.py: the release no longer has it"],
            *("rebase", "6.1.4"),
        )

    def test_release_has_the_change(self):
        """The patch that adds nothing else has become empty."""
        self.repository.edit("tests/runtests.py", "import sys\n", "import os, sys\n")
        message = self.repository.git("log", "-1", "--format=%B")
        message = message.replace("thirty", "tests").replace("docs/howto/", "none")
        self.repository.commit(message)
        self.assertSucceeds("export")
        self.release({"tests/runtests.py": "import os, sys\n\nsys.exit()\n"})
        self.assertFails(
            1,
            ["made-tests-a-name-too.patch", "Nothing is left of it", "--skip"],
            *("rebase", "6.1.4"),
        )
        self.repository.git("cherry-pick", "--skip")
        self.assertSucceeds("export")
        self.assertNotIn(b"tests", self.repository.content()["patches/series"])

    def test_hash_mismatch(self):
        self.release({})
        self.assertFails(2, ["the sha256 is"], "rebase", "6.1.4", "--sha256", "0" * 64)

    def test_not_a_version(self):
        self.assertFails(2, ["'main' is not the version"], "rebase", "main")

    def test_dirty_tree(self):
        self.release({})
        self.repository.write("django/x.py", "", self.repository.tree)
        self.assertFails(2, ["uncommitted changes"], "rebase", "6.1.4")
