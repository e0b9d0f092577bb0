"""
Promises 7, 8 and 11: one pool serves threads and event loops, and waiting for
a connection blocks neither a loop nor an executor.
"""

import asyncio
import gc
import logging
import random
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from django.db import bridge, connection
from django.db.utils import OperationalError

from .test_waiting import Heartbeat, WaitingTestCase, no_blocking_waits, parameters

try:
    from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

    from django.db.backends.postgresql.pool import LoopClient, WaitingPool
except ImportError:
    ConnectionPool = None


@unittest.skipUnless(ConnectionPool, "psycopg_pool is required.")
class PoolTestCase(WaitingTestCase):
    def make_pool(self, size=1, **kwargs):
        pool = WaitingPool(
            kwargs={**parameters(), "autocommit": True},
            min_size=size,
            max_size=size,
            open=True,
            **{"timeout": 10, **kwargs},
        )
        self.addCleanup(pool.close)
        pool.wait(30)
        return pool

    async def waiting_task(self, pool, **kwargs):
        """Return a task that waits for a connection."""
        count = len(pool._waiting)
        task = asyncio.create_task(bridge.run(pool.getconn, **kwargs))
        while len(pool._waiting) == count and not task.done():
            await asyncio.sleep(0)
        return task

    def assertComplete(self, pool, size):
        """The pool has all of its connections, and they work."""
        conns = [pool.getconn(timeout=10) for _ in range(size)]
        for conn in conns:
            conn.execute("SELECT 1")
            conn.rollback()
            pool.putconn(conn)
        stats = pool.get_stats()
        self.assertEqual(stats["pool_size"], size)
        self.assertEqual(stats["pool_available"], size)
        self.assertEqual(stats["requests_waiting"], 0)


