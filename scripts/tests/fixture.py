"""
Repositories for tests to break: one with a small series on a small Django, and
copies of the project itself.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = PROJECT / "scripts"

sys.path[:0] = [str(SCRIPTS), str(PROJECT / "backend")]

from aatomic_backend import SOURCES  # noqa: E402
from chain import Upstream, load_toml  # noqa: E402
from upstream import cache_folder  # noqa: E402

# What the project pins and says about its packaging.
UPSTREAM = Upstream.load(PROJECT)
SETTINGS = load_toml(PROJECT / "pyproject.toml")["tool"]["aatomic"]

UTILS = "".join(f"line_{number} = {number}\n" for number in range(1, 41))

DJANGO = {
    "Django.egg-info/PKG-INFO": "Name: Django\n",
    "LICENSE": "BSD\n",
    "django/__init__.py": "VERSION = (6, 1, 3)\n",
    "django/db/utils.py": UTILS,
    "tests/runtests.py": "import sys\n\nsys.exit()\n",
}

HEADER = """\
Refs #35629 -- {subject}

There is a reason.

Adds: {adds}
Promises: 1, 2
Sync-path effect: none
Tests: blocks
"""


def header(subject, adds="none"):
    return HEADER.format(subject=subject, adds=adds)


class Repository:
    """A copy of the scripts, with a home and a cache of its own."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.root = self.folder / "repository"
        self.tree = self.root / "build" / "django"
        self.cache = self.folder / "cache"
        self.home = self.folder / "home"

    @classmethod
    def create(cls, folder):
        """Return a repository whose series has two patches."""
        self = cls(folder)
        shutil.copytree(
            SCRIPTS,
            self.root / "scripts",
            ignore=shutil.ignore_patterns("tests", "__pycache__"),
        )
        self.home.mkdir()
        self.write("patches/series", "")
        self.pin("6.1.3", self.release("6.1.3", DJANGO))
        self.run("materialise").check_returncode()
        self.edit("django/db/utils.py", "line_20 = 20", "line_20 = twenty")
        self.commit(
            header("Made twenty a name."),
            {"django/db/belonging.py": "owner = None\n", "tests/blocks/tests.py": ""},
        )
        self.edit("django/db/utils.py", "line_30 = 30", "line_30 = thirty")
        self.commit(
            header("Made thirty a name, too.", "docs/howto/"),
            {"docs/howto/blocks.txt": "Blocks\n"},
        )
        self.run("export").check_returncode()
        return self

    @classmethod
    def copy(cls, folder):
        """Return a copy of the project itself, with its series."""
        self = cls(folder)
        self.cache = cache_folder()
        self.home = Path.home()
        self.root.mkdir()
        for name in SOURCES:
            source = PROJECT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, self.root / name, ignore=ignored)
            elif source.exists():
                shutil.copy(source, self.root)
        return self

    def release(self, version, files):
        """Put an sdist into the cache and return its hash."""
        self.cache.mkdir(exist_ok=True)
        path = self.cache / f"django-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, text in files.items():
                data = text.encode()
                member = tarfile.TarInfo(f"django-{version}/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def pin(self, version, sha256):
        self.write(
            "patches/upstream.toml",
            "# The release of Django that the series applies to. "
            f'scripts/rebase.py moves it.\nversion = "{version}"\n'
            f'sha256 = "{sha256}"\n',
        )

    def run(self, script, *args, **env):
        """Run a script and return the process."""
        return subprocess.run(
            [sys.executable, self.root / "scripts" / f"{script}.py", *args],
            env={
                **os.environ,
                "AATOMIC_CACHE": str(self.cache),
                "HOME": str(self.home),
                "PYTHONDONTWRITEBYTECODE": "1",
                **env,
            },
            capture_output=True,
            text=True,
        )

    def git(self, *args, input=None):
        """Run Git in the tree, as somebody who works there."""
        return subprocess.run(
            ["git", *args],
            cwd=self.tree,
            env={**os.environ, "HOME": str(self.home), "GIT_EDITOR": "true"},
            input=input,
            capture_output=True,
            check=True,
            text=True,
        ).stdout

    def write(self, name, text, root=None):
        path = (root or self.root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())

    def edit(self, name, old, new, root=None):
        path = (root or self.tree) / name
        text = path.read_bytes().decode()
        if old not in text:
            raise AssertionError(f"{old!r} is not in {name}.")
        path.write_bytes(text.replace(old, new).encode())

    def edit_patch(self, old, new, name="made-twenty-a-name.patch"):
        self.edit(f"patches/{name}", old, new, self.root)

    def commit(self, message, files={}):
        for name, text in files.items():
            self.write(name, text, self.tree)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--file=-", input=message)

    def content(self):
        """Return all files, but for the scripts and the tree."""
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for folder in ("patches", "django", "tests", "docs")
            for path in sorted((self.root / folder).rglob("*"))
            if path.is_file()
        }


class ChainTestCase(unittest.TestCase):
    """Give each test a repository of its own, just materialised."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.template = Repository.create(folder)
        cls.template.run("materialise").check_returncode()

    def setUp(self):
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        shutil.copytree(self.template.folder, folder, dirs_exist_ok=True)
        self.repository = Repository(folder)

    def assertSucceeds(self, script, *args, **env):
        process = self.repository.run(script, *args, **env)
        self.assertEqual(process.returncode, 0, process.stdout + process.stderr)
        return process.stdout

    def assertFails(self, code, texts, script, *args, **env):
        """Assert that a script ends with a code and an error message."""
        process = self.repository.run(script, *args, **env)
        self.assertEqual(process.returncode, code, process.stdout + process.stderr)
        self.assertIn("error: ", process.stderr)
        self.assertNotIn("Traceback", process.stderr)
        for text in texts:
            self.assertIn(text, process.stderr)
