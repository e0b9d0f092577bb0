import pathlib
import tempfile
import unittest
from xml.etree import ElementTree

import draw
import run_tests
from chain import ROOT, Chain
from gittree import Git

SVG = "{http://www.w3.org/2000/svg}"


def event(task, backend, sql, *params, at=0):
    return {
        "task": task,
        "backend": backend,
        "sql": sql,
        "params": list(params),
        "start": 100 + at / 1000,
        "end": 100 + (at + 1) / 1000,
    }


def trace(*events, seen=False, committed=()):
    result = {"events": events, "seen": seen, "committed": list(committed)}
    return draw.Trace("Title", "Subtitle", result)


def texts(picture):
    """Parse a picture, and return its texts."""
    root = ElementTree.fromstring(str(picture))
    return [element.text for element in root.iter(f"{SVG}text")]


class TraceTests(unittest.TestCase):
    def setUp(self):
        self.trace = trace(
            event("b", 4711, "COMMIT", at=9),
            event("b", 4711, "BEGIN", at=2.54),
            event("a", 4712, "SELECT COUNT(*) FROM t"),
            event("a", 4712, "INSERT INTO t VALUES (%s, %s)", "1", "<x>", at=5),
            committed=["<x>"],
        )

    def test_order(self):
        """It's that of time, not of the backends' numbers."""
        self.assertEqual(
            self.trace.describe(),
            "Title: a on connection 1: SELECT COUNT(*); b on connection 2: BEGIN; a on "
            "connection 1: INSERT '<x>'; b on connection 2: COMMIT. The import does "
            "not see Ada, who is never committed. The import's row is committed.",
        )

    def test_transactions(self):
        self.assertEqual(list(self.trace.transactions()), [(1, 1, 3)])

    def test_picture(self):
        picture = draw.race([self.trace, trace(event("a", 1, "SELECT 1"), seen=True)])
        shown = texts(picture)
        for text in ("Title", "connection 2", "2.5 ms", "INSERT '<x>'"):
            self.assertIn(text, shown)
        self.assertIn("The import sees Ada, who is never committed.", shown)
        self.assertIn("The import's row is lost with her.", shown)


class LayersTests(unittest.TestCase):
    def test_modules(self):
        """Each module that the fork adds to django.db is shown once."""
        shown = []
        for *_, modules in [*draw.LAYERS, *draw.MODES]:
            shown += modules.split(", ") if modules else []
        added = [
            pathlib.PurePath(path).stem
            for path in Chain.load(ROOT).ours
            if path.startswith("django/db/")
        ]
        self.assertEqual(sorted(shown), sorted(added))


class DrawnTests(unittest.TestCase):
    """The pictures that are committed."""

    def description(self, name):
        root = ElementTree.parse(draw.OUTPUT / name).getroot()
        self.assertEqual(root.get("role"), "img")
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        self.assertEqual(root.get("aria-labelledby").split(), ids)
        return root.find(f"{SVG}desc").text

    def test_layers(self):
        expected = str(draw.layers())
        self.assertEqual((draw.OUTPUT / "layers.svg").read_text(), expected)
        self.description("layers.svg")

    def test_race(self):
        """It's what is recorded today, but for the times."""
        with tempfile.TemporaryDirectory() as name:
            tree, stock = pathlib.Path(name, "fork"), pathlib.Path(name, "stock")
            run_tests.materialise(tree)
            draw.extract_pristine(Git(tree), stock)
            today = draw.record_both(tree, stock)
        self.assertEqual([len(trace.backends) for trace in today], [1, 2])
        self.assertEqual(
            self.description("race.svg"), " ".join(trace.describe() for trace in today)
        )


if __name__ == "__main__":
    unittest.main()
