"""
Build and install the fork with pip and build, in environments of their own.

The project is copied, and one more patch added to its series, so that there is
always one to break. These tests are slow and need the package index.
"""

import base64
import csv
import email
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import unittest
import venv
import zipfile
from pathlib import Path

from fixture import SETTINGS, UPSTREAM, Repository, header

BASE = UPSTREAM.version
VERSION = f"{BASE}+aatomic.{SETTINGS['release']}"
WHEEL = f"django-{VERSION}-py3-none-any.whl"
SDIST = f"django-{VERSION}.tar.gz"
EDITED = "django/utils/termcolors.py"
PATCH = "made-colours-names.patch"


def setUpModule():
    global template, builder
    folder = Path(tempfile.mkdtemp())
    unittest.addModuleCleanup(shutil.rmtree, folder)
    template = Repository.copy(folder)
    template.run("materialise").check_returncode()
    template.edit(EDITED, "color_names = (", "color_names = names = (")
    template.commit(header("Made colours names."), {"django/utils/probe.py": "x = 1\n"})
    template.run("export").check_returncode()
    shutil.rmtree(template.root / "build")
    builder = Environment(folder / "builder")
    builder.pip("install", "build", f"Django==={BASE}").check_returncode()


class Environment:
    """A virtual environment."""

    def __init__(self, path):
        venv.create(path, with_pip=True)
        self.path = path

    def run(self, *args, cwd=None, **env):
        return subprocess.run(
            [self.path / "bin" / "python", *args],
            cwd=cwd or self.path,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pip(self, *args, **kwargs):
        return self.run("-m", "pip", *args, **kwargs)

    @property
    def site_packages(self):
        return next(self.path.glob("lib/python*/site-packages"))


class PackagingTestCase(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.repository = Repository(self.folder)
        shutil.copytree(template.root, self.repository.root)
        self.output = self.folder / "output"

    def assertRan(self, process):
        self.assertEqual(process.returncode, 0, process.stdout)
        return process.stdout

    def build(self, *options, source=None, **env):
        """Build with Django as it is installed beside the build tool."""
        source = source or self.repository.root
        return builder.run(
            *("-m", "build", "--no-isolation", "--outdir", self.output, *options),
            source,
            **env,
        )

    def assertRefused(self, process, message):
        """Assert that there is no archive, but one line that says why."""
        self.assertNotEqual(process.returncode, 0, process.stdout)
        lines = [line for line in process.stdout.splitlines() if message in line]
        self.assertEqual(len(lines), 1, process.stdout)
        self.assertNotIn("Traceback", process.stdout)
        self.assertEqual(list(self.folder.rglob("*.whl")), [])
        self.assertEqual(list(self.folder.rglob("*.tar.gz")), [])


class InstallTests(PackagingTestCase):
    def setUp(self):
        super().setUp()
        self.environment = Environment(self.folder / "environment")

    def assertInstalled(self):
        """Assert that the fork is installed, whole, and fits with others."""
        environment = self.environment
        self.assertRan(environment.pip("check"))
        satisfied = environment.pip("install", "--no-index", "Django>=6.1")
        self.assertIn("already satisfied", self.assertRan(satisfied))
        listed = self.assertRan(environment.pip("list", "--format=freeze"))
        self.assertIn(f"Django=={VERSION}\n", listed)
        code = (
            "import django; from django.utils import probe, termcolors;"
            "print(django.get_version(), termcolors.names is termcolors.color_names)"
        )
        output = self.assertRan(environment.run("-c", code))
        self.assertEqual(output, f"{BASE} True\n")
        admin = environment.path / "bin" / "django-admin"
        process = subprocess.run([admin, "--version"], capture_output=True)
        self.assertEqual(process.stdout.decode(), f"{BASE}\n")

    def test_folder(self):
        before = sorted(self.repository.root.rglob("*"))
        self.assertRan(self.environment.pip("install", self.repository.root))
        self.assertInstalled()
        files = [
            p for p in self.repository.root.rglob("*") if "__pycache__" not in p.parts
        ]
        self.assertEqual(sorted(files), before)

    def test_git_with_extra(self):
        root = self.repository.root
        for command in (
            ["init", "--quiet"],
            ["add", "--all"],
            ["-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-mAll"],
        ):
            subprocess.run(["git", *command], cwd=root, check=True)
        requirement = f"Django[async] @ git+{root.as_uri()}"
        self.assertRan(self.environment.pip("install", requirement))
        self.assertInstalled()
        self.assertRan(self.environment.run("-c", "import greenlet, psycopg_pool"))

    def test_beside_the_fork(self):
        """The fork in a find-links folder is not taken for the base."""
        self.assertRan(self.build("--wheel"))
        environment = self.environment
        again = self.folder / "again"
        self.assertRan(
            environment.pip(
                *("wheel", "--no-deps", "--wheel-dir", again, self.repository.root),
                PIP_FIND_LINKS=str(self.output),
            )
        )
        self.assertEqual(
            (again / WHEEL).read_bytes(), (self.output / WHEEL).read_bytes()
        )


class ArchiveTests(PackagingTestCase):
    @classmethod
    def setUpClass(cls):
        """Build the sdist and, as build does, the wheel from it."""
        folder = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, folder)
        process = builder.run(
            *("-m", "build", "--no-isolation", "--outdir", folder, template.root)
        )
        if process.returncode:
            raise AssertionError(process.stdout)
        cls.wheel = (folder / WHEEL).read_bytes()
        cls.sdist = (folder / SDIST).read_bytes()
        with zipfile.ZipFile(folder / WHEEL) as archive:
            cls.files = {name: archive.read(name) for name in archive.namelist()}
        cls.info = f"django-{VERSION}.dist-info"

    def unpack(self):
        """Return the folder of the unpacked sdist."""
        with tarfile.open(fileobj=io.BytesIO(self.sdist)) as archive:
            archive.extractall(self.folder, filter="data")
        return self.folder / SDIST.removesuffix(".tar.gz")

    def test_package(self):
        """The package is Django's, but for what the series says."""
        site_packages = builder.site_packages
        package = {name for name in self.files if name.startswith("django/")}
        base = {
            path.relative_to(site_packages).as_posix()
            for path in site_packages.glob("django/**/*")
            if path.is_file() and path.suffix != ".pyc"
        }
        patches = (template.root / "patches").glob("*.patch")
        edited = {
            line.removeprefix("+++ b/").rstrip()
            for patch in patches
            for line in patch.read_text(encoding="utf-8").splitlines()
            if line.startswith("+++ b/django/")
        }
        ours = {name for name in template.content() if name.startswith("django/")}
        self.assertIn("django/utils/probe.py", ours)
        self.assertEqual(package, base | ours)
        for name in base:
            same = self.files[name] == (site_packages / name).read_bytes()
            self.assertIs(same, name not in edited, name)

    def test_record(self):
        record = self.files[f"{self.info}/RECORD"].decode()
        rows = {
            name: (digest, size)
            for name, digest, size in csv.reader(record.splitlines())
        }
        self.assertEqual(list(rows), list(self.files))
        self.assertEqual(rows.pop(f"{self.info}/RECORD"), ("", ""))
        for name, (digest, size) in rows.items():
            data = self.files[name]
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
            self.assertEqual(digest, f"sha256={expected.decode().rstrip('=')}")
            self.assertEqual(int(size), len(data))

    def test_metadata(self):
        [folder] = builder.site_packages.glob("django-*.dist-info")
        old = email.message_from_bytes((folder / "METADATA").read_bytes())
        new = email.message_from_bytes(self.files[f"{self.info}/METADATA"])
        self.assertEqual(new["Name"], "Django")
        self.assertEqual(new["Version"], VERSION)
        changed = ("Version", "Requires-Dist", "Provides-Extra", "License-File")
        for name in set(old) - set(changed):
            self.assertEqual(new.get_all(name), old.get_all(name), name)
        self.assertEqual(new.get_payload(), old.get_payload())
        self.assertEqual(
            new.get_all("Provides-Extra"), [*old.get_all("Provides-Extra"), "async"]
        )
        self.assertEqual(
            new.get_all("License-File"),
            [*old.get_all("License-File"), "LICENSE.aatomic"],
        )
        old_requires = set(old.get_all("Requires-Dist"))
        new_requires = set(new.get_all("Requires-Dist"))
        [asgiref] = old_requires - new_requires
        self.assertIs(asgiref.startswith("asgiref"), True)
        names = sorted(
            requirement.replace("[", ">").partition(">")[0]
            for requirement in new_requires - old_requires
        )
        self.assertEqual(names, ["asgiref", "greenlet", "psycopg"])

    def test_other_files_of_the_metadata(self):
        [folder] = builder.site_packages.glob("django-*.dist-info")
        for name in ("entry_points.txt", "licenses/LICENSE", "licenses/AUTHORS"):
            self.assertEqual(
                self.files[f"{self.info}/{name}"], (folder / name).read_bytes()
            )
        names = {name for name in self.files if name.startswith(f"{self.info}/")}
        for name in ("INSTALLER", "REQUESTED", "direct_url.json"):
            self.assertNotIn(f"{self.info}/{name}", names)
        self.assertIn(f"{self.info}/licenses/LICENSE.aatomic", names)

    def test_two_builds(self):
        """Neither the folder, nor the files' dates, nor the way matters."""
        for path in self.repository.root.rglob("*"):
            os.utime(path, (0, 0))
        self.assertRan(self.build("--sdist"))
        self.assertRan(self.build("--wheel"))
        self.assertEqual((self.output / SDIST).read_bytes(), self.sdist)
        self.assertEqual((self.output / WHEEL).read_bytes(), self.wheel)

    def test_source_date_epoch(self):
        self.assertRan(self.build("--wheel", SOURCE_DATE_EPOCH="1000000000"))
        with zipfile.ZipFile(self.output / WHEEL) as archive:
            dates = {member.date_time for member in archive.infolist()}
        self.assertEqual(dates, {(2001, 9, 9, 1, 46, 40)})

    def test_sdist_without_git(self):
        source = self.unpack()
        self.assertRan(self.build("--sdist", source=source, PATH=""))
        self.assertRan(self.build("--wheel", source=source, PATH=""))
        self.assertEqual((self.output / SDIST).read_bytes(), self.sdist)
        self.assertEqual((self.output / WHEEL).read_bytes(), self.wheel)

    def test_sdist_whose_overlay_is_wrong(self):
        source = self.unpack()
        path = source / "overlay" / EDITED
        path.write_bytes((builder.site_packages / EDITED).read_bytes())
        self.assertRefused(
            self.build("--wheel", source=source),
            f"{PATCH}: {EDITED}: after the patch the file should be blob",
        )
        path.unlink()
        self.assertRefused(
            self.build("--wheel", source=source), f"overlay/{EDITED}: No such file"
        )


class RefusalTests(PackagingTestCase):
    def edit_base(self, name, text):
        """Append to a file of the installed Django, for one test."""
        path = next(builder.site_packages.glob(name))
        data = path.read_bytes()
        self.addCleanup(path.write_bytes, data)
        path.write_bytes(data + text)

    def test_git_missing(self):
        self.assertRefused(self.build("--wheel", PATH=""), "error: git was not found")
        self.assertRefused(self.build("--sdist", PATH=""), "error: git was not found")

    def test_inside_another_work_tree(self):
        """Git's silence there would mean a wheel without the patches."""
        subprocess.run(["git", "init", "--quiet", self.folder], check=True)
        temporary = self.folder / "temporary"
        temporary.mkdir()
        self.assertRan(self.build("--wheel", TMPDIR=str(temporary)))
        with zipfile.ZipFile(self.output / WHEEL) as archive:
            self.assertIn(b"names = names = (", archive.read(EDITED))

    def test_patch_does_not_apply(self):
        self.repository.edit_patch("-color_names", "-colour_names", PATCH)
        self.assertRefused(
            self.build("--wheel"), f"error: {PATCH}: {EDITED}: the hunk '@@ -"
        )

    def test_wrong_result(self):
        self.repository.edit_patch("names = names", "names = nomina", PATCH)
        self.assertRefused(
            self.build("--wheel"), f"error: {PATCH}: {EDITED}: after the patch"
        )

    def test_patch_missing(self):
        (self.repository.root / "patches" / PATCH).unlink()
        self.assertRefused(self.build("--wheel"), f"'{PATCH}' is listed, but")

    def test_file_of_ours_missing(self):
        (self.repository.root / "django/utils/probe.py").unlink()
        self.assertRefused(
            self.build("--wheel"), f"{PATCH}: 'Adds: django/utils/probe.py' is not"
        )

    def test_base_modified(self):
        self.edit_base("django/shortcuts.py", b"# modified\n")
        self.assertRefused(
            self.build("--wheel"),
            f"error: Django {BASE} has been modified where it is installed: "
            "django/shortcuts.py",
        )

    def test_base_editable(self):
        path = next(builder.site_packages.glob("django-*.dist-info"))
        origin = path / "direct_url.json"
        origin.write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
        self.addCleanup(origin.unlink)
        self.assertRefused(self.build("--wheel"), "is editable or has no complete")

    def test_base_missing(self):
        environment = Environment(self.folder / "environment")
        self.assertRefused(
            self.pip_wheel(environment),
            f"error: Django {BASE} must be installed to build from it.",
        )

    def pip_wheel(self, environment, *options, **env):
        return environment.pip(
            *("wheel", "--no-deps", "--wheel-dir", self.folder / "wheels"),
            *(options or ["--no-build-isolation"]),
            *(self.repository.root,),
            **env,
        )

    def test_fork_as_the_base(self):
        """Refuse it without build isolation, whatever the frontend checks."""
        self.assertRan(self.build("--wheel"))
        environment = Environment(self.folder / "environment")
        wheel = self.output / WHEEL
        self.assertRan(environment.pip("install", "--no-deps", wheel))
        wheel.unlink()
        self.assertRefused(
            self.pip_wheel(environment),
            f"error: Django {BASE} is needed to build from, not {VERSION}",
        )

    def test_fork_as_the_only_base(self):
        """pip does not take the fork for the base, whichever way it comes."""
        self.assertRan(self.build("--wheel"))
        links = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, links)
        shutil.move(self.output / WHEEL, links)
        constraints = links / "constraints.txt"
        constraints.write_text(f"Django=={VERSION}\n")
        self.assertRefused(
            self.pip_wheel(builder, "--no-index", "--find-links", links),
            f"ERROR: No matching distribution found for Django==={BASE}",
        )
        self.assertRefused(
            self.pip_wheel(
                builder,
                *("--find-links", links),
                PIP_BUILD_CONSTRAINT=str(constraints),
                PIP_CONSTRAINT=str(constraints),
            ),
            "ERROR: ResolutionImpossible",
        )

    def test_editable(self):
        process = builder.pip(
            *("install", "--no-build-isolation", "--no-deps"),
            *("--editable", self.repository.root),
        )
        self.assertRefused(process, "run scripts/materialise.py and install")
