"""
Run the tests of each prefix of the series, for whoever merges it in steps.

    python scripts/run_prefixes.py sqlite-memory
    python scripts/run_prefixes.py postgres --first 5

With the first patch applied, then with the first two, and so on, import Django
and run the tests that the headers of these patches name ("Tests:"), as
run_tests.py does.

Exit codes: 0 all passed, 1 a prefix failed (the summary names it), 2 the tests
cannot be run.
"""

import argparse
import pathlib
import signal
import subprocess
import sys
import tempfile

import run_tests
from chain import ROOT, Chain, ChainError
from materialise import materialise
from own_server import ServerError, unwind_on_termination


def labels_of(patches):
    """Return what the headers of patches say to run, each once."""
    labels = {}
    for patch in patches:
        for label in patch.header.fields["Tests"].replace(",", " ").split():
            labels[label] = True
    return list(labels)


def imports(tree):
    """Return whether Django can be imported, with its database layer."""
    code = "import django.db.transaction, django.test, django.core.handlers.asgi"
    return not subprocess.run([sys.executable, "-c", code], cwd=tree).returncode


def run_prefix(git, commit, labels, database, directory):
    """Return what a line of the summary says, and whether all is well."""
    git("checkout", "--quiet", "--detach", commit)
    if not imports(git.directory):
        return "cannot be imported", False
    returncode, (passed, failed, skipped) = run_tests.run_apart(
        database, git.directory, directory, labels, []
    )
    result = f"{passed} passed, {failed} failed, {skipped} skipped"
    return result, returncode == 0 and passed > 0


def main(arguments):
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("database", choices=run_tests.DATABASES)
    parser.add_argument(
        "--first", type=int, default=1, metavar="N", help="leave out those before N"
    )
    options = parser.parse_args(arguments)
    unwind_on_termination()
    summary, sound = [], True
    try:
        chain = Chain.load(ROOT)
        if not 1 <= options.first <= len(chain.patches):
            raise run_tests.TestsError(f"There is no patch {options.first}.")
        with tempfile.TemporaryDirectory(prefix="run-prefixes-") as name:
            directory = pathlib.Path(name)
            git = materialise(chain, directory / "django")
            commits = git.commits("pristine")
            for number in range(options.first, len(commits) + 1):
                patches = chain.patches[:number]
                labels = labels_of(patches)
                title = f"[{number}/{len(commits)}] {patches[-1].name}"
                print(f"{title}: {' '.join(labels)}", flush=True)
                result, passed = run_prefix(
                    git, commits[number - 1], labels, options.database, directory
                )
                summary.append(f"{title}: {result}")
                sound = sound and passed
    except (ChainError, run_tests.TestsError, ServerError) as error:
        print(f"run_prefixes.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print("\n".join(["", *summary]))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
