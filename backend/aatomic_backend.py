"""
Build Django with the patches applied: a PEP 517 backend.

The frontend calls the hooks at the end of this module, with the repository,
or the sdist made from it, as the working directory:

* ``get_requires_for_build_*`` ask for Django itself, in exactly the release
  that ``patches/upstream.toml`` pins, to be installed beside this backend.
* ``build_wheel`` repacks that installation: the files its RECORD lists, each
  verified, in their patched form if a patch edits them, and the files of
  ours. Metadata is kept, but for what ``[tool.aatomic]`` says.
* ``build_sdist`` packs the repository, and the patched files in ``overlay/``,
  so that building a wheel from it does not need Git.

No wheel lacks a patch. The base is asked for with ``===``, as ``==`` would
accept the fork itself, and its version is compared here again, as nobody else
does without build isolation. Wherever an edited file comes from, its blob ids
are those in the patches. Whatever is wrong ends the build with one line.

Equal input makes equal bytes: order, dates and modes are fixed.
"""

import base64
import csv
import functools
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from chain import (
    ROOT,
    Chain,
    ChainError,
    Upstream,
    blob_id,
    load_toml,
    require_python,
    walk,
)
from gittree import Git, apply_patch, require_id

PACKAGE = "django/"

# The patched files, in an sdist.
OVERLAY = ROOT / "overlay"

# What an installer adds to the metadata of what it installs.
INSTALLERS_FILES = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"}

# What an sdist has from the repository, if it is there.
SOURCES = (
    ".gitattributes",
    ".gitignore",
    ".python-version",
    "LICENSE",
    "README.md",
    "backend",
    "django",
    "docs",
    "patches",
    "pyproject.toml",
    "scripts",
    "tests",
    "tox.ini",
    "toxfile.py",
)

# The first moment that a zip archive can express.
EARLIEST = 315532800


@dataclass
class Base:
    """Django as it is installed beside this backend."""

    # Content by path: of the package, and of the metadata's folder.
    package: dict
    info: dict

    @classmethod
    def load(cls, upstream):
        wanted = f"Django {upstream.version}"
        try:
            found = metadata.distribution("Django")
        except metadata.PackageNotFoundError:
            raise ChainError(f"{wanted} must be installed to build from it.")
        if found.version != upstream.version:
            raise ChainError(
                f"{wanted} is needed to build from, not {found.version}, which "
                f"is installed; build with isolation and without constraints."
            )
        record = found.read_text("RECORD") or ""
        match = re.search(r"^([^/]+\.dist-info/)METADATA,", record, re.MULTILINE)
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        if not match or origin.get("dir_info", {}).get("editable"):
            raise ChainError(
                f"{wanted} is needed as installed from its wheel; what is "
                f"installed is editable or has no complete RECORD."
            )
        info = match[1]
        base = cls(package={}, info={})
        for path, expected, _ in csv.reader(record.splitlines()):
            if path.startswith(PACKAGE) and not path.endswith(".pyc"):
                files, name = base.package, path
            elif path.startswith(info) and path[len(info) :] not in INSTALLERS_FILES:
                files, name = base.info, path[len(info) :]
            else:
                continue
            data = read(found.locate_file(path))
            if expected != record_hash(data):
                raise ChainError(
                    f"{wanted} has been modified where it is installed: {path}."
                )
            files[name] = data
        return base


def read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise ChainError(f"{path}: {error.strerror}.")


def record_hash(data):
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return f"sha256={digest.decode().rstrip('=')}"


def patched_files(chain, package):
    """Return the content of each file that the patches edit, verified."""
    edits = [
        (patch, edit)
        for patch in chain.patches
        for edit in patch.edits
        if edit.path.startswith(PACKAGE)
    ]
    before = {edit.path: package.get(edit.path) for _, edit in edits}
    for path in before:
        if before[path] is None:
            raise ChainError(f"{path}: a patch edits it, but Django has no such file.")
    if OVERLAY.is_dir():
        after = {path: read(OVERLAY / path) for path in before}
    else:
        after = apply_patches(chain.patches, before)
    # The last patch of a file promises its id, each one the next one's start.
    ids = {path: blob_id(data) for path, data in before.items()}
    last = {}
    for patch, edit in edits:
        require_id(patch, edit, "before", ids[edit.path])
        ids[edit.path] = edit.after
        last[edit.path] = patch, edit
    for path, (patch, edit) in last.items():
        require_id(patch, edit, "after", blob_id(after[path]))
    return after


def apply_patches(patches, files):
    with tempfile.TemporaryDirectory() as folder:
        git = Git.create(Path(folder, "tree"))
        for path, data in files.items():
            target = git.directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        for patch in patches:
            apply_patch(git, patch, only=PACKAGE)
        return {path: (git.directory / path).read_bytes() for path in files}


