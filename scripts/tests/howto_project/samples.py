"""
Read the samples of docs/howto.md.

A section is what follows a heading, up to the next one of the same or a higher
level.
"""

import os
import pathlib
import re

# test_howto.py runs them on a changed page, too.
PAGE = pathlib.Path(
    os.environ.get(
        "HOWTO", pathlib.Path(__file__).resolve().parents[3] / "docs" / "howto.md"
    )
)

HEADING = re.compile(r"(#+) (.*)")
FENCE = "```"


class Section:
    def __init__(self, level, title):
        self.level = level
        self.title = title
        # (language, number of the first line, text) of each fenced block.
        self.blocks = []

    def texts(self, language):
        return [text for name, _, text in self.blocks if name == language]

    def execute(self):
        """Execute its Python samples, and return the names they define."""
        namespace = {"__name__": "howto"}
        for language, line, text in self.blocks:
            if language == "python":
                # Tracebacks name the lines of the page.
                code = compile("\n" * line + text, PAGE, "exec")
                exec(code, namespace)
        return namespace


def sections(text=None):
    """Return the sections of the page by their titles."""
    lines = iter((PAGE.read_text() if text is None else text).splitlines())
    found, opened = {}, []
    number = 0
    for line in lines:
        number += 1
        if match := HEADING.fullmatch(line):
            section = Section(len(match[1]), match[2])
            opened = [outer for outer in opened if outer.level < section.level]
            opened.append(section)
            found[section.title] = section
        elif line.startswith(FENCE):
            first, block = number, []
            for inner in lines:
                number += 1
                if inner == FENCE:
                    break
                block.append(inner)
            for section in opened:
                section.blocks.append(
                    (line.removeprefix(FENCE), first, "\n".join(block) + "\n")
                )
    return found
