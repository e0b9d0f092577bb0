"""
Django as the package index serves it: downloaded with pip, verified, cached.

The cache is the folder $AATOMIC_CACHE, else django-aatomic in the user's
cache folder. A file in it is verified at each use.
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from chain import Unusable, Upstream
from gittree import DATE, EMAIL, NAME, Git


def cache_folder():
    if folder := os.environ.get("AATOMIC_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "django-aatomic")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(upstream, log=print):
    """Return the path of the verified sdist of a release."""
    path = cache_folder() / f"django-{upstream.version}.tar.gz"
    if not path.exists():
        log(f"Downloading Django {upstream.version} ...")
        download(upstream.version, path, upstream.sha256)
    found = sha256(path)
    if found != upstream.sha256:
        raise Unusable(
            f"{path}: the sha256 is {found}, not {upstream.sha256} as pinned. "
            f"Delete the file to download it again, or correct the pin."
        )
    return path


def look_up(version, log=print):
    """Download a release whose hash nobody pinned yet, and pin it."""
    path = cache_folder() / f"django-{version}.tar.gz"
    if not path.exists():
        log(f"Downloading Django {version} ...")
        download(version, path)
    return Upstream(version, sha256(path))


def download(version, path, pinned=None):
    """
    Let pip download the sdist of a release to `path`.

    pip builds an sdist's metadata, which runs code from it, but not before it
    has verified a pinned hash.
    """
    options = ["--require-hashes"] if pinned else []
    digest = f" --hash=sha256:{pinned}" if pinned else ""
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder, "requirement.txt")
        requirement.write_text(f"Django==={version}{digest}\n", encoding="utf-8")
        process = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps"),
                *("--no-binary=:all:", "--disable-pip-version-check", *options),
                *("--dest", folder, "--requirement", requirement),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found = list(Path(folder).glob("*.tar.gz"))
        if process.returncode or len(found) != 1:
            lines = [line for line in process.stdout.splitlines() if line.strip()]
            raise Unusable(
                f"pip could not download the sdist of Django {version}: is the "
                f"package index reachable? The file may also be put into "
                f"{path.parent}. pip said:\n" + "\n".join(lines[-8:])
            )
        # Other commands may be reading the cache.
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(found[0].read_bytes())
        partial.replace(path)


def create_pristine(upstream, directory, log=print):
    """Create a repository whose only commit, tagged, is Django as shipped."""
    sdist = fetch(upstream, log)
    log(f"Committing Django {upstream.version} ...")
    git = Git.create(directory)
    exclude = git.directory / ".git" / "info" / "exclude"
    exclude.parent.mkdir(exist_ok=True)
    exclude.write_text("__pycache__/\n*.pyc\n*.egg-info/\n", encoding="utf-8")
    git("tag", "pristine", import_commit(git, upstream, sdist))
    git("reset", "--hard", "--quiet", "pristine")
    return git


def import_commit(git, upstream, sdist):
    """Commit the content of an sdist, checking nothing out; return its id."""
    message = f"Django {upstream.version}\n\nsha256: {upstream.sha256}\n".encode()
    stream = io.BytesIO()
    stream.write(b"commit refs/import\n")
    stream.write(f"committer {NAME} <{EMAIL}> {DATE}\n".encode())
    stream.write(b"data %d\n%s\n" % (len(message), message))
    try:
        for name, mode, data in read_sdist(sdist):
            stream.write(f"M {mode} inline {name}\ndata {len(data)}\n".encode())
            stream.write(data + b"\n")
    except (tarfile.TarError, EOFError) as error:
        raise Unusable(f"{sdist}: {error}.") from error
    git("fast-import", "--quiet", "--force", input=stream.getvalue())
    commit = git.text("rev-parse", "refs/import")
    git("update-ref", "-d", "refs/import")
    return commit


def read_sdist(path):
    """Yield name, Git's mode and content of the files of an sdist."""
    with tarfile.open(path) as archive:
        for member in archive:
            # All files are in a folder named after the release.
            name = member.name.partition("/")[2]
            # An editable installation would write this metadata anew.
            if member.isdir() or name.startswith("Django.egg-info/"):
                continue
            if not member.isfile():
                raise Unusable(f"{path}: {member.name} is no regular file.")
            mode = "100755" if member.mode & 0o100 else "100644"
            yield name, mode, archive.extractfile(member).read()


def upstream_of(git):
    """Return the release that the tag of a materialised tree stands for."""
    subject, _, digest = git.message("pristine").split("\n")
    return Upstream(subject.split()[1], digest.split()[1])
