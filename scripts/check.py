#!/usr/bin/env python3
"""
Check that the series is sound.

The headers are complete, the series names exactly the patches that are there,
each file of ours is claimed by one patch and unknown to Django. Each patch
applies where it says, without offset or fuzz, and gives the files it says.
Materialising the series in a temporary folder and exporting it again changes
no byte.

Exit status: 0 sound, 1 not sound, 2 unusable input.
"""

import shutil
import tempfile
from pathlib import Path

from chain import ROOT, Chain, ChainError, argument_parser, run_script
from export import export
from materialise import materialise


def copy_sources(chain, target):
    """Copy what the tree is made from."""
    paths = [path for path in (chain.root / "patches").iterdir() if path.is_file()]
    for path in [*paths, *chain.ours.values()]:
        copy = target / path.relative_to(chain.root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def check_round_trip(chain, log=print):
    with tempfile.TemporaryDirectory() as folder:
        git = materialise(chain, Path(folder, "tree"), log)
        copy = Path(folder, "repository")
        copy_sources(chain, copy)
        changed = [path.relative_to(copy) for path in export(git, copy)]
    if changed:
        raise ChainError(
            "Exporting the materialised tree changes "
            f"{', '.join(map(str, changed))}: run scripts/materialise.py and "
            f"scripts/export.py, and look at the difference."
        )


def main():
    argument_parser(__doc__).parse_args()
    chain = Chain.load(ROOT)
    check_round_trip(chain)
    print(
        f"{len(chain.patches)} patches and {len(chain.ours)} files of ours are sound."
    )


if __name__ == "__main__":
    run_script(main)
