"""
The tables that follow from the measurements.

A figure is the median of the rounds, and its spread the smallest and the
largest one. A ratio is that of two contenders within one round, so what else
the machine does has slowed down both.
"""

from dataclasses import dataclass
from statistics import median

from operations import OPERATIONS, SLEEP
from waiting_memory import KINDS

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


# What synchronous Django needs, see instructions.py.
DATABASES = {"sqlite": "SQLite in memory", "postgresql": "PostgreSQL"}

ORMS_ON_PSYCOPG = (
    "stock-async",
    "stock-sync",
    "async-backend",
    "sqlalchemy-psycopg",
    "tortoise-psycopg",
)


@dataclass(frozen=True)
class Goal:
    """What native mode is to reach, and the ratios measured, by round."""

    what: str
    against: str
    # None if there's nothing to reach.
    least: float | None
    aim: float | None
    ratios: list
    # A ratio of times or of memory is to be small.
    is_cost: bool = False

    def reaches(self, limit):
        reached = median(self.ratios)
        return reached <= limit if self.is_cost else reached >= limit

    @property
    def verdict(self):
        if self.least is None:
            return ""
        if not self.reaches(self.least):
            return "NOT REACHED"
        return "aim" if self.reaches(self.aim) else "reached"


# How many times as fast native mode is to be: operation, tasks, against, at
# least, aim.
FASTER = [
    ("get", 50, "stock-async", 5, 8),
    ("get", 50, "stock-sync", 1.2, 1.5),
    ("get", 50, "async-backend", 1.5, 2),
    ("transaction", 50, "stock-async", 3, 5),
    ("transaction", 50, "stock-sync", 1.3, 1.7),
    ("transaction", 50, "async-backend", 1.3, 1.7),
    ("transaction", 50, "sqlalchemy-psycopg", 1.1, 1.5),
    ("get", 50, "tortoise-asyncpg", None, None),
    ("transaction", 50, "tortoise-asyncpg", None, None),
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
    """Return the Goals that something was measured for."""
    found = [*_faster(results), *_cheaper(results), *_ahead(results)]
    return [goal for goal in found if goal.ratios]


def _faster(results):
    rates = figures(results["measurements"], "rate")
    for operation, tasks, against, least, aim in FASTER:
        yield Goal(
            case_title(operation, tasks),
            results["titles"].get(against, against),
            least,
            aim,
            ratios(rates.get((operation, tasks), {}), "native", against),
        )


def _cheaper(results):
    titles = results["titles"]
    rates = figures(results["measurements"], "rate").get(("get", 1), {})
    yield Goal(
        f"Time of {case_title('get', 1)}",
        titles.get("stock-sync", ""),
        1.25,
        1.15,
        ratios(rates, "stock-sync", "native"),
        is_cost=True,
    )
    ideal = OPERATIONS["sleep"].tasks[0] / OPERATIONS["sleep"].pool * SLEEP
    elapsed = figures(results["measurements"], "elapsed").get(("sleep", 1000), {})
    yield Goal(
        f"Time of {case_title('sleep', 1000)}",
        f"the ideal {ideal} s",
        1.15,
        1.05,
        [time / ideal for time in elapsed.get("native", {}).values()],
        is_cost=True,
    )
    for kind, description in KINDS.items():
        memory = waiting_memory(results, kind)
        for against in ("stock-sync", "stock-async"):
            yield Goal(
                f"Memory of a waiting transaction, {description}",
                titles.get(against, ""),
                0.5,
                0.2,
                ratios(memory, "native", against),
                is_cost=True,
            )
    for database, pieces in results.get("instructions", {}).items():
        changes = {
            name: [fork / stock for fork, stock in zip(counts["fork"], counts["stock"])]
            for name, counts in pieces.items()
        }
        worst = max(changes, key=lambda name: median(changes[name]))
        yield Goal(
            f"Instructions of synchronous Django, the worst: {worst}",
            f"stock Django, {DATABASES[database]}",
            1.01,
            1,
            changes[worst],
            is_cost=True,
        )


def _ahead(results):
    """Give the Goal for each operation: to be ahead of the ORM that's next."""
    for case, rates in figures(results["measurements"], "rate").items():
        # It's the server that limits them all.
        if OPERATIONS[case[0]].once:
            continue
        by_contender = {
            name: ratios(rates, "native", name)
            for name in ORMS_ON_PSYCOPG
            # A single task can't be faster than a thread that needs no loop.
            if not (name == "stock-sync" and case[1] == 1)
        }
        by_contender = {name: found for name, found in by_contender.items() if found}
        if by_contender:
            best = min(by_contender, key=lambda name: median(by_contender[name]))
            yield Goal(
                case_title(*case),
                f"the fastest ORM on psycopg: {results['titles'][best]}",
                1,
                1,
                by_contender[best],
            )


def waiting_memory(results, kind):
    """Return what a transaction needs besides its connection, by round."""
    found = {}
    for measurement in results.get("waiting", ()):
        if measurement["kind"] == kind:
            by_round = found.setdefault(measurement["contender"], {})
            by_round[measurement["round"]] = (
                measurement["memory"] - measurement["connection"]
            )
    return found


def goal_table(results):
    """Give the lines of a table of what native mode is to reach."""
    yield from row("Native mode", "against", "ratio", "at least", "aim", "")
    yield from row("-", "-", "-:", "-:", "-:", "-")
    for goal in goals(results):
        sign = "≤ " if goal.is_cost else "≥ "
        yield from row(
            goal.what,
            goal.against,
            spread(goal.ratios, 3 if goal.least == 1.01 else 2),
            *(f"{sign}{limit:g}" if limit else "" for limit in (goal.least, goal.aim)),
            goal.verdict,
        )


def waiting_table(results):
    """Give the lines of a table of what waiting transactions need."""
    yield from row("KiB per transaction, without its connection", *KINDS.values())
    yield from row("-", *("-:" for _ in KINDS))
    found = [waiting_memory(results, kind) for kind in KINDS]
    for name in found[0]:
        yield from row(
            results["titles"][name],
            *(spread(by.get(name, {}).values(), 1, 1 / 1024) for by in found),
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
    if goals(results):
        yield "## What native mode is to reach"
        yield ""
        yield (
            "Ratios of operations per second (≥), or of time, memory or instructions "
            "(≤), each the median of the rounds."
        )
        yield ""
        yield from goal_table(results)
        yield ""
    if results.get("waiting"):
        yield "## Memory of a transaction that waits"
        yield ""
        yield from waiting_table(results)
        yield ""
    yield "## All figures"
    yield ""
    yield from tables(results)


def row(*cells):
    yield "| " + " | ".join(cells) + " |"
