"""
Tests that postgres.py and mariadb.py have in common.

A test case names the script's `module` and `variable`, SHOW_SERVER, which
prints the server's directory and process id, and SHOW_SETTINGS, which prints
that it doesn't listen to a network and the number of connections.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from functools import partial
from unittest import mock

from own_server import TEMP_DIR, ServerError

SLEEP = "import time; time.sleep(600)"


def is_running(pid):
    """Return whether a process exists and has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # In a container, nobody may reap an orphan.
    stat = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not stat.parent.parent.is_dir()


def kill_group(process):
    """
    Kill a process that is a group, and what it has started and is in the group
    as well: it would keep the process's output open.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Case(unittest.TestCase):
    def setUp(self):
        patcher = mock.patch.dict(os.environ)
        patcher.start()
        self.addCleanup(patcher.stop)
        os.environ.pop(self.variable, None)
        self.script = pathlib.Path(self.module.__file__)

    def scripts(self, **scripts):
        """Return a new directory with shell scripts."""
        temp_dir = tempfile.TemporaryDirectory(dir=TEMP_DIR)
        self.addCleanup(temp_dir.cleanup)
        directory = pathlib.Path(temp_dir.name)
        directory.chmod(0o755)
        for name, script in scripts.items():
            path = directory / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        return directory

    def assertServerError(self, arguments, *parts):
        with self.assertRaises(ServerError) as cm:
            with self.module.server(*arguments):
                self.fail("The block must not be entered.")
        for part in (*parts, self.variable):
            self.assertIn(part, str(cm.exception))


class CommandCases(Case):
    def start(self, *code):
        """Start the script with a command that runs code."""
        process = subprocess.Popen(
            [sys.executable, self.script, "--", sys.executable, "-c", "\n".join(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
            # A shell's background jobs ignore it, and so would the script.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.addCleanup(process.communicate)
        self.addCleanup(kill_group, process)
        return process

    def read_server(self, process):
        """Return the server's directory and process id."""
        directory, pid = process.stdout.readline().split()
        return pathlib.Path(directory), int(pid)

    def assertEnds(self, pid):
        deadline = time.monotonic() + 10
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertIs(is_running(pid), False)

    def test_help(self):
        result = subprocess.run(
            [sys.executable, self.script, "--help"],
            capture_output=True,
            encoding="utf-8",
        )
        self.assertEqual(result.returncode, 0)
        self.assertEqual(result.stdout.strip(), self.module.__doc__.strip())

    def test_exit_code(self):
        """The exit code is the command's; nothing is left behind."""
        process = self.start(self.SHOW_SERVER, "raise SystemExit(7)")
        directory, pid = self.read_server(process)
        self.assertEqual(process.wait(60), 7)
        self.assertEqual(process.stderr.read(), "")
        self.assertIs(is_running(pid), False)
        self.assertIs(directory.exists(), False)

    def test_server(self):
        """The server answers on a unix socket only, and serves many tasks."""
        process = self.start(self.SHOW_SETTINGS)
        stdout, stderr = process.communicate(timeout=60)
        self.assertEqual(stderr, "")
        self.assertEqual(stdout, self.SETTINGS)

    def test_termination(self):
        """SIGTERM and Ctrl-C stop the command and the server."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(signum=signum):
                process = self.start(
                    self.SHOW_SERVER, "print(os.getpid(), flush=True)", SLEEP
                )
                directory, pid = self.read_server(process)
                command_pid = int(process.stdout.readline())
                if signum == signal.SIGINT:
                    os.killpg(process.pid, signum)
                else:
                    process.send_signal(signum)
                self.assertEqual(process.wait(60), 128 + signum)
                self.assertIs(is_running(command_pid), False)
                self.assertIs(is_running(pid), False)
                self.assertIs(directory.exists(), False)

    @unittest.skipUnless(sys.platform == "linux", "Linux stops the server.")
    def test_killed(self):
        process = self.start(self.SHOW_SERVER, SLEEP)
        directory, pid = self.read_server(process)
        process.kill()
        self.assertEnds(pid)
        subprocess.run(["rm", "-r", directory], check=True)

    def test_command_not_found(self):
        result = subprocess.run(
            [sys.executable, self.script, "--", "/nonexistent"],
            capture_output=True,
            encoding="utf-8",
        )
        self.assertEqual(result.returncode, 2)
        self.assertIn("Cannot run /nonexistent", result.stderr)


class ServerCases(Case):
    """
    fake(create=..., run=...) gives the arguments for server() with which shell
    scripts stand for the programs that create the databases and run the
    server.
    """

    def test_url(self):
        """A server that the user names is used; none is started."""
        os.environ[self.variable] = "scheme://server/name"
        with mock.patch("own_server.subprocess") as subprocess:
            with self.module.server() as url:
                self.assertEqual(url, "scheme://server/name")
        self.assertEqual(subprocess.mock_calls, [])

    def test_no_directory(self):
        with mock.patch("own_server.TEMP_DIR", "/nonexistent"):
            self.assertServerError(
                self.fake(create="exit 0", run="exit 0"),
                "Cannot create a directory in /nonexistent",
            )

    def test_creation_fails(self):
        fake = self.fake(create="echo no space >&2; exit 1", run="exit 0")
        self.assertServerError(fake, "failed. Its log", "    no space")

    def test_server_does_not_start(self):
        """The error shows the end of the log."""
        fake = self.fake(create="exit 0", run="seq 1 40; echo no memory >&2; exit 1")
        self.assertServerError(fake, "does not start", "    40\n    no memory")

    def test_server_is_not_ready(self):
        """A server that does not become ready is stopped."""
        fake = self.fake(create="exit 0", run="echo $$ recovers; exec sleep 600")
        with mock.patch("own_server.START_TIMEOUT", 1):
            with self.assertRaises(ServerError) as cm:
                with self.module.server(*fake):
                    self.fail("The block must not be entered.")
        message = str(cm.exception)
        self.assertIn("not ready after 1 seconds", message)
        pid = next(line for line in message.splitlines() if "recovers" in line)
        self.assertIs(is_running(int(pid.split()[0])), False)
