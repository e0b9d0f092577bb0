"""
Draw the pictures in docs/pictures/.

    python scripts/draw.py
    python scripts/draw.py --tree build/django --output pictures

race.svg shows the forum's race (see draw_worker.py) as it was recorded on
stock Django and on the fork: which task sends which statement, on which
connection, and when. The order is always the same; the times are those of this
run. layers.svg shows what the fork consists of.

Materialise the tree this repository describes in a temporary directory, and
use its first commit as stock Django. PostgreSQL is started by postgres.py,
unless DATABASE_URL is set. What run_tests.py needs for PostgreSQL has to be
installed.

Exit codes: 0 drawn, 1 the race wasn't run as it should, 2 the pictures cannot
be drawn.
"""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from xml.sax.saxutils import escape

import materialise
import postgres
from chain import ROOT, Chain, ChainError, Unusable, argument_parser, run_script
from gittree import Git
from own_server import ServerError, unwind_on_termination

OUTPUT = ROOT / "docs" / "pictures"
WORKER = ROOT / "scripts" / "draw_worker.py"
WORKER_TIMEOUT = 60

# The parts of the fork, top down: what they are about, and their modules in
# django.db.
LAYERS = [
    (
        "Around requests, receivers and tests",
        "ASGI handler · ATOMIC_REQUESTS · asend() · TestCase",
        "life_cycle, closing, apart, captures",
    ),
    (
        "What is called",
        "aget(), asave() ... · aatomic() · new_connection() · acursor() · run_sync()",
        "async_calls, async_atomic, async_transaction, own_connections, async_cursors",
    ),
    (
        "Which connection, and whose turn",
        "Blocks form a tree. What is started inside a block uses its connection.",
        "belonging, sharing, turns, scopes, deserted",
    ),
    (
        "The one ORM there is, which stays synchronous",
        "querysets · model methods · signals · Atomic · backends",
        "",
    ),
]
# Where that runs, side by side, below the others.
MODES = [
    ("Thread mode: every database", "in threads", "threads, abandoned"),
    (
        "Native mode: PostgreSQL, with greenlet",
        "on the event loop",
        "native, bridge, bridge_debug, waiting, pool",
    ),
]

STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 }
.task { font-weight: 600 }
.code { font: 12px ui-monospace, monospace }
.small { font-size: 12px; fill: #59636e }
.paper { fill: #ffffff; stroke: #d1d9e0 }
.line { stroke: #818b98; fill: none }
.transaction { fill: #fff1d6; stroke: #9a6700; stroke-dasharray: 5 3 }
.first { fill: #ddf4ff; stroke: #0969da }
.second { fill: #fbefff; stroke: #8250df }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.small { fill: #b1bac4 }
.paper { fill: #0d1117; stroke: #3d444d }
.line { stroke: #9198a1 }
.transaction { fill: #332611; stroke: #d29922 }
.first { fill: #10233d; stroke: #4493f8 }
.second { fill: #271b3d; stroke: #ab7df8 }
}"""

# Measures of race.svg, in pixels.
TIME, COLUMN, BOX, ROW, TOP, GAP = 62, 176, 160, 48, 92, 24
# What the outcome of a trace takes.
NARROWEST = 320


class Picture:
    """The elements of an SVG."""

    def __init__(self, width, height, title, description):
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
            f'height="{height}" viewBox="0 0 {width} {height}" role="img" '
            'aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(description)}</desc>',
            f"<style>\n{STYLE}\n</style>",
        ]
        self.rect(0.5, 0.5, width - 1, height - 1, "paper")

    def rect(self, x, y, width, height, name):
        self.lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" '
            f'class="{name}"/>'
        )

    def text(self, x, y, content, name="", anchor="start"):
        self.lines.append(
            f'<text x="{x}" y="{y}" class="{name}" text-anchor="{anchor}">'
            f"{escape(content)}</text>"
        )

    def line(self, x1, y1, x2, y2):
        self.lines.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="line"/>'
        )

    def __str__(self):
        return "\n".join([*self.lines, "</svg>", ""])


def short(event):
    """Return a statement in a few characters."""
    words = event["sql"].split()
    strings = [param for param in event["params"] if not param.isdigit()]
    if words[1:2] and words[1].startswith("COUNT"):
        return "SELECT COUNT(*)"
    return " ".join([words[0], *(f"'{string}'" for string in strings)])


class Trace:
    """What was recorded of the race."""

    def __init__(self, title, subtitle, result):
        self.title = title
        self.subtitle = subtitle
        self.events = sorted(result["events"], key=lambda event: event["start"])
        self.backends = list(dict.fromkeys(event["backend"] for event in self.events))
        self.tasks = list(dict.fromkeys(event["task"] for event in self.events))
        self.outcome = [
            f"The import {'sees' if result['seen'] else 'does not see'} Ada, who is "
            "never committed.",
            "The import's row is "
            + ("committed." if result["committed"] else "lost with her."),
        ]

    @property
    def width(self):
        return max(NARROWEST, TIME + len(self.backends) * COLUMN)

    def time(self, event):
        """Return when an event began, in milliseconds from the first one."""
        return f"{(event['start'] - self.events[0]['start']) * 1000:.1f} ms"

    def column(self, event):
        return self.backends.index(event["backend"])

    def describe(self):
        """Return the events in words."""
        events = "; ".join(
            f"{event['task']} on connection {self.column(event) + 1}: {short(event)}"
            for event in self.events
        )
        return f"{self.title}: {events}. {' '.join(self.outcome)}"

    def transactions(self):
        """Yield column, first and last row of each transaction."""
        begun = {}
        for row, event in enumerate(self.events):
            if event["sql"] == "BEGIN":
                begun[event["backend"]] = row
            elif event["sql"] in ("COMMIT", "ROLLBACK"):
                yield self.column(event), begun.pop(event["backend"]), row

    def draw(self, picture, left):
        picture.text(left, 30, self.title, "title")
        picture.text(left, 48, self.subtitle, "code")
        bottom = TOP + len(self.events) * ROW
        for column in range(len(self.backends)):
            middle = left + TIME + column * COLUMN + BOX / 2
            picture.text(middle, 76, f"connection {column + 1}", "small", "middle")
            picture.line(middle, 82, middle, bottom)
        for column, first, last in self.transactions():
            x, y = left + TIME + column * COLUMN - 7, TOP + first * ROW - 5
            picture.rect(x, y, BOX + 14, (last - first + 1) * ROW, "transaction")
        for row, event in enumerate(self.events):
            x, y = left + TIME + self.column(event) * COLUMN, TOP + row * ROW
            name = ("first", "second")[self.tasks.index(event["task"]) % 2]
            picture.rect(x, y, BOX, ROW - 10, name)
            picture.text(x + 8, y + 15, event["task"], "task")
            picture.text(x + 8, y + 31, short(event), "code")
            picture.text(left + TIME - 14, y + 22, self.time(event), "small", "end")
        for number, line in enumerate(self.outcome):
            picture.text(left, bottom + 24 + number * 19, line)


def race(traces):
    """Return the picture of recorded races, side by side."""
    rows = max(len(trace.events) for trace in traces)
    picture = Picture(
        sum(trace.width + GAP for trace in traces) + GAP,
        TOP + rows * ROW + 60,
        "Who sends which statement, on which connection, and when",
        " ".join(trace.describe() for trace in traces),
    )
    left = GAP
    for trace in traces:
        trace.draw(picture, left)
        left += trace.width + GAP
    return picture


def layers():
    """Return the picture of what the fork consists of."""
    width, height = 760, 96
    description = "; ".join(
        [f"{title}: {modules or 'Django'}" for title, _, modules in LAYERS]
        + [f"{title}, {where}: {modules}" for title, where, modules in MODES]
    )
    picture = Picture(
        width + 2 * GAP,
        2 * GAP + (len(LAYERS) + 1) * height - 14,
        "The layers of the fork, from what is called down to where it runs",
        description,
    )
    y = GAP
    for title, parts, modules in LAYERS:
        picture.rect(GAP, y, width, height - 14, "second" if modules else "paper")
        picture.text(GAP + 14, y + 24, title, "task")
        picture.text(GAP + 14, y + 46, parts)
        picture.text(GAP + 14, y + 67, modules, "code")
        y += height
    half = (width - 14) / 2
    for number, (title, where, modules) in enumerate(MODES):
        x = GAP + number * (half + 14)
        picture.rect(x, y, half, height - 14, "first")
        picture.text(x + 14, y + 24, title, "task")
        picture.text(x + 14, y + 46, f"The ORM runs {where}.")
        picture.text(x + 14, y + 67, modules, "code")
    return picture


def record(url, tree):
    """Return what the worker recorded with the Django of a tree."""
    try:
        process = subprocess.run(
            [sys.executable, WORKER],
            env={**os.environ, "DATABASE_URL": url, "PYTHONPATH": str(tree)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WORKER_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise ChainError(f"{WORKER.name} took more than {WORKER_TIMEOUT} seconds.")
    if process.returncode:
        error = Unusable if process.returncode == 2 else ChainError
        raise error(process.stderr.strip())
    return json.loads(process.stdout)


def record_both(tree, stock):
    """Return the traces of the race on stock Django and on the fork."""
    with postgres.server() as url:
        print("Recording the race ...", flush=True)
        return [
            Trace(
                "Stock Django", "atomic() called by sync_to_async()", record(url, stock)
            ),
            Trace("With this fork", "async with aatomic()", record(url, tree)),
        ]


def extract_pristine(git, directory):
    """Write the stock Django of a tree to a directory."""
    archive = git("archive", "pristine", "django")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, filter="data")


def write(directory, pictures):
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (directory / name).write_text(str(picture), encoding="utf-8")
        print(directory / name)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--tree",
        type=pathlib.Path,
        help="show this tree (for example build/django, while editing it) instead of "
        "a new one",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=OUTPUT,
        help="the directory to write to (default: docs/pictures)",
    )
    args = parser.parse_args()
    unwind_on_termination()
    with tempfile.TemporaryDirectory(prefix="draw-") as name:
        directory = pathlib.Path(name)
        if args.tree is None:
            tree = directory / "django"
            git = materialise.materialise(Chain.load(), tree)
        else:
            tree = args.tree.resolve()
            git = Git(tree)
            materialise.require_tree(git)
        extract_pristine(git, directory / "stock")
        try:
            traces = record_both(tree, directory / "stock")
        except ServerError as error:
            raise Unusable(str(error)) from error
    write(args.output, {"race.svg": race(traces), "layers.svg": layers()})


if __name__ == "__main__":
    run_script(main)
