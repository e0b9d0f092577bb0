"""
The samples and messages of docs/howto.md: see howto_project.
"""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import postgres
import run_tests

PROJECT = pathlib.Path(__file__).resolve().parent / "howto_project"
PAGE = PROJECT.parents[2] / "docs" / "howto.md"

# Seconds, for a run that takes two.
TIMEOUT = 120

sys.path.append(str(PROJECT))

import samples  # noqa: E402


def setUpModule():
    global TREE
    directory = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(directory.cleanup)
    TREE = pathlib.Path(directory.name)
    run_tests.materialise(TREE)


def run(databases, **environ):
    """Run the project's tests; return the exit code and the output."""
    process = subprocess.run(
        [sys.executable, "-m", "django", "test"],
        cwd=PROJECT,
        env={
            **os.environ,
            "DATABASES": json.dumps({"default": databases["default"]}),
            "DJANGO_SETTINGS_MODULE": "settings",
            "PYTHONPATH": str(TREE),
            **environ,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return process.returncode, process.stdout


class SampleTests(unittest.TestCase):
    # Test cases of the page, and those of test_samples.py.
    COUNT = 13

    def check(self, databases):
        code, output = run(databases)
        self.assertEqual(code, 0, output)
        self.assertIn(f"Ran {self.COUNT} tests", output)

    def test_sqlite(self):
        with tempfile.TemporaryDirectory() as directory:
            self.check(run_tests.sqlite_file(pathlib.Path(directory)))

    def test_in_memory(self):
        self.check(run_tests.sqlite_memory())

    def test_changed_page(self):
        """A sample that doesn't do what the page says is found."""
        for old, new in (
            ("on_commit(partial(confirm, order))", "on_commit(partial(print, order))"),
            ("reserve' opened on", "reserve' has opened on"),
            (
                "    paid.set()\n    await task\n\n\nasync def right",
                "\n\nasync def right",
            ),
        ):
            text = PAGE.read_text()
            self.assertIn(old, text)
            with self.subTest(new=new), tempfile.NamedTemporaryFile("w") as page:
                page.write(text.replace(old, new, 1))
                page.flush()
                code, output = run(run_tests.sqlite_memory(), HOWTO=page.name)
                self.assertEqual(code, 1, output)


class PostgreSQLTests(unittest.TestCase):
    """In both modes, with the settings of the page."""

    @classmethod
    def setUpClass(cls):
        cls.url = cls.enterClassContext(postgres.server())

    def check(self, title):
        databases = run_tests.on_server(postgres.database_settings(self.url))
        namespace = {}
        exec(samples.sections()[title].texts("python")[0], namespace)
        shown = namespace["DATABASES"]["default"]
        own = databases["default"]
        options = {**own["OPTIONS"], **shown["OPTIONS"]}
        default = {**own, **shown, "NAME": own["NAME"], "OPTIONS": options}
        SampleTests.check(self, {"default": default})
        return default

    COUNT = SampleTests.COUNT

    def test_native(self):
        default = self.check("Choosing a mode")
        self.assertIs(default["ASYNC_NATIVE"], True)

    def test_thread(self):
        default = self.check("Pools")
        self.assertNotIn("ASYNC_NATIVE", default)


# What raises errors for users, by the names of what makes them.
MODULES = [
    "async_atomic",
    "async_calls",
    "async_cursors",
    "belonging",
    "native",
    "own_connections",
    "sharing",
    "threads",
    "transaction",
]
MAKERS = re.compile(r"error|_refused|[A-Z]\w*(Error|Configured)")

# Not seen by users.
INTERNAL = ["The transaction has ended.", "The connection '…' doesn't exist."]


def text_of(node):
    """Return the text of an expression for a message, or None."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) or "…" for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return re.sub("%[rs]", "…", text_of(node.left))
    if isinstance(node, ast.BinOp):
        return f"{text_of(node.left) or '…'}{text_of(node.right) or '…'}"
    return None


def messages(tree):
    """Yield the messages of errors that the fork raises."""
    for name in MODULES:
        path = tree / "django" / "db" / f"{name}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            maker = getattr(node.func, "attr", getattr(node.func, "id", ""))
            text = text_of(node.args[0])
            if text and MAKERS.fullmatch(maker) and " " in text:
                if text not in INTERNAL:
                    yield text


class MessageTests(unittest.TestCase):
    def test_each_is_explained(self):
        text = " ".join(PAGE.read_text().split())
        found = list(messages(TREE))
        self.assertGreater(len(found), 20)
        for message in found:
            parts = message.replace("'…'", "…").split("…")
            pattern = ".{1,60}?".join(map(re.escape, parts))
            with self.subTest(message=message):
                self.assertIsNotNone(re.search(pattern, text))

    def test_links(self):
        text = PAGE.read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {
            "#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in titles
        }
        targets = re.findall(r"\]\((\S+)\)|^\[.*\]: (\S+)$", text, re.MULTILINE)
        self.assertGreater(len(targets), 5)
        for target in map("".join, targets):
            with self.subTest(target=target):
                self.assertTrue(
                    target in anchors or (PAGE.parent / target).is_file(), target
                )


if __name__ == "__main__":
    unittest.main()
