"""
Promise 11: on a warm connection or pool, no thread is used on the way of a
query, and the event loop isn't blocked.
"""

import asyncio
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor

from asgiref.sync import sync_to_async

from django.contrib.sites.models import Site
from django.db import (
    DatabaseError,
    connection,
    connections,
    deserted,
    run_sync,
    transaction,
)
from django.test import TransactionTestCase

from .base import PoolMixin
from .test_waiting import WaitingTestCase, parameters

try:
    import psycopg

    from .guard import no_threads
except ImportError:
    psycopg = None

try:
    import psycopg_pool
except ImportError:
    psycopg_pool = None


class GuardTests(WaitingTestCase):
    """The guard notices each way out."""

    def assertNotices(self, way, func):
        async def main():
            with no_threads():
                await func()

        with self.assertRaisesMessage(AssertionError, f"{way}() was called"):
            self.run_on_loop(main())

    def test_nothing(self):
        async def main():
            with no_threads():
                await asyncio.sleep(0.001)

        self.run_on_loop(main())

    def test_exception(self):
        """It isn't hidden, and what was patched is restored."""
        wait = psycopg.waiting.wait
        with self.assertRaisesMessage(ValueError, "body"), no_threads():
            raise ValueError("body")
        self.assertIs(psycopg.waiting.wait, wait)

    def test_other_thread(self):
        """What another thread does is its own affair."""
        done, go_on = threading.Event(), threading.Event()

        def work():
            go_on.wait(10)
            with psycopg.connect(**parameters()) as conn:
                conn.execute("SELECT 1")
            done.set()

        async def main():
            with no_threads():
                go_on.set()
                while not done.is_set():
                    await asyncio.sleep(0.001)

        thread = threading.Thread(target=work)
        thread.start()
        self.addCleanup(thread.join, 10)
        self.run_on_loop(main())

    def test_sync_to_async(self):
        self.assertNotices("SyncToAsync.__call__", sync_to_async(int))

    def test_run_in_executor(self):
        async def func():
            executor = ThreadPoolExecutor(1)
            self.addCleanup(executor.shutdown)
            await asyncio.get_running_loop().run_in_executor(executor, int)

        self.assertNotices("BaseEventLoop.run_in_executor", func)

    def test_submit(self):
        async def func():
            with ThreadPoolExecutor(1) as executor:
                await asyncio.wrap_future(executor.submit(int))

        self.assertNotices("ThreadPoolExecutor.submit", func)

    def test_thread(self):
        async def func():
            thread = threading.Thread(target=int)
            thread.start()
            thread.join(10)

        self.assertNotices("Thread.start", func)

    def test_event(self):
        async def func():
            threading.Event().wait(0.001)

        self.assertNotices("Condition.wait", func)

    def test_blocking_connect(self):
        async def func():
            psycopg.connect(**parameters()).close()

        self.assertNotices("psycopg.waiting.wait_conn", func)

    def test_blocking_query(self):
        conn = psycopg.connect(**parameters(), autocommit=True)
        self.addCleanup(conn.close)

        async def func():
            conn.execute("SELECT 1")

        self.assertNotices("psycopg.waiting.wait", func)

    @unittest.skipUnless(psycopg_pool, "psycopg_pool is required.")
    def test_worker_of_the_pool(self):
        pool = psycopg_pool.ConnectionPool(kwargs=parameters(), open=False)
        pool.open()
        self.addCleanup(pool.close)
        pool.wait(10)

        async def func():
            pool.resize(5, 5)

        self.assertNotices("ConnectionPool.run_task", func)


class Rollback(Exception):
    pass


