"""
What submit.py --verify does: check each commit of the series on its own.
"""

import collections
import importlib.util
import subprocess
import sys
import textwrap
import time
from functools import cache

import build_docs
import run_prefixes
import run_tests
from chain import ChainError, Unusable
from gittree import Git
from own_server import ServerError

# In this order. Each is a method of Verification.
CHECKS = ["applies", "lint", "docs", "tests"]

# Django's configuration of flake8, which the release doesn't contain, but for
# the files that it excepts from some rules.
FLAKE8 = [
    *("-m", "flake8", "--isolated", "--extend-ignore=E203"),
    *("--max-line-length=88", "--max-doc-length=79"),
    "--format=%(path)s:%(row)d:%(code)s: %(text)s",
]
BLACK = ["-m", "black", "--check", "--quiet"]
ISORT = ["-m", "isort", "--check-only", "--quiet"]

# What is imported by each check, besides Django.
NEEDED = {
    "lint": ["black", "flake8", "isort"],
    "docs": ["sphinx", "sphinxlint", "blacken_docs"],
    "tests": ["tblib"],
}

PASSED, FAILED, NOTHING = "ok", "FAILED", "-"


def require_packages(checks):
    """Raise an error if a check can't be done for lack of a package."""
    missing = [
        name
        for check in checks
        for name in NEEDED.get(check, [])
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise Unusable(
            f"{', '.join(missing)}: not installed. Install it, or choose other checks "
            "with --checks."
        )


class Verification:
    """The series as commits of a tree, and what was found out about them."""

    def __init__(self, chain, git, directory, databases, compose_mails):
        self.chain = chain
        self.git = git
        self.directory = directory
        self.databases = databases
        self.compose_mails = compose_mails
        self.commits = git.commits("pristine")
        self.pristine = self.worktree("pristine")
        self.mailed = self.worktree("mailed")

    def worktree(self, name):
        path = self.directory / name
        self.git("worktree", "add", "--quiet", "--detach", str(path), "pristine")
        return Git(path)

    def paths(self, commit, *patterns):
        """Return the paths of what a commit adds and changes."""
        names = ["diff", "--name-only", "-z", f"{commit}^", commit, "--"]
        return self.git.paths(*names, *patterns)

    def applies(self, patch, commit):
        """Its mail makes the commit of the one before it."""
        self.mailed("checkout", "--quiet", "--detach", f"{commit}^")
        mail = self.compose_mails(self.git, f"{commit}^..{commit}")
        process = self.mailed.run("am", "--quiet", "--keep-cr", input=mail)
        if process.returncode:
            self.mailed.run("am", "--abort")
            return [process.stderr.decode(errors="replace").strip()]
        # Author and dates are always the same, so equal commits have equal
        # ids.
        if self.mailed.text("rev-parse", "HEAD") != commit:
            return ["git am makes another commit of its mail."]
        return []

    def lint(self, patch, commit):
        """What it adds is formatted as Django's configuration says."""
        paths = self.paths(commit, "*.py")
        if not paths:
            return None
        # What the files have had before doesn't count.
        before = self.mailed
        before("checkout", "--quiet", "--detach", f"{commit}^")
        old = [path for path in paths if (before.directory / path).exists()]
        problems = []
        for command in (BLACK, ISORT):
            known = self.rejected(before, command, old)
            problems += [
                f"{path}: {command[1]} would change it."
                for path in self.rejected(self.git, command, paths)
                if path not in known
            ]
        known = self.flake8(before, old)
        found = self.flake8(self.git, paths)
        for key, places in found.items():
            problems += places[len(known.get(key, [])) :]
        return problems

    def rejected(self, git, command, paths):
        """Return the files that a command isn't content with."""
        if not paths or not self.call(git, command, *paths).returncode:
            return []
        return [path for path in paths if self.call(git, command, path).returncode]

    def flake8(self, git, paths):
        """Return the lines of flake8's output, by file, rule and source."""
        found = collections.defaultdict(list)
        if not paths:
            return found
        for line in self.call(git, FLAKE8, *paths).stdout.splitlines():
            path, row, rest = line.split(":", 2)
            source = (git.directory / path).read_text().splitlines()
            code = source[int(row) - 1] if int(row) <= len(source) else ""
            found[path, rest.split(":")[0], code].append(line)
        return found

    def call(self, git, command, *arguments):
        return subprocess.run(
            [sys.executable, *command, *arguments],
            cwd=git.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def docs(self, patch, commit):
        """The documentation is sound, if it changes any."""
        if not self.paths(commit, "docs/"):
            return None
        # Sphinx only reads again what differs from the commit built before.
        output = self.directory / "docs"
        for folder in ("fork", "words"):
            (output / folder).mkdir(parents=True, exist_ok=True)
        # Built once, however many commits there are.
        return build_docs.check(
            self.git.directory, self.pristine.directory, output, self.known_warnings
        )

    @cache
    def known_warnings(self):
        """Return what Sphinx says about Django as it ships."""
        (self.directory / "pristine-docs" / "pristine").mkdir(parents=True)
        return build_docs.pristine_warnings(
            self.pristine.directory, self.directory / "pristine-docs"
        )

    def tests(self, patch, commit):
        """The tests that its header names pass."""
        problems = []
        for database in self.databases:
            labels = run_prefixes.labels_of([patch])
            print(f"    {database}: {' '.join(labels)}", flush=True)
            try:
                result, passed = run_prefixes.run_prefix(
                    self.git, commit, labels, database, self.directory
                )
            except (run_tests.TestsError, ServerError) as error:
                raise Unusable(error) from error
            if not passed:
                problems.append(f"{database}: {result}")
        return problems

    def verify(self, number, checks):
        """Check a commit; return what the summary says for each check."""
        patch, commit = self.chain.patches[number - 1], self.commits[number - 1]
        print(f"[{number}/{len(self.commits)}] {patch.name}", flush=True)
        self.git("checkout", "--quiet", "--detach", commit)
        results = {}
        for check in checks:
            start = time.monotonic()
            try:
                problems = getattr(self, check)(patch, commit)
            except Unusable:
                raise
            except ChainError as error:
                problems = [str(error)]
            result = NOTHING if problems is None else FAILED if problems else PASSED
            results[check] = result
            for problem in problems or []:
                print(textwrap.indent(problem, "    "))
            seconds = time.monotonic() - start
            print(f"  {check}: {result} ({seconds:.0f} seconds)", flush=True)
        return results


def select(total, only, first):
    """Return the numbers of the commits to verify."""
    numbers = only or range(first, total + 1)
    for number in [*numbers, first]:
        if not 1 <= number <= total:
            raise Unusable(f"There is no patch {number}.")
    return list(numbers)


def table(results, names):
    """Return the lines of the summary."""
    width = max(map(len, names.values()))
    for number, cells in results.items():
        columns = "  ".join(f"{name}: {cell:6}" for name, cell in cells.items())
        yield f"{number:3}  {names[number]:{width}}  {columns}".rstrip()


def verify(chain, git, directory, options, compose_mails):
    """Verify commits, print a summary, and raise an error if one fails."""
    numbers = select(len(chain.patches), options.only, options.first)
    verification = Verification(
        chain, git, directory, options.database or ["sqlite-memory"], compose_mails
    )
    results = {
        number: verification.verify(number, options.checks) for number in numbers
    }
    names = {number: chain.patches[number - 1].name for number in numbers}
    print("\n".join(["", *table(results, names)]), flush=True)
    failed = [number for number, cells in results.items() if FAILED in cells.values()]
    if failed:
        raise ChainError(f"not sound on their own: {', '.join(map(str, failed))}")
    print(f"{len(numbers)} of {len(chain.patches)} commits verified.")
