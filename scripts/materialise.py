#!/usr/bin/env python3
"""
Make the fork's source tree, where it is edited and tested.

Download the sdist of Django that patches/upstream.toml pins (pip does it, the
hash is verified, the file is cached), commit it with the tag "pristine" to a
Git repository of its own, and commit each patch of the series on top, with
the files of django/, tests/ and docs/django/ that it adds. Equal input makes
equal commit ids.

Edit and commit there, then run scripts/export.py. The work of the tree is not
thrown away: with changes or commits that were not exported, nothing happens.

Exit status: 0 done, 1 a patch or a header is wrong, 2 unusable input.
"""

import shutil
import tempfile
from pathlib import Path

from chain import (
    ROOT,
    Chain,
    ChainError,
    Unusable,
    argument_parser,
    digest,
    run_script,
)
from gittree import Git, apply_patch
from upstream import create_pristine

TREE = ROOT / "build" / "django"

# What the tree's repository remembers: the commit that the series stood for
# when the two were last equal, and the digest of the series at that time.
EXPORTED = "refs/tags/exported"
DIGEST = "aatomic.digest"


def materialise(chain, directory, log=print):
    """Materialise into a directory that does not exist or is empty."""
    git = create_pristine(chain.upstream, directory, log)
    both = sorted(set(git.files("pristine")).intersection(chain.ours))
    if both:
        raise ChainError("\n".join(f"{p}: both Django's and ours." for p in both))
    for position, patch in enumerate(chain.patches, 1):
        log(f"  [{position}/{len(chain.patches)}] {patch.name}")
        apply_patch(git, patch)
        for path in chain.added_by(patch):
            target = git.directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(chain.ours[path], target)
        git("add", "--all", "--force", ".")
        git.commit(patch.header.text)
    record_exported(git, chain.root)
    return git


def record_exported(git, root):
    """Remember that the tree and the series are equal."""
    git("update-ref", EXPORTED, "HEAD")
    git("config", DIGEST, digest(root))


def require_tree(git):
    if not git.is_repository() or not git.has("pristine"):
        raise Unusable(f"{git.directory}: not a tree made by materialise.py.")


def require_clean(git):
    """Raise an error if the tree has work that is in no commit."""
    changes = git.text("status", "--porcelain", "--untracked-files=all")
    if changes:
        raise Unusable(f"{git.directory} has uncommitted changes:\n{changes}")


def require_exported(git):
    """Raise an error if the tree has work that is not in the series."""
    require_clean(git)
    if git.text("rev-parse", "HEAD") != git.text("rev-parse", EXPORTED):
        commits = git.text("log", "--oneline", f"{EXPORTED}..HEAD")
        raise Unusable(
            f"{git.directory} has commits that were not exported; run "
            f"scripts/export.py first:\n{commits}"
        )


def replace_tree(chain, directory, force=False, log=print):
    """Materialise into a directory that may have an older tree."""
    git = Git(directory)
    if git.directory.exists() and any(git.directory.iterdir()):
        require_tree(git)
        if not force:
            require_exported(git)
    git.directory.parent.mkdir(parents=True, exist_ok=True)
    # A failure leaves the older tree as it is.
    with tempfile.TemporaryDirectory(dir=git.directory.parent) as folder:
        materialise(chain, Path(folder, "tree"), log)
        shutil.rmtree(git.directory, ignore_errors=True)
        Path(folder, "tree").rename(git.directory)
    return git


def main():
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--dir", type=Path, default=TREE, help="the tree (default: build/django)"
    )
    parser.add_argument(
        "--force", action="store_true", help="throw away work not exported"
    )
    args = parser.parse_args()
    chain = Chain.load()
    git = replace_tree(chain, args.dir, args.force)
    print(
        f"{git.directory}: Django {chain.upstream.version}, "
        f"{len(chain.patches)} patches, {len(chain.ours)} files of ours."
    )


if __name__ == "__main__":
    run_script(main)
