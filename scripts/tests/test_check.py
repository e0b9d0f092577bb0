import re
import subprocess

from fixture import DJANGO, ChainTestCase

PATCH = "made-twenty-a-name.patch"


class CheckTests(ChainTestCase):
    def test_sound(self):
        content = self.repository.content()
        output = self.assertSucceeds("check")
        self.assertIn("2 patches and 3 files of ours are sound.", output)
        self.assertEqual(self.repository.content(), content)

    def test_header_field_missing(self):
        patch = self.repository.content()[f"patches/{PATCH}"].decode()
        for name in ("Adds", "Promises", "Sync-path effect", "Tests"):
            with self.subTest(name=name):
                without = re.sub(f"\n{name}: .*", "", patch)
                self.repository.write(f"patches/{PATCH}", without)
                self.assertFails(
                    1, [f"{PATCH}: the field '{name}:' is missing"], "check"
                )

    def test_header_is_wrong(self):
        cases = [
            ("name.\n", "name\n", "is not of the form"),
            ("Refs #35629 -- ", "", "is not of the form"),
            ("name.\n\n", "name.\n", "no blank line after the subject"),
            ("There is a reason.\n\n", "", "no body says why"),
            ("reason.\n", "reason. \n", "trailing whitespace"),
            ("There is", "# There is", "a comment to Git"),
            ("There is a reason.", "---", "ends a message early"),
            ("Promises: 1, 2\n", "Promises:\n", "the field 'Promises:' is missing"),
            ("Promises: 1, 2\n", "Promises: 1\nPromises: 2\n", "two fields"),
            ("Tests: blocks\n", "Tests: blocks\nMore\n", "neither a field nor"),
            (
                "Sync-path effect: none\nTests: blocks\n",
                "Tests: blocks\nSync-path effect: none\n",
                "the fields' order is",
            ),
            ("Tests: blocks\n\n", "Tests: blocks\n", "no blank line before"),
        ]
        for old, new, message in cases:
            with self.subTest(new=new):
                text = self.repository.content()[f"patches/{PATCH}"].decode()
                self.repository.edit_patch(old, new)
                self.assertFails(1, [PATCH, message], "check")
                self.repository.write(f"patches/{PATCH}", text)

    def test_line_endings(self):
        self.repository.edit_patch("\n", "\r\n")
        self.assertFails(1, [f"{PATCH}: line endings are not LF"], "check")

    def test_abbreviated_ids(self):
        text = self.repository.content()[f"patches/{PATCH}"].decode()
        index = next(x for x in text.splitlines() if x.startswith("index "))
        self.repository.edit_patch(index, f"{index[:16]}..{index[48:58]} 100644")
        self.assertFails(
            1, [f"{PATCH}: django/db/utils.py: no full index line"], "check"
        )

    def test_series_and_directory_disagree(self):
        series = self.repository.content()["patches/series"].decode()
        cases = [
            (f"{series}missing.patch\n", "'missing.patch' is listed, but"),
            (series.replace(f"{PATCH}\n", ""), f"patches/{PATCH}: not listed in"),
            (f"{series}{PATCH}\n", f"{PATCH} is listed twice"),
            (f"{series}\n", "'' is listed, but"),
            (series.rstrip(), "the last line has no end"),
        ]
        for text, message in cases:
            with self.subTest(message=message):
                self.repository.write("patches/series", text)
                self.assertFails(1, [message], "check")
        (self.repository.root / "patches" / "series").unlink()
        self.assertFails(2, ["series: No such file"], "check")

    def test_file_that_no_patch_claims(self):
        self.repository.write("django/db/stray.py", "")
        self.assertFails(1, ["django/db/stray.py: no patch claims it"], "check")

    def test_file_that_two_patches_claim(self):
        self.repository.edit_patch("Adds: ", "Adds: docs/howto/blocks.txt ")
        self.assertFails(
            1,
            [
                f"docs/howto/blocks.txt: claimed by {PATCH} and "
                f"made-thirty-a-name-too.patch"
            ],
            "check",
        )

    def test_claim_of_nothing(self):
        self.repository.edit_patch("Adds: ", "Adds: django/db/nothing.py ")
        self.assertFails(
            1, [f"{PATCH}: 'Adds: django/db/nothing.py' is not there"], "check"
        )

    def test_patch_of_a_file_of_ours(self):
        self.repository.write("django/db/utils.py", "")
        self.repository.edit_patch("Adds: ", "Adds: django/db/utils.py ")
        self.assertFails(1, [f"{PATCH}: edits django/db/utils.py, which is"], "check")

    def test_both_upstream_and_ours(self):
        sha256 = self.repository.release(
            "6.1.3", {**DJANGO, "docs/howto/blocks.txt": "Upstream\n"}
        )
        self.repository.pin("6.1.3", sha256)
        self.assertFails(1, ["docs/howto/blocks.txt: both Django's and ours"], "check")

    def test_round_trip(self):
        """A diff that is right, but not as export writes it, is refused."""
        self.repository.edit_patch(
            "@@ -17,7 +17,7 @@ line_16 = 16", "@@ -17,7 +17,7 @@"
        )
        self.assertFails(1, ["Exporting the materialised tree changes", PATCH], "check")

    def test_pin(self):
        cases = ["version = 6.1.3\n", 'version = "6.1.3"\n']
        for text in cases:
            with self.subTest(text=text):
                self.repository.write("patches/upstream.toml", text)
                self.assertFails(2, ["upstream.toml: "], "check")

    def test_fuzz_needed(self):
        self.repository.edit_patch(" line_17 = 17", " line_17 = 71")
        self.assertFails(1, [PATCH, "only applies with fuzz"], "check")

    def test_inside_another_work_tree(self):
        subprocess.run(["git", "init", "-q", self.repository.root], check=True)
        self.assertSucceeds("check", TMPDIR=str(self.repository.root))
