"""
Git, cut off from its surroundings.

Neither the user's configuration nor an enclosing work tree may change what a
command here does: inside another work tree, ``git apply`` skips every path
and reports success. So a tree is always the top of a repository of its own,
and what applying a patch did to each file is verified by blob id.
"""

import os
import re
import subprocess
from pathlib import Path

from chain import ChainError, Unusable, blob_id

# Commits made from the same content get the same ids.
NAME = "aatomic contributors"
EMAIL = "contributors@aatomic.invalid"
DATE = "1767225600 +0000"

# Settings that a tree keeps, for whoever works in it with their own Git.
TREE_CONFIG = {
    "user.name": NAME,
    "user.email": EMAIL,
    "commit.gpgSign": "false",
    "core.attributesFile": os.devnull,
    "core.autocrlf": "false",
    "core.hooksPath": os.devnull,
    "gc.auto": "0",
}

# Settings for one command, because a tree's own could say otherwise.
COMMAND_CONFIG = {
    **TREE_CONFIG,
    "core.excludesFile": os.devnull,
    "core.quotePath": "false",
    "diff.suppressBlankEmpty": "false",
}

DIFF_OPTIONS = (
    "--binary",
    "--diff-algorithm=myers",
    "--dst-prefix=b/",
    "--full-index",
    "--indent-heuristic",
    "--inter-hunk-context=0",
    "--no-color",
    "--no-ext-diff",
    "--no-renames",
    "--no-textconv",
    "--src-prefix=a/",
    "--unified=3",
)


def environment(directory):
    """Return an environment in which Git knows nothing but `directory`."""
    env = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    for role in ("AUTHOR", "COMMITTER"):
        env[f"GIT_{role}_NAME"] = NAME
        env[f"GIT_{role}_EMAIL"] = EMAIL
        env[f"GIT_{role}_DATE"] = DATE
    env.update(
        GIT_ATTR_NOSYSTEM="1",
        GIT_CEILING_DIRECTORIES=str(Path(directory).resolve().parent),
        GIT_CONFIG_GLOBAL=os.devnull,
        GIT_CONFIG_NOSYSTEM="1",
        GIT_EDITOR="true",
        LC_ALL="C",
        TZ="UTC",
    )
    return env


class Git:
    """A repository whose work tree is `directory`."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.command = ["git"]
        for name, value in COMMAND_CONFIG.items():
            self.command += ["-c", f"{name}={value}"]

    @classmethod
    def create(cls, directory):
        git = cls(directory)
        git.directory.mkdir(parents=True, exist_ok=True)
        git("init", "--quiet", "--template=", "--object-format=sha1")
        git("symbolic-ref", "HEAD", "refs/heads/main")
        for name, value in TREE_CONFIG.items():
            git("config", name, value)
        return git

    def run(self, *args, input=None):
        """Run a command and return the process, whatever its exit code."""
        try:
            return subprocess.run(
                [*self.command, *args],
                cwd=self.directory,
                env=environment(self.directory),
                input=input,
                capture_output=True,
            )
        except FileNotFoundError as error:
            if not self.directory.is_dir():
                raise Unusable(f"{self.directory}: no such directory.") from error
            raise Unusable("git was not found; install it first.") from error

    def __call__(self, *args, input=None):
        """Run a command that must succeed and return its output."""
        process = self.run(*args, input=input)
        if process.returncode:
            raise Unusable(
                f"git {args[0]} failed in {self.directory}: "
                f"{process.stderr.decode(errors='replace').strip()}"
            )
        return process.stdout

    def text(self, *args):
        return self(*args).decode(errors="surrogateescape").strip()

    def paths(self, *args):
        """Run a command that lists paths with -z and return them."""
        output = self(*args).decode(errors="surrogateescape")
        return output.split("\0")[:-1]

    def commit(self, message):
        """Commit what is staged and nothing else."""
        self(
            "commit",
            "--allow-empty",
            "--cleanup=verbatim",
            "--file=-",
            "--no-verify",
            "--quiet",
            input=message.encode() + b"\n",
        )

    def message(self, commit):
        return self("show", "--no-patch", "--format=%B", commit).decode().rstrip("\n")

    def commits(self, start, end="HEAD"):
        """Return the commits after `start`, the first one first."""
        return self.text("rev-list", "--reverse", f"{start}..{end}").split()

    def files(self, tree):
        return self.paths("ls-tree", "-r", "-z", "--name-only", tree)

    def has(self, revision):
        return not self.run("rev-parse", "--quiet", "--verify", revision).returncode

    def is_repository(self):
        """Return whether the directory is the top of a repository."""
        return (self.directory / ".git").is_dir()


def apply_patch(git, patch, only=""):
    """
    Apply the edits of a patch to files in a work tree, not to its index.

    The files must be those the patch was made from: a hunk found on another
    line, or by ignoring some of its context, is as wrong as one not found.
    `only` is a prefix of the paths to edit.
    """
    edits = [edit for edit in patch.edits if edit.path.startswith(only)]
    if not edits:
        return
    for edit in edits:
        if not (git.directory / edit.path).is_file():
            raise ChainError(
                f"{patch.name}: {edit.path}: Django has no such file (files "
                f"the fork adds are named by 'Adds:', not in the diff)."
            )
    before = {e.path: file_id(git, e.path) for e in edits}
    apply = ["apply", "--verbose", f"--include={only}*"]
    process = git.run(*apply, "-", input=patch.diff)
    report = process.stderr.decode(errors="replace")
    if process.returncode:
        reduced = git.run(*apply, "--check", "-C1", "-", input=patch.diff)
        raise ChainError(describe_failure(patch, report, not reduced.returncode))
    path = None
    for line in report.splitlines():
        if line.startswith("Checking patch "):
            path = line[len("Checking patch ") :].removesuffix("...")
        elif match := OFFSET.search(line):
            raise ChainError(
                f"{patch.name}: {path}: hunk {match[1]} only applies at an "
                f"{match[2]}; the patch was made from another file."
            )
    for edit in edits:
        require_id(patch, edit, "before", before[edit.path])
        require_id(patch, edit, "after", file_id(git, edit.path))


OFFSET = re.compile(r"Hunk #(\d+) succeeded at \d+ \((offset -?\d+ lines?)\)")
FAILURE = re.compile(r"^error: patch failed: (.+):(\d+)$", re.MULTILINE)


def describe_failure(patch, report, applies_with_fuzz):
    match = FAILURE.search(report)
    if not match:
        return f"{patch.name}: does not apply: {report.strip()}"
    path, line = match.groups()
    reason = (
        "only applies with fuzz: lines around it have changed"
        if applies_with_fuzz
        else "does not apply: its lines are not there"
    )
    return f"{patch.name}: {path}: the hunk '@@ -{line}' {reason}."


def file_id(git, path):
    return blob_id((git.directory / path).read_bytes())


def require_id(patch, edit, when, found):
    """Raise an error unless a file has the id that the patch says."""
    expected = getattr(edit, when)
    if found != expected:
        raise ChainError(
            f"{patch.name}: {edit.path}: {when} the patch the file should be "
            f"blob {expected[:12]}, but is {found[:12]}."
        )
