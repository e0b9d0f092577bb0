"""
Promise 7 on MariaDB and MySQL, where a query is cancelled by KILL QUERY from a
connection of its own, and Promise 3, as the driver refuses a second use of a
connection while a query runs on it.
"""

import asyncio
import threading
import time
import unittest

from asgiref.sync import sync_to_async

from django.db import (
    DEFAULT_DB_ALIAS,
    OperationalError,
    connection,
    connections,
    transaction,
)

from .base import (
    AsyncTransactionTestCase,
    create,
    kill_session,
    other_sessions,
    session_id,
    wait_until,
)
from .models import Entry

INTERRUPTED = 1317


def execute(sql, params=None):
    with transaction.get_connection().cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


def is_running(text):
    """Return whether another session runs a query that contains `text`."""
    sql = (
        "SELECT 1 FROM information_schema.PROCESSLIST "
        "WHERE info LIKE %s AND id <> CONNECTION_ID()"
    )
    return bool(execute(sql, [f"%{text}%"]))


@unittest.skipUnless(connection.vendor == "mysql", "MariaDB and MySQL tests")
class CancelQueryTests(AsyncTransactionTestCase):
    def cancel(self, text):
        """Cancel this thread's query as soon as the server runs it."""
        own = connections[DEFAULT_DB_ALIAS]
        seen = []

        def wait_and_cancel():
            try:
                seen.append(wait_until(lambda: is_running(text)))
                own.cancel_query()
            finally:
                connection.close()

        thread = threading.Thread(target=wait_and_cancel)
        thread.start()
        self.addCleanup(self.assertEqual, seen, [True])
        self.addCleanup(thread.join)

    def test_running_query(self):
        """Only the query is cancelled: the transaction can be rolled back."""
        with self.assertRaises(OperationalError) as cm:
            with transaction.atomic():
                create("rolled back")
                number = session_id()
                self.cancel("SLEEP")
                execute("SELECT SLEEP(20)")
        self.assertEqual(cm.exception.args[0], INTERRUPTED)
        self.assertNames()
        self.assertEqual(session_id(), number)

    def test_query_that_returns_nevertheless(self):
        """The driver isn't told that it was cancelled."""
        self.cancel("BENCHMARK")
        begin = time.monotonic()
        self.assertEqual(execute("SELECT BENCHMARK(50000000, MD5('x'))"), ((0,),))
        self.assertLess(time.monotonic() - begin, 10)

    def test_no_query(self):
        """The next one isn't cancelled in its place."""
        create("before")
        for _ in range(10):
            thread = threading.Thread(target=connection.cancel_query)
            thread.start()
            thread.join()
            self.assertEqual(execute("SELECT SLEEP(0.01)"), ((0,),))

    def test_not_connected(self):
        connection.close()
        connection.cancel_query()
        self.assertIsNone(connection.connection)

    def test_session_has_ended(self):
        number = session_id()
        self.addCleanup(connection.close)
        other = connection.copy()
        other.inc_thread_sharing()
        self.addCleanup(other.close)
        with other.cursor() as cursor:
            cursor.execute("KILL %s", [number])
            cursor.execute("SELECT 1")
        connection.cancel_query()

    def test_nothing_is_left_of_it(self):
        create("before")
        sessions = other_sessions()
        connection.cancel_query()
        self.assertIs(wait_until(lambda: other_sessions() == sessions), True)

    async def test_waiting_for_a_lock(self):
        await Entry.objects.acreate(name="locked")
        locked = asyncio.Event()
        done = asyncio.Event()

        async def update(name):
            await Entry.objects.filter(count=0).aupdate(name=name)

        async def other():
            async with transaction.aatomic():
                await update("other")
                locked.set()
                await asyncio.wait_for(done.wait(), 10)

        task = asyncio.create_task(other())
        await asyncio.wait_for(locked.wait(), 10)
        try:
            with self.assertRaises(TimeoutError):
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="rolled back", count=1)
                    async with asyncio.timeout(0.3):
                        await update("waits")
        finally:
            done.set()
        await task
        await self.assertAsyncNames("other")

    async def test_abandoned_query_that_returns_nevertheless(self):
        """Its result is nothing that the block could go on with."""
        begin = time.monotonic()
        with self.assertRaises(TimeoutError):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                async with asyncio.timeout(0.3):
                    await sync_to_async(execute)("SELECT BENCHMARK(50000000, MD5('x'))")
        await self.assertAsyncNames()
        self.assertLess(time.monotonic() - begin, 10)


@unittest.skipUnless(connection.vendor == "mysql", "MariaDB and MySQL tests")
class BusyConnectionTests(AsyncTransactionTestCase):
    async def test_cursor_closed_while_a_sibling_queries(self):
        executed = threading.Event()
        running = threading.Event()

        def close_late():
            cursor = transaction.get_connection().cursor()
            cursor.execute("SELECT 1")
            row = cursor.fetchone()
            executed.set()
            running.wait(10)
            cursor.close()
            return row

        async def query():
            await asyncio.to_thread(executed.wait, 10)
            return await asyncio.to_thread(execute, "SELECT SLEEP(0.5)")

        def see():
            seen = wait_until(lambda: is_running("SLEEP"))
            running.set()
            return seen

        async def watch():
            return await sync_to_async(see)()

        watcher = asyncio.create_task(watch())
        async with transaction.aatomic():
            results = await asyncio.gather(asyncio.to_thread(close_late), query())
        self.assertEqual(results, [(1,), ((0,),)])
        self.assertIs(await watcher, True)

    async def test_session_killed_while_a_query_runs(self):
        async def kill(number):
            def kill_running():
                seen = wait_until(lambda: is_running("SLEEP"))
                kill_session(number)
                return seen

            return await sync_to_async(kill_running)()

        numbers = asyncio.Queue()

        async def killer():
            return await kill(await numbers.get())

        task = asyncio.create_task(killer())
        with self.assertRaises(OperationalError):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="lost")
                numbers.put_nowait(await sync_to_async(session_id)())
                await sync_to_async(execute)("SELECT SLEEP(20)")
        self.assertIs(await task, True)
        await Entry.objects.acreate(name="usable")
        await self.assertAsyncNames("usable")
