import re
import unittest
from pathlib import Path

from docutils.core import publish_doctree

DRAFT = Path(__file__).parents[2] / "docs" / "dep_draft.rst"

# What DEP 1's template asks for: "All DEPs must include this exact copyright
# statement."
COPYRIGHT = """
This document has been placed in the public domain per the Creative Commons
CC0 1.0 Universal license (http://creativecommons.org/publicdomain/zero/1.0/deed).
"""


class DraftTests(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.text = DRAFT.read_text()

    def test_markup(self):
        """docutils has nothing to say of it."""
        tree = publish_doctree(self.text, settings_overrides={"report_level": 5})
        warnings = [
            message.astext() for message in tree.parse_messages if message["level"] > 1
        ]
        self.assertEqual(warnings, [])

    def test_copyright(self):
        self.assertIs(self.text.endswith(f"Copyright\n=========\n{COPYRIGHT}"), True)

    def test_pictures(self):
        """They are where it says."""
        pictures = re.findall(r"^\.\. figure:: (.*)$", self.text, re.MULTILINE)
        self.assertEqual(
            {DRAFT.parent / picture for picture in pictures},
            set((DRAFT.parent / "pictures").iterdir()),
        )

    def test_width(self):
        """All lines but that of the licence, which is quoted."""
        long = [line for line in self.text.splitlines() if len(line) > 79]
        self.assertEqual([line for line in long if "creativecommons" not in line], [])

    def test_series(self):
        """It tells how many patches there are."""
        patches = (DRAFT.parents[1] / "patches" / "series").read_text().split()
        [told] = re.findall(r"(\d+)\s+patches\s+against", self.text)
        self.assertEqual(int(told), len(patches))

    def test_pull_requests(self):
        """It tells how many docs/submitting.md proposes."""
        text = (DRAFT.parent / "submitting.md").read_text()
        numbers = re.findall(r"^\| (\d+) \| [AB-]", text, re.MULTILINE)
        [told] = re.findall(r"(\d+)\s+pull\s+requests,", self.text)
        self.assertEqual(numbers, [str(n) for n in range(1, int(told) + 1)])

    def test_throughput(self):
        """Its table has what was measured, in operations per second."""
        results = (DRAFT.parent / "benchmarks" / "results.md").read_text()
        measured = {}
        for section in results.split("\n### ")[1:]:
            title = section.partition("\n")[0]
            for name, figure in re.findall(
                r"^\| (.+?) \| ([\d,]+) \(", section, re.MULTILINE
            ):
                name = re.sub("^fork,", "Proposal,", name)
                measured.setdefault(name.replace("stock ", ""), {})[title] = figure
        rows = re.findall(
            r"^(\S.*\S) {2,}([\d,]+) +([\d,]+) +([\d,]+) +([\d,]+)$",
            self.text,
            re.MULTILINE,
        )
        self.assertEqual(
            {name: figures for name, *figures in rows},
            {
                name: [
                    figures["Get by key, 1 task"],
                    figures["Get by key, 50 tasks"],
                    figures["List of 100, 50 tasks"],
                    figures["Transaction, 50 tasks"],
                ]
                for name, figures in measured.items()
            },
        )

    def test_ratios(self):
        """So has its table of ratios."""
        results = (DRAFT.parent / "benchmarks" / "results.md").read_text()
        rows = re.findall(
            r"^(\S.*\S) {2,}(\d\.\d\d) +(\d\.\d\d)$", self.text, re.MULTILINE
        )
        self.assertEqual(len(rows), 4)
        for name, *ratios in rows:
            name = re.sub("^Django,", "stock Django,", name)
            for operation, ratio in zip(("Get by key", "Transaction"), ratios):
                with self.subTest(name=name, operation=operation):
                    self.assertRegex(
                        results,
                        rf"\| {operation}, 50 tasks \| (the .*: )?{name} \| {ratio} ",
                    )


if __name__ == "__main__":
    unittest.main()
