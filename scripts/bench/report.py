"""
The tables that follow from the measurements.

A figure is the median of the rounds, and its spread the smallest and the
largest one. A ratio is that of two contenders within one round, so what else
the machine does has slowed down both.
"""

from dataclasses import dataclass
from statistics import median

from operations import OPERATIONS

STOCK = "stock-async"

# How each of the figures is shown: title, factor, decimals.
COLUMNS = {
    "rate": ("Operations/s", 1, 0),
    "p50": ("p50 (ms)", 1000, 2),
    "p99": ("p99 (ms)", 1000, 2),
    "cpu": ("CPU per operation (ms)", 1000, 3),
    "memory": ("Peak memory (MiB)", 1 / 2**20, 0),
    "threads": ("Threads", 1, 0),
}


@dataclass(frozen=True)
class Goal:
    """How many times as fast native mode is to be as another contender."""

    operation: str
    tasks: int
    against: str
    least: float
    aim: float


GOALS = [
    Goal("get", 50, "stock-async", 5, 8),
    Goal("get", 50, "stock-sync", 1.2, 1.5),
    Goal("get", 50, "async-backend", 1.5, 2),
    Goal("transaction", 50, "stock-async", 3, 5),
    Goal("transaction", 50, "stock-sync", 1.3, 1.7),
    Goal("transaction", 50, "async-backend", 1.3, 1.7),
    Goal("transaction", 50, "sqlalchemy-psycopg", 1.1, 1.5),
    Goal("get", 1, "stock-sync", 1 / 1.25, 1 / 1.15),
]


def figures(measurements, key):
    """
    Return the values of a figure by operation and tasks, contender, and round.
    """
    found = {}
    for measurement in measurements:
        case = (measurement["operation"], measurement["tasks"])
        by_contender = found.setdefault(case, {})
        by_round = by_contender.setdefault(measurement["contender"], {})
        by_round[measurement["round"]] = measurement[key]
    return found


def ratios(by_contender, contender, against):
    """Return those of the rounds that both have, as a list."""
    ours, theirs = by_contender.get(contender, {}), by_contender.get(against, {})
    return [ours[number] / theirs[number] for number in ours if number in theirs]


def spread(values, decimals=0, factor=1):
    """Return the median, and in parentheses the least and the greatest."""
    if not values:
        return "-"
    middle, *ends = (
        f"{value * factor:,.{decimals}f}"
        for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({'–'.join(ends)})"


def case_title(operation, tasks):
    task = "task" if tasks == 1 else "tasks"
    return f"{OPERATIONS[operation].title}, {tasks:,} {task}"


def tables(results):
    """Give the lines of a page in Markdown."""
    measurements = results["measurements"]
    titles = results["titles"]
    found = {key: figures(measurements, key) for key in COLUMNS}
    for case, by_contender in found["rate"].items():
        yield f"### {case_title(*case)}"
        yield ""
        heads = [title for title, _, _ in COLUMNS.values()]
        yield from row("", *heads, "Times stock Django, async")
        yield from row("-", *("-:" for _ in heads), "-:")
        for name in by_contender:
            cells = [
                spread(found[key][case][name].values(), decimals, factor)
                for key, (_, factor, decimals) in COLUMNS.items()
            ]
            ratio = spread(ratios(by_contender, name, STOCK), 2)
            yield from row(titles[name], *cells, ratio)
        yield ""


def goals(results):
    """Give the lines of a table of what native mode is to reach."""
    found = figures(results["measurements"], "rate")
    yield from row("Native mode", "against", "times as fast", "at least", "aim", "")
    yield from row("-", "-", "-:", "-:", "-:", "-")
    for goal in GOALS:
        case = (goal.operation, goal.tasks)
        values = ratios(found.get(case, {}), "native", goal.against)
        if not values:
            continue
        reached = median(values)
        verdict = "below" if reached < goal.least else "reached"
        if reached >= goal.aim:
            verdict = "aim"
        yield from row(
            case_title(*case),
            results["titles"][goal.against],
            spread(values, 2),
            f"{goal.least:.2f}",
            f"{goal.aim:.2f}",
            verdict,
        )


def page(results):
    """Give the lines of the page with all tables."""
    about = results["about"]
    yield "# Benchmarks"
    yield ""
    yield (
        f"Measured by `scripts/bench/run.py`: {about['rounds']} rounds, in each of "
        f"which the contenders take turns, {about['seconds']:g} s per measurement. "
        "The figures are medians, with the least and the greatest in parentheses. "
        "Ratios are those of one round. What else happened on the machine is in "
        "all of them, so compare figures within a table, and ratios elsewhere."
    )
    yield ""
    yield (
        f"{about['cpus']} CPUs ({about['machine']}), load {about['load']} at the "
        f"beginning, Python {about['python']}, PostgreSQL {about['postgresql']} "
        "on the same machine, reached through a Unix socket."
    )
    yield ""
    yield "| Contender | With |"
    yield "|-|-|"
    for name, versions in results["versions"].items():
        yield f"| {results['titles'][name]} | {versions} |"
    yield ""
    if results["left_out"]:
        yield "Left out:"
        yield ""
        for what, why in results["left_out"]:
            yield f"- {what}: {why}"
        yield ""
    lines = list(goals(results))
    if len(lines) > 2:
        yield "## What native mode is to reach"
        yield ""
        yield from lines
        yield ""
    yield "## All figures"
    yield ""
    yield from tables(results)


def row(*cells):
    yield "| " + " | ".join(cells) + " |"
