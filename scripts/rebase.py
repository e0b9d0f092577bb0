#!/usr/bin/env python3
"""
Move the series to another release of Django.

Materialise the series, commit the other release beside it, and cherry-pick
each patch onto that, which is a three-way merge. Then write the patches, and
the version and hash of the release, back to the repository.

On a conflict the tree is left as it is for the conflict to be resolved there,
and nothing in the repository has changed. What to do is printed.

Exit status: 0 done, 1 a patch conflicts, 2 unusable input.
"""

import re
from pathlib import Path

from chain import (
    ROOT,
    Chain,
    ChainError,
    Unusable,
    Upstream,
    argument_parser,
    run_script,
)
from export import export
from materialise import TREE, replace_tree
from upstream import fetch, import_commit, look_up

VERSION = re.compile(r"\d+\.\d+(\.\d+)?((a|b|rc)\d+)?")


def describe_conflict(git, commits, patches):
    """Say which patch conflicts, where, and what to do about it."""
    commit = git.text("rev-parse", "CHERRY_PICK_HEAD")
    patch = patches[commits.index(commit)]
    lines = [f"{patch.name} conflicts."]
    conflicts = git.paths("diff", "-z", "--name-only", "--diff-filter=U")
    for path in conflicts:
        lines.append(f"  {path}: {describe_hunks(git.directory / path)}")
    step = "git cherry-pick --continue"
    if conflicts:
        lines.append(f"In {git.directory}, resolve it and git add the files.")
    else:
        lines.append("  Nothing is left of it: the release has the change.")
        step = "git cherry-pick --skip"
    lines.append(f"In {git.directory}, then run: {step}")
    lines.append("When no patch is left: python scripts/export.py")
    lines.append("To give up: python scripts/materialise.py --force")
    return "\n".join(lines)


def describe_hunks(path):
    lines = path.read_bytes().splitlines()
    starts = [str(n) for n, line in enumerate(lines, 1) if line[:8] == b"<<<<<<< "]
    if not starts:
        return "the release no longer has it"
    return f"hunk at line {', '.join(starts)}"


def rebase(git, chain, upstream, log=print):
    """Move the tree's commits onto another release."""
    base = import_commit(git, upstream, fetch(upstream, log))
    commits = git.commits("pristine")
    git("checkout", "--quiet", "-B", "main", base)
    git("tag", "--force", "pristine", base)
    if not commits:
        return
    log(f"Moving {len(commits)} patches to Django {upstream.version} ...")
    process = git.run("cherry-pick", "--allow-empty", *commits)
    if process.returncode:
        if not git.has("CHERRY_PICK_HEAD"):
            raise Unusable(process.stderr.decode(errors="replace").strip())
        raise ChainError(describe_conflict(git, commits, chain.patches))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("version", help="the release, for example 6.1.4")
    parser.add_argument("--sha256", help="its sdist's hash (default: what pip finds)")
    parser.add_argument(
        "--dir", type=Path, default=TREE, help="the tree (default: build/django)"
    )
    args = parser.parse_args()
    if not VERSION.fullmatch(args.version):
        raise Unusable(f"{args.version!r} is not the version of a release.")
    chain = Chain.load(ROOT)
    if args.sha256:
        upstream = Upstream(args.version, args.sha256)
    else:
        upstream = look_up(args.version)
        print(f"The sdist has the sha256 {upstream.sha256}.")
    git = replace_tree(chain, args.dir)
    rebase(git, chain, upstream)
    changed = export(git, ROOT)
    print(f"{len(changed)} files changed. Run scripts/check.py and the tests.")


if __name__ == "__main__":
    run_script(main)
