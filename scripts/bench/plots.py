"""
Draw the results: for each operation a figure, as PNG and SVG.

    python plots.py results.json DIRECTORY

run.py calls it in an environment with matplotlib.
"""

import json
import pathlib
import sys
from statistics import median

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from operations import OPERATIONS  # noqa: E402
from report import figures  # noqa: E402

OURS, THEIRS = "#0c4b33", "#9aa5a0"


def draw(results, operation, directory):
    """Draw the operations per second, and a plot for each number of tasks."""
    found = {
        tasks: by_contender
        for (name, tasks), by_contender in figures(
            results["measurements"], "rate"
        ).items()
        if name == operation
    }
    if not found:
        return
    height = 1 + 0.35 * len(results["titles"])
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(5 + 3 * len(found), height), squeeze=False, sharey=True
    )
    names = [name for name in results["titles"] if any(name in found[t] for t in found)]
    for axis, (tasks, by_contender) in zip(axes[0], found.items()):
        for position, name in enumerate(names):
            values = by_contender.get(name, {}).values()
            if not values:
                continue
            middle = median(values)
            axis.barh(
                position,
                middle,
                xerr=[[middle - min(values)], [max(values) - middle]],
                color=OURS if name in ("native", "thread") else THEIRS,
                ecolor="#444444",
                capsize=2,
            )
            axis.annotate(
                f"{middle:,.0f}" if middle >= 10 else f"{middle:.2g}",
                (max(values), position),
                xytext=(4, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=8,
            )
        axis.set_title(f"{tasks:,} task{'s' if tasks > 1 else ''}", fontsize=9)
        axis.set_yticks(range(len(names)), [results["titles"][n] for n in names])
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{OPERATIONS[operation].title}: operations per second")
    figure.tight_layout()
    for suffix in ("png", "svg"):
        # Without a date, equal results make equal files.
        metadata = {"Date": None} if suffix == "svg" else {}
        figure.savefig(directory / f"{operation}.{suffix}", dpi=110, metadata=metadata)
    pyplot.close(figure)


def main(path, directory):
    matplotlib.rcParams["svg.hashsalt"] = "bench"
    results = json.loads(pathlib.Path(path).read_text())
    for operation in OPERATIONS:
        draw(results, operation, pathlib.Path(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])
