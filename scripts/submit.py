#!/usr/bin/env python3
"""
Write the series as mails that "git am" applies to Django.

    python scripts/submit.py
    python scripts/submit.py --verify
    python scripts/submit.py --verify --only 6 --database postgres
    python scripts/submit.py --verify --from 14 --checks applies,lint

The mails, in one file, are complete: they contain the files of ours as well.
They are applied to Django as it ships, and the result is compared with the
materialised tree.

With --verify, nothing is written, but each commit is checked with nothing
after it applied, as if it were merged alone:

applies  its mail, applied to the commit before it, makes this commit
lint     black, isort and flake8 are content with the Python files it touches,
         as Django configures them
docs     if it touches the documentation: what build_docs.py checks
tests    the tests that its header names pass, of the fork and of upstream

That takes long: tests and documentation some minutes each for each commit.

Exit status: 0 written or verified, 1 a patch is wrong or does not survive the
mail, or a commit isn't sound, 2 unusable input.
"""

import tempfile
from pathlib import Path

from chain import ROOT, Chain, ChainError, Unusable, argument_parser, run_script
from gittree import DIFF_OPTIONS, Git
from materialise import materialise

OUTPUT = ROOT / "build" / "submit" / "series.mbox"


def compose_mails(git, revisions="pristine..HEAD"):
    """Return the series, or a part of it, as an mbox."""
    return git(
        *("format-patch", "--stdout", "--numbered", "--zero-commit"),
        *("--no-attach", "--no-base", "--no-signature", "--no-stat"),
        *("--no-thread", *DIFF_OPTIONS, revisions),
    )


def require_same_result(git, mails, directory):
    """Apply the mails to the pristine tree and compare what comes out."""
    git("worktree", "add", "--quiet", "--detach", str(directory), "pristine")
    other = Git(directory)
    process = other.run("am", "--quiet", "--keep-cr", input=mails)
    if process.returncode:
        report = process.stderr.decode(errors="replace").strip()
        raise ChainError(f"git am does not apply the mails: {report}")
    # Author and dates are always the same, so equal commits have equal ids.
    for revision, what in (("HEAD^{tree}", "files"), ("HEAD", "messages")):
        if git.text("rev-parse", revision) != other.text("rev-parse", revision):
            raise ChainError(f"git am makes other {what} than materialise.py.")


def require_checks(names):
    """Return the checks to do, if they are known and can be done."""
    # Python may be too old for it.
    import verification

    unknown = set(names or []).difference(verification.CHECKS)
    if unknown:
        raise Unusable(
            f"{', '.join(sorted(unknown))}: no such check. There are "
            f"{', '.join(verification.CHECKS)}."
        )
    names = names or verification.CHECKS
    verification.require_packages(names)
    return names


def main():
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help="the file to write (default: build/submit/series.mbox)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check each commit, write nothing"
    )
    parser.add_argument(
        "--only",
        type=int,
        action="append",
        metavar="N",
        help="verify the Nth commit (can be repeated)",
    )
    parser.add_argument(
        "--from",
        type=int,
        default=1,
        dest="first",
        metavar="N",
        help="verify the Nth commit and those after it",
    )
    parser.add_argument(
        "--checks",
        type=lambda value: value.split(","),
        metavar="NAMES",
        help="some of the checks, separated by commas (default: all)",
    )
    parser.add_argument(
        "--database",
        action="append",
        help="run the tests on it, as run_tests.py does (default: sqlite-memory; can "
        "be repeated)",
    )
    args = parser.parse_args()
    if args.verify:
        args.checks = require_checks(args.checks)
    elif args.only or args.first != 1 or args.checks or args.database:
        raise Unusable("--only, --from, --checks and --database require --verify.")
    chain = Chain.load(ROOT)
    if not chain.patches:
        raise Unusable("The series is empty.")
    with tempfile.TemporaryDirectory() as folder:
        git = materialise(chain, Path(folder, "tree"))
        if args.verify:
            import verification

            verification.verify(chain, git, Path(folder), args, compose_mails)
            return
        print("Applying the mails ...")
        mails = compose_mails(git)
        require_same_result(git, mails, Path(folder, "mailed"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(mails)
    print(f"{args.output}: {len(chain.patches)} patches, applied and compared.")


if __name__ == "__main__":
    run_script(main)
