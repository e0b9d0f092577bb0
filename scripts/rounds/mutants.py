"""
Break the fork on purpose, and see that a test goes red for each breakage.

    python scripts/rounds/mutants.py
    python scripts/rounds/mutants.py --only turns-off --tree build/django
    python scripts/rounds/mutants.py --list

Each patch in scripts/rounds/mutants/ is a mutant. Its header says in a line
what it breaks, then which promise doesn't hold any more ("Promise:") and who
notices ("Caught by:"): a kind of database, as run_tests.py calls it, and
labels of tests.

Run all these tests on the unbroken tree, which takes a server of each kind.
Then apply each patch to a copy of it, one at a time, run its tests until one
fails, and take the patch back. A test that hangs fails when its time is up.

Exit status: 0 every mutant was caught, 1 one survived or the unbroken tree
fails, 2 a mutant can't be used: it has no such header, doesn't apply, or
doesn't get as far as its tests.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mariadb  # noqa: E402
import own_server  # noqa: E402
import postgres  # noqa: E402
import run_tests  # noqa: E402
from chain import (  # noqa: E402
    ROOT,
    Chain,
    ChainError,
    Unusable,
    argument_parser,
)
from gittree import Git  # noqa: E402
from materialise import materialise  # noqa: E402

FOLDER = Path(__file__).resolve().with_suffix("")

HEADER = re.compile(
    r"(?P<what>\S.*\.)\n\n"
    r"Promise: (?P<promise>\d+)\n"
    r"Caught by: (?P<database>\S+)(?P<labels>(?:\s+\S+)+)\n\n"
)
EDITED = re.compile(r"^\+\+\+ b/(.+)$", re.MULTILINE)

# What runtests.py writes: which test failed first, and which began last.
FAILED = re.compile(
    r"^(?:FAIL|ERROR): test\w* \((?!unittest\.loader)(\S+?)\)", re.MULTILINE
)
BEGAN = re.compile(r"^test\w* \((\S+?)\)", re.MULTILINE)

# Seconds for the tests of a mutant. They take a few, unless it makes one hang.
TIME_LIMIT = 90


@dataclass(frozen=True)
class Mutant:
    name: str
    # The line that says what's broken.
    what: str
    promise: str
    database: str
    labels: list
    diff: str

    @classmethod
    def parse(cls, name, text):
        header, start, diff = text.partition("diff --git ")
        match = HEADER.fullmatch(header)
        if match is None:
            raise Unusable(
                f"{name}.patch: the header isn't a line that ends in a full stop, "
                "a blank one, 'Promise: N' and 'Caught by: DATABASE LABEL ...'."
            )
        if match["database"] not in run_tests.DATABASES:
            raise Unusable(f"{name}.patch: {match['database']!r} is no database.")
        return cls(
            name,
            match["what"],
            match["promise"],
            match["database"],
            match["labels"].split(),
            start + diff,
        )

    @property
    def paths(self):
        return EDITED.findall(self.diff)


def load(folder=FOLDER, only=None):
    """Return the mutants of a folder, or those of certain names."""
    paths = {path.stem: path for path in sorted(folder.glob("*.patch"))}
    for name in only or []:
        if name not in paths:
            raise Unusable(f"There is no mutant {name!r}; --list names them.")
    return [Mutant.parse(name, paths[name].read_text()) for name in only or paths]


def check_applies(mutant, tree):
    """Raise an error unless the patch fits the tree to the letter."""
    process = Git(tree).run("apply", "--check", "-", input=mutant.diff.encode())
    if process.returncode or not mutant.paths:
        report = process.stderr.decode(errors="replace").strip()
        raise Unusable(f"{mutant.name}.patch doesn't apply: {report}")


@contextlib.contextmanager
def applied(mutant, tree):
    """Let the tree be broken inside of the block."""
    check_applies(mutant, tree)
    originals = {tree / path: (tree / path).read_bytes() for path in mutant.paths}
    try:
        Git(tree)("apply", "-", input=mutant.diff.encode())
        for path, original in originals.items():
            if path.read_bytes() == original:
                raise Unusable(f"{mutant.name}.patch doesn't change {path}.")
        yield
    finally:
        for path, original in originals.items():
            path.write_bytes(original)


@dataclass(frozen=True)
class Result:
    passed: bool
    hung: bool
    # The test that failed first, if one did.
    test: str | None
    seconds: float
    output: str

    @property
    def unusable(self):
        """Whether it failed without getting as far as a test."""
        return not self.passed and self.test is None

    def __str__(self):
        if self.passed:
            return "SURVIVED"
        if self.unusable:
            return "DID NOT RUN"
        return f"{self.test} (hung)" if self.hung else self.test


def run(database, labels, tree, time_limit=None):
    """Run tests until one fails, and return the Result."""
    script = ROOT / "scripts" / "run_tests.py"
    command = [sys.executable, script, database, "--tree", tree, *labels]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, "--", "--parallel=1", "--failfast", "--verbosity=2"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    hung = False
    with own_server.ending(process):
        try:
            output, _ = process.communicate(timeout=time_limit)
        except subprocess.TimeoutExpired:
            hung = True
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate()
    failed = BEGAN.findall(output)[-1:] if hung else FAILED.findall(output)[:1]
    return Result(
        passed=not hung and process.returncode == 0,
        hung=hung,
        test=failed[0] if failed else None,
        seconds=time.monotonic() - start,
        output=output,
    )


def run_unbroken(mutants, tree):
    """Return whether the tests of all mutants pass on the unbroken tree."""
    sound = True
    for database in sorted({mutant.database for mutant in mutants}):
        labels = {
            label: None
            for mutant in mutants
            if mutant.database == database
            for label in mutant.labels
        }
        print(f"Unbroken, {database}: {len(labels)} labels", flush=True)
        result = run(database, labels, tree)
        if result.passed:
            print(f"  passed in {result.seconds:.0f} s", flush=True)
        else:
            print(f"{result.output}\n  FAILED: {result.test}", flush=True)
            sound = False
    return sound


def run_mutants(mutants, tree):
    """Break the tree by each mutant in turn. Return the Results."""
    results = []
    for number, mutant in enumerate(mutants, 1):
        print(f"[{number}/{len(mutants)}] {mutant.name}: {mutant.what}", flush=True)
        with applied(mutant, tree):
            result = run(mutant.database, mutant.labels, tree, TIME_LIMIT)
        results.append(result)
        if result.unusable:
            print(result.output)
        print(f"  {result}, {result.seconds:.0f} s", flush=True)
    return results


def table(rows):
    """Return lines with aligned columns, the first one being their names."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


