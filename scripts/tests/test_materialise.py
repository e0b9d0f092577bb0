import ast
import os
import subprocess
import sys
from pathlib import Path

from fixture import DJANGO, SCRIPTS, UTILS, ChainTestCase, header

PATCH = "made-twenty-a-name.patch"


class MaterialiseTests(ChainTestCase):
    def test_commits(self):
        repository = self.repository
        self.assertEqual(
            repository.git("log", "--format=%s", "--reverse").splitlines(),
            [
                "Django 6.1.3",
                "Refs #35629 -- Made twenty a name.",
                "Refs #35629 -- Made thirty a name, too.",
            ],
        )
        self.assertEqual(
            repository.git("show", "--name-only", "--format=", "HEAD^").splitlines(),
            ["django/db/belonging.py", "django/db/utils.py", "tests/blocks/tests.py"],
        )
        self.assertEqual(
            (repository.tree / "docs/howto/blocks.txt").read_text(), "Blocks\n"
        )
        self.assertEqual(repository.git("status", "--porcelain", "--ignored"), "")

    def test_same_commit_ids(self):
        before = self.repository.git("rev-parse", "HEAD")
        self.assertSucceeds("materialise")
        self.assertEqual(self.repository.git("rev-parse", "HEAD"), before)

    def test_empty_series(self):
        self.repository.write("patches/series", "")
        for name in self.repository.content():
            if name.endswith((".patch", ".txt", ".py")):
                (self.repository.root / name).unlink()
        self.assertSucceeds("materialise")
        self.assertEqual(self.repository.git("rev-list", "pristine..HEAD"), "")

    def test_configuration_of_the_user_changes_nothing(self):
        repository = self.repository
        repository.write(
            ".gitconfig",
            "[core]\nautocrlf = true\nabbrev = 4\nhooksPath = /nonexistent\n"
            "[commit]\ngpgSign = true\n[gpg]\nprogram = false\n"
            "[diff]\nnoprefix = true\ncontext = 1\nexternal = false\n"
            "[apply]\nwhitespace = error-all\n",
            repository.home,
        )
        repository.write(".config/git/attributes", "* -diff\n", repository.home)
        before = repository.git("rev-parse", "HEAD")
        content = repository.content()
        self.assertSucceeds("materialise")
        self.assertEqual(repository.git("rev-parse", "HEAD"), before)
        self.assertSucceeds("export")
        self.assertEqual(repository.content(), content)

    def test_inside_another_work_tree(self):
        """`git apply` silently skips all paths of an enclosing work tree."""
        repository = self.repository
        subprocess.run(["git", "init", "-q", repository.root], check=True)
        repository.write(".gitignore", "/build/\n")
        environments = [{}, {"GIT_DIR": str(repository.root / ".git")}]
        for env in environments:
            with self.subTest(env=env):
                self.assertSucceeds("materialise", "--force", **env)
                utils = (repository.tree / "django/db/utils.py").read_text()
                self.assertIn("line_20 = twenty", utils)
                self.assertIn("line_30 = thirty", utils)
        self.assertEqual(
            repository.git("-C", repository.root, "status", "--porcelain", "build"),
            "",
        )

    def test_hash_mismatch(self):
        self.repository.pin("6.1.3", "0" * 64)
        self.assertFails(
            2, ["django-6.1.3.tar.gz: the sha256 is ", "0" * 64], "materialise"
        )

    def test_no_network(self):
        self.repository.pin("6.1.2", "0" * 64)
        self.assertFails(
            2,
            ["could not download the sdist of Django 6.1.2", "reachable?"],
            "materialise",
            PIP_CONFIG_FILE=os.devnull,
            PIP_EXTRA_INDEX_URL="",
            PIP_FIND_LINKS="",
            PIP_INDEX_URL="http://127.0.0.1:9/simple",
            PIP_RETRIES="0",
        )

    def test_git_missing(self):
        self.assertFails(2, ["git was not found"], "materialise", PATH="")

    def test_old_python(self):
        """The scripts parse on Python 3.8, to say that it is too old."""
        for path in SCRIPTS.glob("*.py"):
            with self.subTest(path=path.name):
                ast.parse(path.read_text(), feature_version=(3, 8))
        code = (
            "import runpy, sys; sys.version_info = (3, 8, 0);"
            "sys.argv = ['materialise.py'];"
            f"sys.path.insert(0, {str(self.repository.root / 'scripts')!r});"
            "runpy.run_module('materialise', run_name='__main__')"
        )
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )
        self.assertEqual(process.returncode, 2)
        self.assertIn("Python 3.12 or newer is needed", process.stderr)

    def test_patch_does_not_apply(self):
        self.repository.edit_patch("-line_20 = 20", "-line_20 = 21")
        self.assertFails(
            1,
            [f"{PATCH}: django/db/utils.py: the hunk '@@ -17' does not apply"],
            "materialise",
        )

    def test_fuzz_needed(self):
        self.repository.edit_patch(" line_17 = 17", " line_17 = 71")
        self.assertFails(
            1,
            [
                f"{PATCH}: django/db/utils.py: the hunk '@@ -17' only applies "
                f"with fuzz"
            ],
            "materialise",
        )

    def test_offset_needed(self):
        self.repository.edit_patch("@@ -17,7 +17,7 @@", "@@ -18,7 +18,7 @@")
        self.assertFails(
            1,
            [f"{PATCH}: django/db/utils.py: hunk 1 only applies at an offset -1"],
            "materialise",
        )

    def test_wrong_result(self):
        self.repository.edit_patch("+line_20 = twenty", "+line_20 = score")
        self.assertFails(
            1, [f"{PATCH}: django/db/utils.py: after the patch"], "materialise"
        )

    def test_made_for_another_file(self):
        sha256 = self.repository.release(
            "6.1.3", {**DJANGO, "django/db/utils.py": f"{UTILS}# end\n"}
        )
        self.repository.pin("6.1.3", sha256)
        self.assertFails(
            1, [f"{PATCH}: django/db/utils.py: before the patch"], "materialise"
        )

    def test_file_that_django_lacks(self):
        self.repository.edit_patch("django/db/utils.py", "django/db/other.py")
        self.assertFails(
            1, [f"{PATCH}: django/db/other.py: Django has no such file"], "materialise"
        )

    def test_failure_keeps_the_tree(self):
        self.repository.edit_patch("-line_20 = 20", "-line_20 = 21")
        before = self.repository.git("rev-parse", "HEAD")
        self.repository.run("materialise")
        self.assertEqual(self.repository.git("rev-parse", "HEAD"), before)
        self.assertEqual(
            [path.name for path in self.repository.tree.parent.iterdir()], ["django"]
        )

    def test_both_upstream_and_ours(self):
        sha256 = self.repository.release(
            "6.1.3", {**DJANGO, "django/db/belonging.py": "upstream = True\n"}
        )
        self.repository.pin("6.1.3", sha256)
        self.assertFails(
            1, ["django/db/belonging.py: both Django's and ours"], "materialise"
        )

    def test_dirty_tree(self):
        changes = {"django/db/utils.py": "", "new.py": "x = 1\n"}
        for name, text in changes.items():
            with self.subTest(name=name):
                self.repository.write(name, text, self.repository.tree)
                self.assertFails(2, ["has uncommitted changes", name], "materialise")
                self.assertSucceeds("materialise", "--force")
                self.assertEqual(self.repository.git("status", "--porcelain"), "")

    def test_commits_not_exported(self):
        self.repository.commit(header("Made x."), {"django/x.py": "x = 1\n"})
        self.assertFails(
            2, ["has commits that were not exported", "Made x."], "materialise"
        )
        self.assertSucceeds("export")
        self.assertSucceeds("materialise")

    def test_directory_of_somebody_else(self):
        folder = self.repository.folder / "other"
        self.repository.write("precious.txt", "", folder)
        for option in ([], ["--force"]):
            self.assertFails(
                2, ["not a tree made by"], "materialise", "--dir", folder, *option
            )
        self.assertIs((folder / "precious.txt").exists(), True)

    def test_other_directory(self):
        folder = self.repository.folder / "other"
        self.assertSucceeds("materialise", "--dir", folder)
        self.assertIs(Path(folder, "django/db/belonging.py").exists(), True)


class HelpTests(ChainTestCase):
    def test_help_is_the_docstring(self):
        for name in ("materialise", "export", "check", "rebase", "submit"):
            with self.subTest(name=name):
                source = (SCRIPTS / f"{name}.py").read_text()
                docstring = ast.get_docstring(ast.parse(source))
                self.assertIn(docstring, self.assertSucceeds(name, "--help"))

    def test_unknown_option(self):
        process = self.repository.run("check", "--unknown")
        self.assertEqual(process.returncode, 2)
