"""
Promise 7: the server is restarted while a program is inside of blocks.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import unittest

import postgres
import run_tests
from own_server import stop
from own_server_cases import kill_group

SCRIPTS = pathlib.Path(postgres.__file__).parent

# Seconds after which the program hangs.
TIMEOUT = 120

PROGRAM = """
    import asyncio
    import json
    import os
    import sys

    import django
    import postgres
    import psycopg
    from asgiref.sync import sync_to_async
    from django.conf import settings

    database = postgres.database_settings(os.environ["DATABASE_URL"])
    # A crash must not lose what was committed, unlike elsewhere.
    database["OPTIONS"]["options"] = "-c synchronous_commit=on"
    if sys.argv[1] == "pool":
        database["OPTIONS"]["pool"] = {"min_size": 0, "max_size": 2, "timeout": 10}
        database["CONN_HEALTH_CHECKS"] = True
    settings.configure(DATABASES={"default": database})
    django.setup()

    from django.db import connection, transaction

    @sync_to_async
    def execute(sql):
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else None

    def tell(**message):
        print(json.dumps(message), flush=True)

    def restart():
        tell(restart=True)
        sys.stdin.readline()

    def restart_during_sleep():
        with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as observer:
            while not observer.execute(
                "SELECT 1 FROM pg_stat_activity "
                "WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
            ).fetchone():
                pass
        restart()

    async def between_statements():
        await asyncio.to_thread(restart)
        await execute("SELECT 1")

    async def before_commit():
        await asyncio.to_thread(restart)

    async def in_a_nested_block():
        async with transaction.aatomic():
            await between_statements()

    async def during_a_statement():
        results = await asyncio.gather(
            execute("SELECT pg_sleep(60)"),
            asyncio.to_thread(restart_during_sleep),
            return_exceptions=True,
        )
        raise results[0]

    async def main():
        async with transaction.aatomic():
            await execute("DROP TABLE IF EXISTS names")
            await execute("CREATE TABLE names (name text)")
        for function in (
            between_statements, before_commit, in_a_nested_block, during_a_statement
        ):
            name, called, error = function.__name__, [], None
            try:
                async with transaction.aatomic():
                    transaction.on_commit(lambda: called.append(True))
                    await execute(f"INSERT INTO names VALUES ('{name}, lost')")
                    await function()
            except Exception as exc:
                error = f"{type(exc).__module__}.{type(exc).__qualname__}: {exc}"
            async with transaction.aatomic():
                await execute(f"INSERT INTO names VALUES ('{name}')")
            tell(name=name, error=error, called=called)
        async with transaction.aatomic():
            rows = await execute("SELECT name FROM names ORDER BY name")
        for attempt in range(100):
            # The pool may be preparing one.
            async with transaction.aatomic():
                sessions = await execute(
                    "SELECT count(*) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() "
                    "AND backend_type = 'client backend' AND state <> 'idle'"
                )
            if not sessions[0][0]:
                break
            await asyncio.sleep(0.1)
        tell(rows=[row[0] for row in rows], busy_sessions=sessions[0][0])

    asyncio.run(main())
"""

NAMES = ["before_commit", "between_statements", "during_a_statement"]
NAMES += ["in_a_nested_block"]


class RestartTests(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temp_dir = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temp_dir.cleanup)
        cls.tree = pathlib.Path(temp_dir.name) / "django"
        run_tests.materialise(cls.tree)
        cls.cluster = cls.enterClassContext(postgres.cluster())

    def start_program(self, url, *arguments):
        program = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={
                **os.environ,
                "DATABASE_URL": url,
                "PYTHONPATH": os.pathsep.join([str(self.tree), str(SCRIPTS)]),
            },
            process_group=0,
        )
        self.addCleanup(program.communicate)
        self.addCleanup(kill_group, program)
        timer = threading.Timer(TIMEOUT, kill_group, [program])
        timer.start()
        self.addCleanup(timer.cancel)
        return program

    def restart(self, signum, error, *arguments):
        url, running = self.cluster
        servers = self.enterContext(contextlib.ExitStack())
        server = servers.enter_context(running())
        program = self.start_program(url, *arguments)
        blocks = []
        for line in program.stdout:
            message = json.loads(line)
            if "restart" in message:
                stop(server, [signum])
                self.assertIsNotNone(server.returncode, "The server does not stop.")
                server = servers.enter_context(running())
                program.stdin.write("restarted\n")
                program.stdin.flush()
            elif "name" in message:
                blocks.append(message["name"])
                with self.subTest(message["name"]):
                    self.assertIn("django.db.utils.OperationalError", message["error"])
                    self.assertIn(error, message["error"])
                    self.assertEqual(message["called"], [])
            else:
                self.assertEqual(message, {"rows": NAMES, "busy_sessions": 0})
        self.assertEqual(program.wait(10), 0)
        self.assertEqual(sorted(blocks), NAMES)

    def test_restart(self):
        self.restart(signal.SIGINT, "terminating connection", "no pool")

    def test_restart_with_a_pool(self):
        self.restart(signal.SIGINT, "terminating connection", "pool")

    def test_crash(self):
        self.restart(signal.SIGQUIT, "connection", "no pool")


if __name__ == "__main__":
    unittest.main()
