"""
ASGI servers in processes of their own, for tests.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

from django.db import connection, connections

COMMANDS = {
    "uvicorn": ["--fd={fd}"],
    "hypercorn": ["--bind=fd://{fd}"],
    "daphne": ["--fd={fd}"],
}


class Server:
    """
    A server for asgi_project.py, with the databases of this test run.

    Each alias has a name of its own in pg_stat_activity.
    """

    def __init__(self, program, pool_timeout=30, **default):
        name = f"{program} {os.getpid()}"
        self.databases = self.make_databases(name, pool_timeout, default)
        self.output = tempfile.TemporaryFile()
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
            self.address = listener.getsockname()
            arguments = [arg.format(fd=listener.fileno()) for arg in COMMANDS[program]]
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    program,
                    *arguments,
                    "async_transactions.asgi_project:application",
                ],
                cwd=Path(__file__).parent.parent,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "ASYNC_TRANSACTIONS_SETTINGS": json.dumps(
                        {"DATABASES": self.databases}
                    ),
                },
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
            )

    def make_databases(self, name, pool_timeout, default):
        """
        Return the settings: of the tests' databases, of one whose connections
        are persistent, and of one with a pool.
        """
        databases = {
            alias: deepcopy(connections[alias].settings_dict)
            for alias in ("default", "other")
        }
        databases["persistent"] = {
            **deepcopy(databases["default"]),
            "CONN_MAX_AGE": None,
        }
        databases["default"].update(default)
        if connection.vendor == "postgresql":
            databases["pooled"] = deepcopy(databases["persistent"])
            databases["pooled"]["CONN_MAX_AGE"] = 0
            databases["pooled"]["OPTIONS"]["pool"] = {
                "min_size": 0,
                "max_size": 4,
                "timeout": pool_timeout,
            }
            for alias, settings in databases.items():
                settings["OPTIONS"]["application_name"] = f"{name} {alias}"
        return databases

    def connect(self):
        if self.process.poll() is not None:
            raise ChildProcessError(f"The server has ended:\n{self.log()}")
        return http.client.HTTPConnection(*self.address, timeout=60)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()

    def log(self):
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def sessions(self):
        """
        Return the sessions that the server's process has, as the database sees
        them, except for those that are idle in the pool.
        """
        if connection.vendor != "postgresql":
            return self.files()
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT application_name, state FROM pg_stat_activity "
                "WHERE application_name = ANY(%s)",
                [self.names()],
            )
            return [
                (name, state)
                for name, state in cursor.fetchall()
                if not (name.endswith("pooled") and state == "idle")
            ]

    def names(self):
        return [
            settings["OPTIONS"]["application_name"]
            for settings in self.databases.values()
        ]

    def files(self):
        """Return which database files the server's process has open."""
        names = {str(settings["NAME"]) for settings in self.databases.values()}
        files = []
        for descriptor in Path("/proc").glob(f"{self.process.pid}/fd/*"):
            # It may have been closed by now.
            with suppress(FileNotFoundError):
                files.append(os.readlink(descriptor))
        return [file for file in files if file in names]

    def end_sessions(self):
        """Also those that still run a query, which a killed process can't."""
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = ANY(%s)",
                    [self.names()],
                )
