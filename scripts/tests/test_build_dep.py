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


if __name__ == "__main__":
    unittest.main()
