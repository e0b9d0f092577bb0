"""The series of this project, on real releases of Django."""

import shutil
import tempfile
import unittest

from fixture import UPSTREAM, Repository


class ReleaseTests(unittest.TestCase):
    def setUp(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        self.repository = Repository.copy(folder)

    def assertSucceeds(self, script, *args):
        process = self.repository.run(script, *args)
        self.assertEqual(process.returncode, 0, process.stdout + process.stderr)

    def test_rebase_there_and_back(self):
        content = self.repository.content()
        self.assertSucceeds("rebase", "6.1.2")
        moved = self.repository.content()
        self.assertIn(b'version = "6.1.2"', moved["patches/upstream.toml"])
        self.assertEqual(sorted(moved), sorted(content))
        self.assertSucceeds("check")
        self.assertSucceeds("rebase", UPSTREAM.version, "--sha256", UPSTREAM.sha256)
        self.assertEqual(self.repository.content(), content)

    def test_submit(self):
        if not self.repository.content()["patches/series"]:
            self.skipTest("The series is empty.")
        self.assertSucceeds("submit")
