"""
The patch series and the files that belong to it, as the repository has them.

A *patch* is a header, a blank line and a diff. The header is the message of
the commit it stands for: a subject (``Refs #N -- Made ... .``), a body that
says why, and the fields of ``FIELDS``, one per line, continued on indented
lines. The diff only edits files that Django ships, with full blob ids, so
that the result of applying it can be verified without Git. It may be empty.

A *file of ours* is a file Django does not ship. It lives in a folder of
``OURS`` and is claimed by the ``Adds:`` field of exactly one patch, by its
path in Django's tree or by that of a folder, ending in a slash.

This module only reads. It must parse on Python 3.8, to be able to say that
Python is too old.
"""

import argparse
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

MINIMUM_PYTHON = (3, 12)

ROOT = Path(__file__).resolve().parent.parent

# Folders of the repository that hold files of ours, and what each one is
# called in Django's tree.
OURS = {"django": "django", "tests": "tests", "docs/django": "docs"}

FIELDS = ("Adds", "Promises", "Sync-path effect", "Tests")

# The value of a field that has nothing to say.
NOTHING = "none"

SUBJECT = re.compile(r"(Refs|Fixed) #\d+(, #\d+)* -- \S.*\.")
FIELD = re.compile(r"(%s):(?: (.*))?" % "|".join(FIELDS))
DIFF_START = re.compile(rb"^diff --git ", re.MULTILINE)
FILE_START = re.compile(r"diff --git a/(.+) b/\1")
INDEX = re.compile(r"index ([0-9a-f]{40})\.\.([0-9a-f]{40}) \d{6}")


class ChainError(Exception):
    """Something that was checked is wrong."""

    exit_code = 1


class Unusable(ChainError):
    """The command cannot work with what it was given."""

    exit_code = 2


def require_python():
    if sys.version_info < MINIMUM_PYTHON:
        raise Unusable(
            "Python %d.%d or newer is needed, this is %s (%s)."
            % (*MINIMUM_PYTHON, sys.version.split()[0], sys.executable)
        )