@contextlib.contextmanager
def servers(mutants):
    """Run one server of each kind that several runs of tests need."""
    databases = {mutant.database for mutant in mutants}
    with contextlib.ExitStack() as stack:
        for server, variable, kinds in (
            (postgres.server, "DATABASE_URL", {"postgres", *run_tests.NATIVE}),
            (mariadb.server, "MARIADB_URL", {"mariadb"}),
        ):
            if databases & kinds and variable not in os.environ:
                os.environ[variable] = stack.enter_context(server())
                stack.callback(os.environ.pop, variable)
        yield


def copy_tree(source, directory):
    """Make a tree to break: a copy, or what the repository describes."""
    if source is None:
        materialise(Chain.load(), directory)
    elif not (source / "tests" / "runtests.py").exists():
        raise Unusable(f"{source} has no tests/runtests.py.")
    else:
        ignored = shutil.ignore_patterns(".git", "__pycache__")
        shutil.copytree(source, directory, ignore=ignored)


def run_all(mutants, source):
    """Run the tests, first on the unbroken tree. Return the exit status."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder, "django")
        copy_tree(source, tree)
        for mutant in mutants:
            check_applies(mutant, tree)
        with servers(mutants):
            if not run_unbroken(mutants, tree):
                print("The tests have to pass on the unbroken tree.", file=sys.stderr)
                return 1
            results = run_mutants(mutants, tree)
    rows = [
        (mutant.name, mutant.promise, str(result), f"{result.seconds:.0f}")
        for mutant, result in zip(mutants, results)
    ]
    print(f"\n{table([('mutant', 'promise', 'caught by', 'seconds'), *rows])}")
    survived = sum(result.passed for result in results)
    unusable = sum(result.unusable for result in results)
    caught = len(results) - survived - unusable
    print(f"\n{caught} caught, {survived} survived, {unusable} did not run")
    return 2 if unusable else 1 if survived else 0


def parse(arguments):
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="list the mutants")
    parser.add_argument(
        "--tree", type=Path, help="break a copy of this tree instead of a new one"
    )
    return parser.parse_args(arguments)


def main(options, tree):
    """Run what the options say; return the exit status."""
    try:
        mutants = load(only=options.only)
        if options.list:
            rows = [(m.name, m.promise, m.what) for m in mutants]
            print(table([("mutant", "promise", "what it breaks"), *rows]))
            return 0
        return run_all(mutants, tree)
    except (ChainError, own_server.ServerError) as error:
        print(f"mutants.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    own_server.unwind_on_termination()
    options = parse(sys.argv[1:])
    sys.exit(main(options, options.tree))
