"""
Build Django's documentation with the fork's changes, and check it.

    python scripts/build_docs.py
    python scripts/build_docs.py --tree build/django --output build/docs

Materialise the tree this repository describes in a temporary directory, build
the HTML pages with the options of docs/Makefile, and fail on warnings. Then
run upstream's docs/lint.py, and check the pages that the fork adds or changes
with blacken-docs and, if the enchant library is installed, for misspelled
words.

If there are warnings, pristine Django's documentation is built as well. Those
which it has don't count: without a network, Sphinx can't resolve references
to the documentation of Python and psycopg. Then the fork can only refer to
what Django's documentation refers to somewhere.

Exit codes: 0 done, 1 a check failed, 2 the checks cannot be run.
"""

import argparse
import io
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial

import materialise
from chain import Chain, ChainError, Unusable, run_script
from gittree import Git

# As in docs/Makefile: nitpicky, in English, with as many processes as CPUs.
SPHINX = [sys.executable, "-m", "sphinx", "-n", "-q", "-j", "auto"]
SPHINX += ["-D", "language=en"]

WARNING = re.compile(r"^(?:.*: )?(?:WARNING|ERROR|CRITICAL): (.*)$", re.MULTILINE)

# What sphinxcontrib-spelling says about a word.
SPELLING = ": Spell check: "

# What Sphinx says about the network, not about the documentation.
UNREACHABLE = "failed to reach any of the inventories"


def step(text):
    print(f"{text} ...", flush=True)


def run_sphinx(builder, docs, directory, pages=()):
    """Return the warnings, as they were written and as messages."""
    log = directory / f"{builder}.log"
    command = [*SPHINX, "-b", builder, "-d", directory / "doctrees", "-w", log]
    start = time.monotonic()
    process = subprocess.run(
        [*command, docs, directory / builder, *pages],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Colours would get into the messages, and bytecode into the tree.
        env={**os.environ, "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if process.returncode:
        raise ChainError(f"Sphinx failed:\n{process.stderr}")
    print(f"  {time.monotonic() - start:.0f} seconds", flush=True)
    warnings = log.read_text(encoding="utf-8")
    return {
        match[0]: match[1]
        for match in WARNING.finditer(warnings)
        if not match[1].startswith(UNREACHABLE)
    }


def new_warnings(warnings, known):
    """Return the warnings whose messages aren't among those of `known`."""
    messages = set(known.values())
    return [line for line, message in warnings.items() if message not in messages]


def extract_pristine(git, directory):
    """Write Django's documentation, and what builds it, to a directory."""
    archive = git("archive", "pristine", "docs", "django")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, filter="data")


def changed_pages(tree, pristine):
    """Return the pages which the fork adds or changes."""
    return [
        page
        for page in sorted((tree / "docs").rglob("*.txt"))
        if "_build" not in page.parts
        and not has_same_content(page, pristine / page.relative_to(tree))
    ]


def has_same_content(page, other):
    return other.exists() and page.read_bytes() == other.read_bytes()


def pristine_warnings(pristine, directory):
    step("Building pristine Django's documentation")
    return run_sphinx("html", pristine / "docs", directory / "pristine")


def check_html(tree, directory, known):
    step("Building the fork's documentation")
    warnings = run_sphinx("html", tree / "docs", directory / "fork")
    if not warnings:
        return []
    print(f"  {len(warnings)} warnings", flush=True)
    return new_warnings(warnings, known())


def check_command(tree, *command):
    """Return what a command says if it fails."""
    process = subprocess.run(
        [sys.executable, *command],
        cwd=tree / "docs",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return [process.stdout.rstrip()] if process.returncode else []


def check_spelling(tree, directory, pages):
    """
    Return the misspelled words. What else there is to warn of was found by
    check_html().
    """
    warnings = run_sphinx("spelling", tree / "docs", directory / "words", pages)
    return [line for line in warnings if SPELLING in line]


def can_spell():
    """Return whether pyenchant is installed, and the library it needs."""
    try:
        import enchant
        import sphinxcontrib.spelling  # NOQA: F401
    except ImportError:
        return False
    return enchant.dict_exists("en_US")


def check(tree, pristine, directory, known=None):
    """
    Return what is wrong. `known` returns the warnings that pristine Django's
    documentation has.
    """
    known = known or partial(pristine_warnings, pristine, directory)
    pages = changed_pages(tree, pristine)
    if not pages:
        raise Unusable(f"{tree}: the fork changes no page.")
    problems = check_html(tree, directory, known)
    step("Checking the markup")
    problems += check_command(tree, "lint.py")
    step(f"Checking the code in {len(pages)} pages")
    problems += check_command(
        tree, "-m", "blacken_docs", "--check", "--rst-literal-block", *pages
    )
    if can_spell():
        step(f"Checking the spelling of {len(pages)} pages")
        problems += check_spelling(tree, directory, pages)
    else:
        print("Not checked: the spelling. It needs enchant and an English dictionary.")
    return problems


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tree",
        type=pathlib.Path,
        help="check this tree (for example build/django, while editing it) instead "
        "of a new one",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="keep what is built in this directory"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="build-docs-") as name:
        temporary = pathlib.Path(name)
        if args.tree is None:
            tree = temporary / "django"
            git = materialise.materialise(Chain.load(), tree)
        else:
            tree = args.tree.resolve()
            git = Git(tree)
            materialise.require_tree(git)
        pristine = temporary / "pristine"
        extract_pristine(git, pristine)
        output = temporary if args.output is None else args.output.resolve()
        for folder in ("fork", "pristine", "words"):
            (output / folder).mkdir(parents=True, exist_ok=True)
        if problems := check(tree, pristine, output):
            raise ChainError("\n".join(["the documentation has problems:", *problems]))
    print("The documentation is sound.")


if __name__ == "__main__":
    run_script(main)