class ServiceTests(PoolTestCase):
    def test_thread_and_loop(self):
        """A connection used in the one is then used in the other."""
        pool = self.make_pool()

        def use():
            with pool.connection() as conn:
                return conn.info.backend_pid

        pids = {use(), self.run_in_bridge(use), use()}
        self.assertEqual(len(pids), 1)

    def test_fair(self):
        """Threads and tasks are served in the order of their arrival."""
        pool = self.make_pool()
        served = []

        def use(number):
            with pool.connection() as conn:
                served.append(number)
                conn.execute("SELECT pg_sleep(0.01)")

        async def main():
            conn = await bridge.run(pool.getconn)
            futures = []
            for number in range(10):
                if number % 2:
                    futures.append(asyncio.create_task(bridge.run(use, number)))
                else:
                    futures.append(asyncio.to_thread(use, number))
                    futures[-1] = asyncio.ensure_future(futures[-1])
                while len(pool._waiting) <= number:
                    await asyncio.sleep(0.001)
            await bridge.run(pool.putconn, conn)
            await asyncio.gather(*futures)

        self.run_on_loop(main())
        self.assertEqual(served, list(range(10)))

    def test_many_tasks(self):
        """10,000 tasks that are mostly idle share 10 connections."""
        pool = self.make_pool(10, timeout=300)
        threads = threading.active_count()
        pids = set()

        def use():
            with pool.connection() as conn:
                (pid,) = conn.execute("SELECT pg_backend_pid()").fetchone()
                pids.add(pid)

        async def task():
            await bridge.run(use)
            await idle.wait()

        async def main():
            nonlocal idle
            idle = asyncio.Event()
            with no_blocking_waits():
                async with asyncio.TaskGroup() as group:
                    for _ in range(10_000):
                        group.create_task(task())
                    while pool.get_stats().get("requests_num", 0) < 10_000:
                        await asyncio.sleep(0.01)
                    while len(pool._pool) < 10:
                        await asyncio.sleep(0.01)
                    self.assertEqual(threading.active_count(), threads)
                    idle.set()

        idle = None
        asyncio.run(asyncio.wait_for(main(), 300))
        self.assertLessEqual(len(pids), 10)
        self.assertComplete(pool, 10)

    def test_executor_is_not_needed(self):
        """
        The holder of the connection needs the loop's default executor, which
        tasks that wait for a connection don't occupy.
        """
        pool = self.make_pool()

        def use():
            with pool.connection() as conn:
                bridge.await_(asyncio.to_thread(time.sleep, 0.01))
                conn.execute("SELECT 1")

        async def main():
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1))
            await asyncio.gather(*[bridge.run(use) for _ in range(10)])

        self.run_on_loop(main())
        self.assertComplete(pool, 1)

    def test_growing(self):
        pool = WaitingPool(
            kwargs={**parameters(), "autocommit": True},
            min_size=0,
            max_size=5,
            open=True,
            timeout=30,
        )
        self.addCleanup(pool.close)

        def use():
            with pool.connection() as conn:
                conn.execute("SELECT pg_sleep(0.1)")

        async def main():
            with no_blocking_waits():
                await asyncio.gather(*[bridge.run(use) for _ in range(20)])

        self.run_on_loop(main())
        self.assertEqual(pool.get_stats()["pool_size"], 5)
        self.assertComplete(pool, 5)

    def test_reset(self):
        """What's to be done with a returned connection is done elsewhere."""
        threads = []

        def reset(conn):
            threads.append(threading.get_ident())
            conn.execute("RESET ALL")

        pool = self.make_pool(reset=reset)

        def use():
            with pool.connection() as conn:
                conn.execute("SELECT 1")

        async def main():
            for _ in range(3):
                await bridge.run(use)

        self.run_on_loop(main())
        # It waits for the last one.
        pool.putconn(pool.getconn())
        self.assertGreaterEqual(len(threads), 3)
        self.assertNotIn(threading.get_ident(), threads)

    def test_transaction(self):
        """A connection returned in a transaction is rolled back."""
        pool = self.make_pool()

        def use():
            conn = pool.getconn()
            conn.autocommit = False
            conn.execute("SELECT 1")
            pool.putconn(conn)

        with self.assertLogs("psycopg.pool", logging.WARNING):
            self.run_in_bridge(use)
        self.assertComplete(pool, 1)

    def test_backend(self):
        def use(alias):
            native = connection.copy(alias)
            native.settings_dict["ASYNC_NATIVE"] = True
            native.settings_dict["CONN_MAX_AGE"] = 0
            native.settings_dict["OPTIONS"]["pool"] = {
                "min_size": 1,
                "max_size": 1,
                "timeout": 0.2,
            }
            self.addCleanup(native.close_pool)
            other = connection.copy(alias)
            other.settings_dict = native.settings_dict
            for _ in range(3):
                with native.cursor() as cursor:
                    cursor.execute("SELECT pg_backend_pid()")
                    pid = cursor.fetchone()
                with self.assertRaises(OperationalError):
                    other.ensure_connection()
                native.close()
                with other.cursor() as cursor:
                    cursor.execute("SELECT pg_backend_pid()")
                    self.assertEqual(cursor.fetchone(), pid)
                other.close()

        async def main():
            with no_blocking_waits():
                await bridge.run(use, "in_bridge")

        use("in_thread")
        self.run_on_loop(main())


