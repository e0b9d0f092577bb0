#!/usr/bin/env python3
"""
Write the series as mails that "git am" applies to Django.

The mails, in one file, are complete: they contain the files of ours as well.
They are applied to Django as it ships, and the result is compared with the
materialised tree.

Exit status: 0 written, 1 a patch is wrong or does not survive the mail, 2
unusable input.
"""

import tempfile
from pathlib import Path

from chain import ROOT, Chain, ChainError, Unusable, argument_parser, run_script
from gittree import DIFF_OPTIONS, Git
from materialise import materialise

OUTPUT = ROOT / "build" / "submit" / "series.mbox"


def compose_mails(git):
    """Return the series as an mbox."""
    return git(
        *("format-patch", "--stdout", "--numbered", "--zero-commit"),
        *("--no-attach", "--no-base", "--no-signature", "--no-stat"),
        *("--no-thread", *DIFF_OPTIONS, "pristine..HEAD"),
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


def main():
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help="the file to write (default: build/submit/series.mbox)",
    )
    args = parser.parse_args()
    chain = Chain.load(ROOT)
    if not chain.patches:
        raise Unusable("The series is empty.")
    with tempfile.TemporaryDirectory() as folder:
        git = materialise(chain, Path(folder, "tree"))
        print("Applying the mails ...")
        mails = compose_mails(git)
        require_same_result(git, mails, Path(folder, "mailed"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(mails)
    print(f"{args.output}: {len(chain.patches)} patches, applied and compared.")


if __name__ == "__main__":
    run_script(main)
