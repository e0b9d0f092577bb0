"""
Promise 7: Connecting can be cancelled at any moment, and leaves no session on
the server.
"""

import asyncio
import threading
import time
from unittest import mock

from django.db import (
    DatabaseError,
    bridge,
    connection,
    connections,
    run_sync,
    transaction,
)

from .base import NativeTestCase
from .cancelling import cancel_everywhere
from .relay import Relay
from .test_waiting import WaitingTestCase, parameters, psycopg, uvloop

try:
    from django.db.backends.postgresql.waiting import WaitingConnection
except ImportError:
    WaitingConnection = None

NAME = "connecting"


def sessions():
    """Return the states of sessions on the server."""
    with psycopg.connect(**parameters(), autocommit=True) as conn:
        rows = conn.execute(
            "SELECT state FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = %s AND pid <> pg_backend_pid()",
            [NAME],
        )
        return [state for (state,) in rows]


class LateCancellationTests(WaitingTestCase):
    """The task, and with it the CancelledError, is kept until the end."""

    def check(self, connect, close=lambda conn: conn.close()):
        async def main():
            tasks = []
            async for task in cancel_everywhere(self, lambda: bridge.run(connect)):
                if not task.cancelled():
                    close(task.result())
                tasks.append(task)
                await asyncio.to_thread(self.assertNoSessions)
            self.assertIn(True, [task.cancelled() for task in tasks])

        self.run_on_loop(main())
        if uvloop is not None:
            self.run_on_loop(main(), loop_factory=uvloop.new_event_loop)

    def assertNoSessions(self):
        deadline = time.monotonic() + 5
        while found := sessions():
            self.assertLess(time.monotonic(), deadline, found)
            time.sleep(0.01)

    def test_driver(self):
        params = {**parameters(), "application_name": NAME}
        self.check(lambda: WaitingConnection.connect(**params))

    def test_tcp(self):
        params = {**parameters(), "application_name": NAME, "sslmode": "disable"}
        with Relay(params.get("host"), params.get("port")) as port:
            for host in ("127.0.0.1", "localhost"):
                with self.subTest(host=host):
                    params.update(host=host, port=port)
                    self.check(lambda: WaitingConnection.connect(**params))

    def test_thread(self):
        """As for the hosts in a service file, which libpq resolves."""
        params = {**parameters(), "application_name": NAME}
        with mock.patch.object(
            WaitingConnection, "_is_host_unknown", return_value=True
        ):
            self.check(lambda: WaitingConnection.connect(**params))

    def test_loop_closed(self):
        """The thread has nobody to give the connection to."""
        conns = []
        proceed = threading.Event()

        class Slow(WaitingConnection):
            @staticmethod
            def _is_host_unknown(*args):
                return True

            @classmethod
            def _connect_gen(cls, *args, **kwargs):
                conn = yield from super()._connect_gen(*args, **kwargs)
                conns.append(conn)
                proceed.wait(10)
                return conn

        async def main():
            params = {**parameters(), "application_name": NAME}
            task = asyncio.create_task(bridge.run(Slow.connect, **params))
            while not conns:
                await asyncio.sleep(0.01)
            task.cancel()

        self.run_on_loop(main())
        self.assertEqual(sessions(), ["idle"])
        proceed.set()
        self.assertNoSessions()


class WrapperTests(NativeTestCase):
    """Django's wrapper queries when it has connected."""

    role = "pg_read_all_data"
    options = {"assume_role": role, "application_name": NAME}

    def test_cancelled(self):
        """
        A connection is never used without what has to be set on it before.
        """

        async def main():
            async for task in cancel_everywhere(self, lambda: run_sync(current_role)):
                self.assertEqual(await run_sync(current_role), self.role)
                # So that the next one connects.
                await run_sync(close)
            self.assertEqual(task.result(), self.role)
            self.assertEqual(await asyncio.to_thread(sessions), [])

        self.run_on_loop(main())

    def test_failure(self):
        """Nor if there was an error."""
        msg = 'role "nobody" does not exist'

        async def main():
            for _ in range(2):
                with self.assertRaisesMessage(DatabaseError, msg):
                    await run_sync(current_role)

        with mock.patch.dict(
            connections.settings["default"]["OPTIONS"], assume_role="nobody"
        ):
            self.run_on_loop(main())

    def test_transaction(self):
        async def enter():
            async with transaction.aatomic():
                return await run_sync(current_role)

        async def main():
            async for task in cancel_everywhere(self, enter):
                self.assertEqual(await run_sync(current_role), self.role)
                await run_sync(close)
                await asyncio.to_thread(self.assertBecomes, sessions, [])

        self.run_on_loop(main())


def current_role():
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_user")
        return cursor.fetchone()[0]


def close():
    connection.close()