def argument_parser(docstring):
    """Return a parser whose help is the docstring of the script."""
    return argparse.ArgumentParser(
        description=docstring.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_script(main):
    """Run `main` and exit: 0 if it returns, else with its error's code."""
    try:
        require_python()
        main()
    except ChainError as error:
        print("error: %s" % error, file=sys.stderr)
        sys.exit(error.exit_code)


def blob_id(data):
    """Return the id Git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Upstream:
    """The release that the series applies to."""

    version: str
    sha256: str

    @classmethod
    def load(cls, root=ROOT):
        path = root / "patches" / "upstream.toml"
        pin = load_toml(path)
        try:
            return cls(version=str(pin["version"]), sha256=str(pin["sha256"]))
        except KeyError as error:
            raise Unusable(f"{path}: {error} is missing.") from error


def load_toml(path):
    # Python before 3.11, which lacks it, must get as far as require_python().
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Unusable(f"{path}: {error}") from error


@dataclass(frozen=True)
class Header:
    """The part of a patch that is the message of its commit."""

    text: str
    subject: str
    fields: dict

    @classmethod
    def parse(cls, text, label):
        """Parse a header. `label` names its origin in errors."""
        lines = text.splitlines()
        subject = lines[0] if lines else ""
        if not SUBJECT.fullmatch(subject):
            raise ChainError(
                f"{label}: the subject {subject!r} is not of the form "
                f"'Refs #N -- Did something.'"
            )
        if len(lines) > 1 and lines[1]:
            raise ChainError(f"{label}: no blank line after the subject.")
        fields, body, name = {}, [], None
        for line in lines[2:]:
            if line.startswith("#"):
                # Git drops such lines when a message is edited.
                raise ChainError(f"{label}: {line!r} is a comment to Git.")
            if line != line.rstrip():
                raise ChainError(f"{label}: trailing whitespace in {line!r}.")
            if match := FIELD.fullmatch(line):
                name = match[1]
                if name in fields:
                    raise ChainError(f"{label}: two fields '{name}:'.")
                fields[name] = match[2] or ""
            elif name is None:
                body.append(line)
            elif line.startswith(" "):
                fields[name] = f"{fields[name]} {line.strip()}".strip()
            else:
                raise ChainError(
                    f"{label}: after '{name}:' comes {line!r}, which is "
                    f"neither a field nor an indented continuation."
                )
        for name in FIELDS:
            if not fields.get(name):
                raise ChainError(f"{label}: the field '{name}:' is missing.")
        if tuple(fields) != FIELDS:
            raise ChainError(f"{label}: the fields' order is {', '.join(FIELDS)}.")
        if not any(body):
            raise ChainError(f"{label}: no body says why.")
        if "---" in lines:
            # git am would take the rest of the message for a comment.
            raise ChainError(f"{label}: the line '---' ends a message early.")
        return cls(text=text, subject=subject, fields=fields)

    @property
    def adds(self):
        """Return what `Adds:` claims: paths, and folders ending in /."""
        value = self.fields["Adds"]
        return [] if value == NOTHING else value.split()

    def claims(self, path):
        return any(covers(claim, path) for claim in self.adds)


def covers(claim, path):
    return path.startswith(claim) if claim.endswith("/") else path == claim


@dataclass(frozen=True)
class Edit:
    """What a patch does to one file, as blob ids."""

    path: str
    before: str
    after: str


def parse_edits(diff, label):
    """Return the edits of a diff, which may do nothing but edit files."""
    edits = []
    path = None
    for line in diff.decode(errors="surrogateescape").split("\n"):
        if line.startswith("diff --git "):
            match = FILE_START.fullmatch(line)
            if not match:
                raise ChainError(f"{label}: cannot parse {line!r}.")
            path = match[1]
        elif path and (match := INDEX.fullmatch(line)):
            edits.append(Edit(path, before=match[1], after=match[2]))
            path = None
        elif path:
            break
    if path:
        raise ChainError(
            f"{label}: {path}: no full index line follows 'diff --git', as it "
            f"does when a file is edited; a patch neither adds, removes, "
            f"renames nor changes the mode of a file."
        )
    return edits


@dataclass(frozen=True)
class Patch:
    name: str
    header: Header
    diff: bytes
    edits: list

    @classmethod
    def parse(cls, name, data):
        if b"\r" in data:
            raise ChainError(f"{name}: line endings are not LF.")
        match = DIFF_START.search(data)
        end = match.start() if match else len(data)
        text = data[:end].decode()
        if not text.endswith("\n\n" if match else "\n"):
            raise ChainError(f"{name}: no blank line before the diff.")
        return cls(
            name=name,
            header=Header.parse(text.rstrip("\n"), name),
            diff=data[end:],
            edits=parse_edits(data[end:], name),
        )

    @staticmethod
    def compose(text, diff):
        """Return the content of a patch file. parse() is its inverse."""
        return text.encode() + (b"\n\n" + diff if diff else b"\n")


@dataclass(frozen=True)
class Chain:
    """The series, and the files of ours that each patch adds."""

    root: Path
    upstream: Upstream
    patches: list
    # Where each file of ours lies, by its path in Django's tree.
    ours: dict

    @classmethod
    def load(cls, root=ROOT):
        """Load and verify all that can be verified without Django's tree."""
        folder = root / "patches"
        names = series(root)
        require_same_names(names, {path.name for path in folder.glob("*.patch")})
        patches = [Patch.parse(name, (folder / name).read_bytes()) for name in names]
        chain = cls(root, Upstream.load(root), patches, find_ours(root))
        chain.require_one_claim_each()
        return chain

    def require_one_claim_each(self):
        problems = []
        for path in sorted(self.ours):
            names = [p.name for p in self.patches if p.header.claims(path)]
            if not names:
                problems.append(f"{path}: no patch claims it with 'Adds:'.")
            elif len(names) > 1:
                problems.append(f"{path}: claimed by {' and '.join(names)}.")
        for patch in self.patches:
            for claim in patch.header.adds:
                if not any(covers(claim, path) for path in self.ours):
                    problems.append(f"{patch.name}: 'Adds: {claim}' is not there.")
            for edit in patch.edits:
                if edit.path in self.ours:
                    problems.append(f"{patch.name}: edits {edit.path}, which is ours.")
        if problems:
            raise ChainError("\n".join(problems))

    def added_by(self, patch):
        """Return the paths in Django's tree of the files a patch adds."""
        return [path for path in sorted(self.ours) if patch.header.claims(path)]


def digest(root):
    """Return a hash of all that the materialised tree is made from."""
    sources = {path.name: path for path in (root / "patches").iterdir()}
    sources.update(find_ours(root))
    result = hashlib.sha256()
    for name, path in sorted(sources.items()):
        result.update(f"{name}\0{blob_id(path.read_bytes())}\n".encode())
    return result.hexdigest()


def series(root):
    """Return the names of the patches in the order they apply."""
    path = root / "patches" / "series"
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}.") from error
    if names.pop() != "":
        raise ChainError("patches/series: the last line has no end.")
    return names


def require_same_names(names, files):
    problems = [
        f"patches/series: {name} is listed twice."
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    problems += [
        f"patches/series: {name!r} is listed, but there is no such patch."
        for name in names
        if name not in files
    ]
    problems += [
        f"patches/{name}: not listed in patches/series."
        for name in sorted(files.difference(names))
    ]
    if problems:
        raise ChainError("\n".join(problems))


def walk(folder):
    """Yield the files below a folder, without what Python leaves there."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        for name in sorted(names):
            if not name.endswith(".pyc"):
                yield Path(parent, name)


def find_ours(root):
    """Return where files of ours lie, by their path in Django's tree."""
    return {
        f"{target}/{path.relative_to(root / source).as_posix()}": path
        for source, target in OURS.items()
        for path in walk(root / source)
    }


def repository_path(root, path):
    """Return where a file of ours with this path in Django's tree lies."""
    for source, target in OURS.items():
        if path.startswith(f"{target}/"):
            return root / source / path[len(target) + 1 :]
    raise ChainError(
        f"{path}: files of ours belong in one of {', '.join(OURS.values())}."
    )
