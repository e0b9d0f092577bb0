"""
Promise 7 on MariaDB and MySQL, where a query is cancelled by KILL QUERY, and
Promise 3, as the driver refuses a second use of a connection while a query
runs on it.
"""

import asyncio
import threading
import time
import unittest

from asgiref.sync import sync_to_async

from django.db import OperationalError, connection, transaction

from . import server
from .base import AsyncTransactionTestCase, until, wait_until
from .models import Entry
from .test_cancel_query import execute, is_running


@unittest.skipUnless(connection.vendor == "mysql", "MariaDB and MySQL tests")
class CancelledQueryTests(AsyncTransactionTestCase):
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
                await until(done)

        task = asyncio.create_task(other())
        await until(locked)
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
                server.ask(server.END_SESSION, number)
                return seen

            return await sync_to_async(kill_running)()

        numbers = asyncio.Queue()

        async def killer():
            return await kill(await numbers.get())

        task = asyncio.create_task(killer())
        with self.assertRaises(OperationalError):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="lost")
                numbers.put_nowait(await sync_to_async(server.session_id)())
                await sync_to_async(execute)("SELECT SLEEP(20)")
        self.assertIs(await task, True)
        await Entry.objects.acreate(name="usable")
        await self.assertAsyncNames("usable")