class RefusalTests(PoolTestCase):
    def test_timeout(self):
        pool = self.make_pool(timeout=1)
        conn = pool.getconn()

        def wait():
            for timeout in (None, 0.1, 0):
                with self.assertRaises(PoolTimeout):
                    pool.getconn(timeout=timeout)

        async def main():
            async with Heartbeat() as heartbeat:
                await asyncio.gather(*[bridge.run(wait) for _ in range(10)])
            return heartbeat.longest

        self.assertLess(self.run_on_loop(main()), 0.8)
        pool.putconn(conn)
        self.assertComplete(pool, 1)

    def test_max_waiting(self):
        pool = self.make_pool(max_waiting=2)

        async def main():
            conn = await bridge.run(pool.getconn)
            tasks = [await self.waiting_task(pool) for _ in range(2)]
            with self.assertRaises(TooManyRequests):
                await bridge.run(pool.getconn)
            # Who is cancelled makes room.
            tasks[0].cancel()
            await asyncio.wait([tasks[0]])
            task = await self.waiting_task(pool)
            self.assertIs(task.done(), False)
            await bridge.run(pool.putconn, conn)
            for task in (tasks[1], task):
                await bridge.run(pool.putconn, await task)

        self.run_on_loop(main())
        self.assertComplete(pool, 1)

    def test_closed(self):
        pool = self.make_pool()

        async def main():
            conn = await bridge.run(pool.getconn)
            task = await self.waiting_task(pool)
            await asyncio.to_thread(pool.close)
            with self.assertRaises(PoolClosed):
                await task
            await bridge.run(pool.putconn, conn)
            self.assertIs(conn.closed, True)

        self.run_on_loop(main())

    def test_broken_connections(self):
        """
        They are replaced, and the loop isn't blocked before the next try.
        """
        pool = self.make_pool(3, check=ConnectionPool.check_connection)

        def use():
            with pool.connection() as conn:
                return conn.execute("SELECT 1").fetchone()

        async def main():
            for conn in pool._pool:
                conn.pgconn.exec_(b"SET idle_session_timeout = '10ms'")
            await asyncio.sleep(0.3)
            # Old versions have no pause.
            sleep = mock.Mock(side_effect=AssertionError)
            with mock.patch("psycopg_pool.pool.sleep", sleep, create=True):
                return await bridge.run(use)

        self.assertEqual(self.run_on_loop(main()), (1,))
        self.assertComplete(pool, 3)

    def test_never_a_working_connection(self):
        def check(conn):
            raise ValueError

        pool = self.make_pool(check=check)

        async def main():
            async with Heartbeat() as heartbeat:
                with self.assertRaises(PoolTimeout):
                    await bridge.run(pool.getconn, timeout=1)
            return heartbeat.longest

        before = time.monotonic()
        self.assertLess(self.run_on_loop(main()), 0.5)
        self.assertLess(time.monotonic() - before, 3)
        pool._check = None
        self.assertComplete(pool, 1)


class LoopClientTests(PoolTestCase):
    """A client that doesn't wait any more accepts nothing."""

    def test_timed_out(self):
        def wait():
            client = LoopClient()
            with self.assertRaises(PoolTimeout):
                client.wait(0.01)
            return client

        client = self.run_on_loop(bridge.run(wait))
        self.assertIs(client.set(object()), False)
        self.assertIs(client.fail(PoolClosed()), False)

    def test_served(self):
        def wait():
            client, conn = LoopClient(), object()
            self.assertIs(client.set(conn), True)
            self.assertIs(client.set(object()), False)
            self.assertIs(client.fail(PoolClosed()), False)
            self.assertIs(client.wait(10), conn)

        self.run_on_loop(bridge.run(wait))

    def test_failed(self):
        def wait():
            client = LoopClient()
            self.assertIs(client.fail(PoolClosed()), True)
            self.assertIs(client.set(object()), False)
            with self.assertRaises(PoolClosed):
                client.wait(10)

        self.run_on_loop(bridge.run(wait))