@dataclass
class Fork:
    """What the archives are made of."""

    version: str
    package: dict
    # Content of the metadata's folder by path, but for RECORD.
    info: dict
    overlay: dict

    @classmethod
    def load(cls):
        chain = Chain.load(ROOT)
        settings = load_toml(ROOT / "pyproject.toml")["tool"]["aatomic"]
        version = f"{chain.upstream.version}+aatomic.{settings['release']}"
        base = Base.load(chain.upstream)
        overlay = patched_files(chain, base.package)
        ours = {
            path: source.read_bytes()
            for path, source in chain.ours.items()
            if path.startswith(PACKAGE)
        }
        if both := sorted(set(ours).intersection(base.package)):
            raise ChainError(f"{both[0]}: both Django's and ours.")
        text = base.info["METADATA"].decode()
        wheel = base.info["WHEEL"].decode()
        info = {
            **base.info,
            "METADATA": fork_metadata(text, version, settings).encode(),
            "WHEEL": re.sub("(?m)^Generator: .*", GENERATOR, wheel).encode(),
            f"licenses/{LICENSE_FILE}": (ROOT / "LICENSE").read_bytes(),
        }
        return cls(version, {**base.package, **overlay, **ours}, info, overlay)

    @property
    def info_folder(self):
        return f"django-{self.version}.dist-info"


GENERATOR = "Generator: aatomic_backend"

# The fork's own licence, beside Django's.
LICENSE_FILE = "LICENSE.aatomic"


def requirement_name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def fork_metadata(text, version, settings):
    """Return Django's METADATA with the fork's version and requirements."""
    head, _, description = text.partition("\n\n")
    replaced = {requirement_name(r): r for r in settings["dependencies"]}
    lines = []
    for line in head.split("\n"):
        name, _, value = line.partition(": ")
        if name == "Version":
            line = f"Version: {version}"
        elif name == "Requires-Dist" and "extra ==" not in value:
            requirement = replaced.pop(requirement_name(value), value)
            line = f"Requires-Dist: {requirement}"
        lines.append(line)
    lines += [f"Requires-Dist: {requirement}" for requirement in replaced.values()]
    for extra, requirements in settings["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {r}; extra == "{extra}"' for r in requirements]
    lines.append(f"License-File: {LICENSE_FILE}")
    return "\n".join(lines) + "\n\n" + description


def timestamp():
    return max(int(os.environ.get("SOURCE_DATE_EPOCH", EARLIEST)), EARLIEST)


def write_wheel(fork, path):
    files = dict(sorted(fork.package.items()))
    for name, data in sorted(fork.info.items()):
        files[f"{fork.info_folder}/{name}"] = data
    record = io.StringIO()
    writer = csv.writer(record, lineterminator="\n")
    for name, data in files.items():
        writer.writerow([name, record_hash(data), len(data)])
    writer.writerow([f"{fork.info_folder}/RECORD", "", ""])
    files[f"{fork.info_folder}/RECORD"] = record.getvalue().encode()

    date = time.gmtime(timestamp())[:6]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo(name, date)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = 0o100644 << 16
            archive.writestr(member, data)


def write_sdist(fork, path):
    # Content and mode by path.
    files = {"PKG-INFO": (fork.info["METADATA"], 0o644)}
    for name in SOURCES:
        source = ROOT / name
        for file in walk(source) if source.is_dir() else [source]:
            if file.is_file():
                mode = 0o755 if file.stat().st_mode & 0o100 else 0o644
                files[file.relative_to(ROOT).as_posix()] = file.read_bytes(), mode
    for name, data in fork.overlay.items():
        files[f"overlay/{name}"] = data, 0o644

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, (data, mode) in sorted(files.items()):
            member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            member.size = len(data)
            member.mode = mode
            member.mtime = timestamp()
            archive.addfile(member, io.BytesIO(data))
    path.write_bytes(gzip.compress(content.getvalue(), mtime=timestamp()))


def hook(function):
    """Make errors end the build with their message, without a traceback."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            require_python()
            return function(*args, **kwargs)
        except ChainError as error:
            raise SystemExit(f"error: {error}") from None

    return wrapper


@hook
def get_requires_for_build_wheel(config_settings=None):
    return [f"Django==={Upstream.load(ROOT).version}"]


get_requires_for_build_sdist = get_requires_for_build_wheel


@hook
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    fork = Fork.load()
    for name, data in fork.info.items():
        path = Path(metadata_directory, fork.info_folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return fork.info_folder


@hook
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    fork = Fork.load()
    name = f"django-{fork.version}-py3-none-any.whl"
    write_wheel(fork, Path(wheel_directory, name))
    return name


@hook
def build_sdist(sdist_directory, config_settings=None):
    fork = Fork.load()
    name = f"django-{fork.version}.tar.gz"
    write_sdist(fork, Path(sdist_directory, name))
    return name


@hook
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    raise ChainError(
        "The repository has no whole Django to be edited in place: run "
        "scripts/materialise.py and install build/django."
    )
