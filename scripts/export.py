#!/usr/bin/env python3
"""
Write the commits of the materialised tree back to the repository.

Each commit after the tag "pristine" becomes a patch; its message is the
patch's header. Diffs only contain files that Django ships. Files of ours are
copied, as the last commit has them, to django/, tests/ and docs/django/; a
file that no commit claims is added to the "Adds:" of the commit that added
it. Patches keep their names as long as their subjects stay the same.

A tree that was just materialised is exported without changing a byte.

Exit status: 0 done, 1 a commit cannot become a patch, 2 unusable input.
"""

import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

from chain import (
    FIELDS,
    NOTHING,
    ROOT,
    ChainError,
    Header,
    Patch,
    Unusable,
    argument_parser,
    covers,
    digest,
    find_ours,
    repository_path,
    run_script,
)
from gittree import DIFF_OPTIONS, Git
from materialise import DIGEST, TREE, record_exported, require_clean, require_tree
from upstream import upstream_of

PIN = """\
# The release of Django that the series applies to. scripts/rebase.py moves it.
version = "{0.version}"
sha256 = "{0.sha256}"
"""


@dataclass
class Commit:
    """A commit of the tree on its way to becoming a patch."""

    label: str
    header: Header
    diff: bytes
    # Files of ours, by path in Django's tree, that it brings in.
    added: list

    @classmethod
    def read(cls, git, commit, shipped):
        message = git.message(commit)
        label = f"commit {commit[:10]} ({message.partition(chr(10))[0]})"
        if message.startswith(("fixup! ", "squash! ", "amend! ")):
            raise ChainError(
                f"{label}: fold it into its commit first, in the tree: "
                f"git rebase --interactive --autosquash pristine"
            )
        header = Header.parse(message, label)
        changes = git.paths(
            *("diff-tree", "-r", "-z", "--no-renames", "--no-commit-id"),
            *("--name-status", commit),
        )
        edited, added = [], []
        for status, path in zip(changes[::2], changes[1::2]):
            if path not in shipped:
                if status == "A":
                    added.append(path)
            elif status == "M":
                edited.append(path)
            else:
                raise ChainError(
                    f"{label}: {path}: a patch may only edit a file of Django's."
                )
        diff = b""
        if edited:
            diff = git(
                *("diff-tree", "--no-commit-id", "--patch", *DIFF_OPTIONS),
                *(commit, "--", *edited),
            )
        return cls(label, header, diff, added)


def read_commits(git, shipped):
    if git.run("merge-base", "--is-ancestor", "pristine", "HEAD").returncode:
        raise Unusable(f"{git.directory}: HEAD does not descend from 'pristine'.")
    if merges := git.text("rev-list", "--min-parents=2", "pristine..HEAD"):
        raise ChainError(f"A merge cannot become a patch: {merges}")
    return [Commit.read(git, c, shipped) for c in git.commits("pristine")]


def find_owners(commits, ours):
    """Return which commit each file of ours belongs to, by path."""
    owners = {}
    for path in ours:
        claiming = [c for c in commits if c.header.claims(path)]
        if len(claiming) > 1:
            labels = " and ".join(commit.label for commit in claiming)
            raise ChainError(f"{path}: claimed by {labels}.")
        adding = [c for c in commits if path in c.added]
        owners[path] = (claiming or adding)[0]
    return owners


def rewrite_adds(header, paths):
    """Return the header's text with an `Adds:` that claims exactly `paths`."""
    kept = [c for c in header.adds if any(covers(c, path) for path in paths)]
    new = [path for path in paths if not header.claims(path)]
    if kept == header.adds and not new:
        return header.text
    field = textwrap.fill(
        "Adds: " + (" ".join(kept + new) or NOTHING),
        width=79,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    pattern = re.compile(rf"^Adds:.*?(?=^{FIELDS[1]}:)", re.DOTALL | re.MULTILINE)
    return pattern.sub(lambda match: f"{field}\n", header.text)


def default_name(subject):
    """Return the name of a new patch: the words after the ticket."""
    words = subject.partition(" -- ")[2].lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + ".patch"


def current_names(root):
    """Return the names of the patches in the repository by subject."""
    return {
        path.read_text(encoding="utf-8").partition("\n")[0]: path.name
        for path in (root / "patches").glob("*.patch")
    }


def compose_patches(commits, owners, known_names):
    """Return the content of each patch by name, in the series' order."""
    patches = {}
    for commit in commits:
        paths = [path for path in sorted(owners) if owners[path] is commit]
        if not paths and not commit.diff:
            raise ChainError(
                f"{commit.label}: it only touches files that other commits "
                f"add: make it a fixup of those (git commit --fixup)."
            )
        subject = commit.header.subject
        name = known_names.get(subject) or default_name(subject)
        if name in patches:
            raise ChainError(f"{commit.label}: {name} is another commit's patch.")
        data = Patch.compose(rewrite_adds(commit.header, paths), commit.diff)
        # What cannot be read back must not be written.
        Patch.parse(name, data)
        patches[name] = data
    return patches


def export(git, root):
    """Write a clean tree to the repository; return the changed paths."""
    shipped = set(git.files("pristine"))
    ours = [path for path in git.files("HEAD") if path not in shipped]
    targets = {repository_path(root, path): path for path in ours}
    commits = read_commits(git, shipped)
    owners = find_owners(commits, ours)
    patches = compose_patches(commits, owners, current_names(root))

    folder = root / "patches"
    content = {folder / name: data for name, data in patches.items()}
    content[folder / "series"] = "".join(f"{n}\n" for n in patches).encode()
    content[folder / "upstream.toml"] = PIN.format(upstream_of(git)).encode()
    stale = set(folder.glob("*.patch")).union(find_ours(root).values())
    changed = remove(sorted(stale.difference(content, targets)))
    for path, data in content.items():
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
            changed.append(path)
    for path, source in targets.items():
        if copy(git.directory / source, path):
            changed.append(path)
    record_exported(git, root)
    return changed


def remove(paths):
    for path in paths:
        path.unlink()
        folder = path.parent
        while not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
    return paths


def copy(source, target):
    """Copy a file with its mode; return whether that changed anything."""
    mode = source.stat().st_mode
    if (
        target.exists()
        and target.stat().st_mode == mode
        and target.read_bytes() == source.read_bytes()
    ):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return True


def require_same_series(git, root):
    """Raise an error if the series changed after it was materialised."""
    if git.text("config", "--default", "", DIGEST) != digest(root):
        raise Unusable(
            f"patches/ or files of ours changed in {root} since "
            f"{git.directory} was made from them, and exporting would undo "
            f"that. Materialise again, or use --force."
        )


def main():
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--dir", type=Path, default=TREE, help="the tree (default: build/django)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="even if the repository changed since the tree was made",
    )
    args = parser.parse_args()
    git = Git(args.dir)
    require_tree(git)
    require_clean(git)
    if not args.force:
        require_same_series(git, ROOT)
    changed = export(git, ROOT)
    for path in sorted(changed):
        state = "wrote" if path.exists() else "removed"
        print(f"  {state} {path.relative_to(ROOT)}")
    print(f"{len(changed)} files changed.")


if __name__ == "__main__":
    run_script(main)