@unittest.skipUnless(connections.native_aliases, "ASYNC_NATIVE is required.")
class OperationTests(TransactionTestCase):
    available_apps = ["django.contrib.sites"]

    operations = [
        "get",
        "get_all",
        "iterate",
        "write",
        "write_many",
        "atomic",
        "nested",
        "on_commit",
        "roll_back",
        "synchronous_function",
        "failing_query",
        "cancelled_query",
        "concurrent",
    ]

    def setUp(self):
        Site.objects.create(domain="a", name="a")

    def run_on_loop(self, coroutine):
        async def main():
            # The thread that looks after loops with open blocks ends if it
            # finds none, and is started with the next one.
            deserted.watch.add(self, asyncio.get_running_loop(), lambda: None)
            try:
                await asyncio.wait_for(coroutine, 60)
            finally:
                deserted.watch.discard(self)

        asyncio.run(main())

    async def get(self):
        await Site.objects.aget(domain="a")

    async def get_all(self):
        self.assertTrue([site async for site in Site.objects.all()])

    async def iterate(self):
        sites = Site.objects.aiterator(chunk_size=1)
        self.assertTrue([site async for site in sites])

    async def write(self):
        site = await Site.objects.acreate(domain="b", name="b")
        site.name = "c"
        # Its receiver makes a query.
        await site.asave()
        await site.arefresh_from_db()
        await site.adelete()

    async def write_many(self):
        sites = [Site(domain=str(number), name="d") for number in range(9)]
        await Site.objects.abulk_create(sites)
        await Site.objects.filter(name="d").aupdate(name="e")
        await Site.objects.filter(name="e").adelete()
        await Site.objects.aget_or_create(domain="f", defaults={"name": "f"})

    async def atomic(self):
        async with transaction.aatomic():
            await self.write()

    async def nested(self):
        async with transaction.aatomic():
            await self.get()
            await self.atomic()
            await self.roll_back()

    async def on_commit(self):
        async def acount():
            counts.append(await Site.objects.acount())

        def count():
            counts.append(Site.objects.count())

        counts = []
        async with transaction.aatomic():
            transaction.on_commit(acount)
            transaction.on_commit(count)
            await self.write()
        self.assertEqual(len(counts), 2)

    async def roll_back(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await Site.objects.acreate(domain="rolled back", name="g")
                raise Rollback
        self.assertIs(await Site.objects.filter(name="g").aexists(), False)

    async def synchronous_function(self):
        def func():
            with transaction.atomic():
                Site.objects.filter(domain="a").update(name="h")
                with transaction.atomic():
                    return list(Site.objects.iterator(chunk_size=1))

        self.assertTrue(await run_sync(func))

    async def execute(self, sql):
        def func():
            with connection.cursor() as cursor:
                cursor.execute(sql)

        await run_sync(func)

    async def failing_query(self):
        with self.assertRaisesMessage(DatabaseError, "division by zero"):
            async with transaction.aatomic():
                await self.execute("SELECT 1 / 0")

    async def cancelled_query(self):
        with self.assertRaises(TimeoutError):
            await asyncio.wait_for(self.execute("SELECT pg_sleep(10)"), 0.05)

    async def concurrent(self):
        # More than there are connections. Those that write wait for a lock.
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(self.get())
                group.create_task(self.atomic())

    def test_operations(self):
        async def main():
            await self.get()
            await self.atomic()
            # Now a connection is open.
            for name in self.operations:
                with self.subTest(name), no_threads():
                    await getattr(self, name)()

        self.run_on_loop(main())

    def test_inside_block(self):
        async def main():
            await self.atomic()
            for name in self.operations:
                if name in ("on_commit", "cancelled_query"):
                    # They depend on the end of the outermost block.
                    continue
                with self.subTest(name), no_threads():
                    async with transaction.aatomic():
                        await getattr(self, name)()

        self.run_on_loop(main())


class PooledOperationTests(PoolMixin, OperationTests):
    pool_options = {"min_size": 2, "max_size": 2, "timeout": 20}

    def setUp(self):
        super().setUp()
        connection.pool.open(wait=True)

    def test_cold_pool(self):
        """The guard would notice what a pool leaves to its threads."""
        connection.close_pool()

        async def main():
            with no_threads():
                await self.get()

        with self.assertRaisesMessage(AssertionError, "Thread.start() was called"):
            self.run_on_loop(main())