class CancellationTests(PoolTestCase):
    """Promise 7: Waiting can be cancelled without losing the connection."""

    def test_when_it_arrives(self):
        pool = self.make_pool()

        async def main():
            conn = await bridge.run(pool.getconn)
            first = await self.waiting_task(pool)
            second = await self.waiting_task(pool)
            # It's given to the first task, which doesn't know yet.
            await bridge.run(pool.putconn, conn)
            first.cancel()
            await asyncio.wait([first], timeout=5)
            self.assertIs(first.cancelled(), True)
            await bridge.run(pool.putconn, await second)

        self.run_on_loop(main())
        self.assertComplete(pool, 1)

    def test_before_it_arrives(self):
        pool = self.make_pool()

        async def main():
            conn = await bridge.run(pool.getconn)
            first = await self.waiting_task(pool)
            second = await self.waiting_task(pool)
            first.cancel()
            await bridge.run(pool.putconn, conn)
            await bridge.run(pool.putconn, await second)
            self.assertIs(first.cancelled(), True)

        self.run_on_loop(main())
        self.assertComplete(pool, 1)

    def test_while_it_is_checked(self):
        checks = []

        def check(conn):
            checks.append(conn)
            if len(checks) == 1:
                bridge.await_(asyncio.Event().wait())

        pool = self.make_pool(check=check)

        async def main():
            task = asyncio.create_task(bridge.run(pool.getconn))
            while not checks:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            self.assertIs(task.cancelled(), True)

        self.run_on_loop(main())
        self.assertComplete(pool, 1)

    def test_timeout_when_it_arrives(self):
        pool = self.make_pool()

        async def main():
            conn = await bridge.run(pool.getconn)
            task = await self.waiting_task(pool, timeout=0.05)
            # Both happen before the loop runs again.
            time.sleep(0.1)
            pool.putconn(conn)
            self.assertEqual(len(pool._waiting), 0)
            self.assertIs(await task, conn)
            await bridge.run(pool.putconn, conn)

        self.run_on_loop(main())
        self.assertComplete(pool, 1)

    def test_at_any_moment(self):
        """Tasks are cancelled and threads use the pool all the time."""
        pool = self.make_pool(3)
        stop = threading.Event()
        uses = []
        choice = random.Random(0)

        def use():
            with pool.connection() as conn:
                conn.execute("SELECT 1")

        def use_in_thread():
            while not stop.is_set():
                use()
                uses.append(1)

        async def main():
            with ThreadPoolExecutor(2) as executor:
                futures = [executor.submit(use_in_thread) for _ in range(2)]
                try:
                    for _ in range(50):
                        tasks = [
                            asyncio.create_task(bridge.run(use)) for _ in range(10)
                        ]
                        while not all(task.done() for task in tasks):
                            await asyncio.sleep(choice.random() / 100)
                            choice.choice(tasks).cancel()
                        for task in tasks:
                            if not task.cancelled():
                                task.result()
                finally:
                    stop.set()
            for future in futures:
                future.result()

        with self.assertNoLogs("psycopg.pool", logging.ERROR):
            self.run_on_loop(main())
        self.assertNotEqual(uses, [])
        # Connections whose query couldn't be cancelled are being replaced.
        self.assertComplete(pool, 3)

    def test_while_it_is_returned(self):
        """A rollback on the way back isn't interrupted."""
        pool = self.make_pool()
        log = []

        def use():
            conn = pool.getconn()
            conn.autocommit = False
            conn.execute("SELECT 1")
            log.append("returned")
            asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
            pool.putconn(conn)
            log.append("never")

        async def main():
            task = asyncio.create_task(bridge.run(use))
            await asyncio.wait([task])
            self.assertIs(task.cancelled(), True)

        with self.assertLogs("psycopg.pool", logging.WARNING):
            self.run_on_loop(main())
        self.assertEqual(log, ["returned"])
        self.assertEqual(len(pool._pool), 1)
        self.assertComplete(pool, 1)

    def test_loop_closed(self):
        """The connection goes to the next client."""
        pool = self.make_pool()
        conn = pool.getconn()
        loop = asyncio.new_event_loop()
        tasks = [loop.run_until_complete(self.waiting_task(pool)) for _ in range(3)]
        loop.close()
        pool.putconn(conn)
        self.assertComplete(pool, 1)
        with self.assertLogs("asyncio", logging.ERROR):
            tasks.clear()
            gc.collect()
        self.assertComplete(pool, 1)

    def test_loop_closed_when_it_arrives(self):
        pool = self.make_pool()
        conn = pool.getconn()
        loop = asyncio.new_event_loop()
        task = loop.run_until_complete(self.waiting_task(pool))
        pool.putconn(conn)
        loop.close()
        with self.assertLogs("asyncio", logging.ERROR):
            del task
            gc.collect()
        self.assertComplete(pool, 1)
