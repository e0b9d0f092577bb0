"""
Promises 2, 3, 7, 8 and 11 in native mode: what was once found to break them.
"""

import asyncio
import gc
import threading
import time
import unittest
import weakref
from contextlib import suppress
from functools import partial
from unittest import mock

from asgiref.sync import async_to_sync, sync_to_async

from django.db import (
    DataError,
    OperationalError,
    bridge,
    connection,
    connections,
    new_connection,
    run_sync,
    scopes,
    sharing,
    transaction,
)
from django.db.models.signals import post_save
from django.test import TransactionTestCase

from .base import PoolMixin
from .models import Author


def sleep(seconds):
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [seconds])


@unittest.skipUnless("default" in connections.native_aliases, "Needs ASYNC_NATIVE.")
class NativeTestCase(TransactionTestCase):
    available_apps = ["async_bridge", "django.contrib.contenttypes"]


class SharedConnectionTests(NativeTestCase):
    """Promise 8: the tasks of a scope take turns on one connection."""

    async def gather(self, *coroutines):
        async with asyncio.timeout(10):
            return await asyncio.gather(*coroutines)

    @mock.patch.object(scopes, "CHECK_AFTER", -1)
    async def test_health_check(self):
        """An idle session is checked by one task, and the others wait."""
        await Author.objects.acount()
        counts = await self.gather(*[Author.objects.acount() for _ in range(5)])
        self.assertEqual(counts, [0] * 5)

    async def test_many_queries(self):
        """Promise 3: to wait in a queue isn't a deadlock."""
        with mock.patch.object(sharing, "TURN_TIMEOUT", 0.2):
            await self.gather(*[run_sync(sleep, 0.05) for _ in range(20)])

    async def test_slow_query(self):
        """Promise 3: nor is to wait for a slow query."""
        with mock.patch.object(sharing, "TURN_TIMEOUT", 0.1):
            await self.gather(run_sync(sleep, 0.5), Author.objects.acount())

    async def test_finished_tasks(self):
        """Nothing of them is kept by the connection."""

        def size():
            turn = scopes.current().shared["default"].connection.turn
            return sum(
                len(value)
                for value in vars(turn).values()
                if isinstance(value, (set, list))
            )

        await Author.objects.acount()
        before = size()
        await self.gather(*[Author.objects.acount() for _ in range(5)])
        self.assertEqual(size(), before)


def call_inside(coroutine_function):
    """Await a coroutine inside of atomic(), which is rolled back."""
    with transaction.atomic():
        Author.objects.create(name="inside")
        result = async_to_sync(coroutine_function)()
        transaction.set_rollback(True)
        return result


class InsideSyncBlockTests(NativeTestCase):
    """
    Promise 2: atomic() in the bridge covers what's started inside, in threads
    as well.
    """

    async def check(self, count):
        self.assertEqual(await run_sync(call_inside, count), 1)
        self.assertEqual(await Author.objects.acount(), 0)

    async def test_sync_to_async(self):
        await self.check(sync_to_async(Author.objects.count))

    async def test_not_thread_sensitive(self):
        await self.check(sync_to_async(Author.objects.count, thread_sensitive=False))

    async def test_to_thread(self):
        async def count():
            return await asyncio.to_thread(Author.objects.count)

        await self.check(count)

    async def test_cursor_that_outlives_it(self):
        """Promise 7: its session isn't used again."""

        def execute():
            cursor = connection.cursor()
            cursor.execute("SELECT 1")
            return cursor

        cursor = await run_sync(call_inside, sync_to_async(execute))
        await Author.objects.acount()
        with self.assertRaises(connection.Database.OperationalError):
            await sync_to_async(cursor.cursor.execute)("SELECT 1")


class FailedEntryTests(NativeTestCase):
    async def test_cancelled(self):
        """Promise 7: a task is cancelled while entering atomic() fails."""

        def fail(*args, **kwargs):
            asyncio.current_task().cancel()
            bridge.await_(asyncio.sleep(0))
            raise OperationalError("The connection was lost.")

        def service():
            with transaction.atomic():
                self.fail("It was entered.")

        await Author.objects.acount()
        wrapper_class = type(connections["default"])
        patcher = mock.patch.object(wrapper_class, "set_autocommit", fail)
        with patcher, self.assertRaises(asyncio.CancelledError) as caught:
            await asyncio.create_task(run_sync(service))
        self.assertIsInstance(caught.exception.__context__, OperationalError)
        self.assertEqual(await Author.objects.acount(), 0)


class PoolTestCase(PoolMixin, NativeTestCase):
    """With a pool of one connection, which comes back to it."""

    pool_options = {"min_size": 0, "max_size": 1, "timeout": 3}

    def check_pool(self):
        super().check_pool()
        # What was discarded is replaced by a thread of the pool.
        with connection.pool.connection(timeout=10):
            pass


class PausedOperationTests(PoolTestCase):
    """
    Promises 2 and 8: an operation keeps no connection from tasks that it waits
    for.
    """

    async def test_asynchronous_receiver(self):
        counts = []

        async def count(**kwargs):
            counts.append(await Author.objects.acount())

        post_save.connect(count, sender=Author)
        self.addCleanup(post_save.disconnect, count, sender=Author)
        await Author.objects.acreate(name="a")
        self.assertEqual(counts, [1])

    async def test_tasks(self):
        def count_in(coroutine_function):
            before = Author.objects.count()
            return before, async_to_sync(coroutine_function)(), Author.objects.count()

        async def in_task():
            return await asyncio.create_task(Author.objects.acount())

        async def in_block():
            async with transaction.aatomic():
                return await Author.objects.acount()

        async def on_own_connection():
            async with new_connection():
                return await Author.objects.acount()

        for function in (in_task, in_block, on_own_connection):
            with self.subTest(function=function.__name__):
                self.assertEqual(await run_sync(count_in, function), (0, 0, 0))

    async def test_cursor(self):
        """What's open keeps the session."""

        def session(cursor):
            cursor.execute("SELECT pg_backend_pid()")
            return cursor.fetchone()

        def sessions():
            with connection.cursor() as cursor:
                before = session(cursor)
                async_to_sync(asyncio.sleep)(0)
                self.assertEqual(connection.pool.get_stats()["pool_available"], 0)
                return before, session(cursor)

        before, after = await run_sync(sessions)
        self.assertEqual(before, after)


class ClosedLoopMixin:
    """
    Promise 7: an event loop that's closed in the middle of operations doesn't
    keep their connection. Their coroutines aren't destroyed with it, since
    they lead to their own tasks.
    """

    def is_running(self):
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
                "AND state = 'active' AND query LIKE 'SELECT pg_sleep%'"
            )
            return cursor.fetchone() is not None

    def wait(self, loop, condition):
        deadline = time.monotonic() + 10
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            loop.run_until_complete(asyncio.sleep(0.01))

    def close_loop(self, coroutine_function, condition):
        async def run():
            task = asyncio.current_task()  # NOQA: F841
            await coroutine_function()

        loop = asyncio.new_event_loop()
        coroutine = run()
        task = loop.create_task(coroutine)
        task._log_destroy_pending = False
        self.addCleanup(coroutine.close)
        self.wait(loop, condition)
        loop.close()
        connections.close_all()
        return coroutine

    def check(self):
        async def count():
            async with asyncio.timeout(10):
                return await Author.objects.acount()

        self.assertEqual(asyncio.run(count()), 0)
        with asyncio.Runner() as runner:
            self.wait(runner.get_loop(), lambda: not self.is_running())
        connections.close_all()

    def test_query(self):
        def slow():
            task = asyncio.current_task()  # NOQA: F841
            sleep(20)

        for _ in range(2):
            self.close_loop(partial(run_sync, slow), self.is_running)
            self.check()

    def test_block(self):
        event = threading.Event()

        def slow():
            with transaction.atomic():
                Author.objects.create(name="lost")
                event.set()
                async_to_sync(asyncio.sleep)(20)

        for _ in range(2):
            event.clear()
            self.close_loop(partial(run_sync, slow), event.is_set)
            self.check()

    def test_block_is_left_at_last(self):
        """
        Its coroutine is closed, and rolls back, while another thread ends its
        session.
        """

        def slow():
            with transaction.atomic():
                Author.objects.create(name="lost")
                sessions.append(transaction.get_connection().connection)
                async_to_sync(asyncio.sleep)(20)

        def slowly(func, *args, **kwargs):
            left.set()
            time.sleep(0.5)
            result = func(*args, **kwargs)
            done.append(func.__name__)
            return result

        def check():
            left.wait(10)
            try:
                asyncio.run(Author.objects.acount())
            finally:
                connections.close_all()

        done = []
        # psycopg calls wait() when it has the connection's lock.
        for name in ("rollback", "wait"):
            with self.subTest(name):
                sessions, left = [], threading.Event()
                coroutine = self.close_loop(partial(run_sync, slow), lambda: sessions)
                setattr(sessions[0], name, partial(slowly, getattr(sessions[0], name)))
                thread = threading.Thread(target=check)
                thread.start()
                coroutine.close()
                thread.join()
                self.check()
        # What had begun came to its end.
        self.assertEqual(done, ["wait"])


class FailedBlockMixin:
    def test_nothing_refers_to_the_task(self):
        """
        The exception for which atomic() rolls back refers to the task, which
        mustn't be kept for as long as a connection.
        """

        def fail():
            with transaction.atomic():
                Author.objects.create(name="lost")
                # It's marked for rollback.
                Author.objects.create(name="x" * 101)

        async def main():
            tasks = []
            for _ in range(2):
                task = asyncio.create_task(run_sync(fail))
                tasks.append(weakref.ref(task))
                # Unlike assertRaises(), it leaves the traceback as it is.
                with suppress(DataError):
                    await task
                del task
            await asyncio.sleep(0)
            gc.collect()
            return [task() for task in tasks]

        self.assertEqual(asyncio.run(main()), [None, None])


class ClosedInBlockTests(NativeTestCase):
    def test_session_of_another_block(self):
        """
        A block that has closed its connection isn't committed. The next one
        is, also with a session that was opened by another one in between.
        """

        def close():
            with transaction.atomic():
                Author.objects.create(name="lost")
                connection.close()

        def create():
            with transaction.atomic():
                Author.objects.create(name="kept")

        async def main():
            await run_sync(close)
            async with transaction.aatomic():
                await Author.objects.acreate(name="kept, too")
            await run_sync(create)

        asyncio.run(main())
        self.assertCountEqual(
            Author.objects.values_list("name", flat=True), ["kept", "kept, too"]
        )


class CancelledAtTheEndMixin:
    """
    Promises 6 and 7: atomic() in the bridge is left completely, also if that's
    when the task is cancelled.
    """

    def cancel(self, error=None):
        """Return the calls of on_commit()."""

        def block():
            with transaction.atomic():
                Author.objects.create(name="cancelled")
                transaction.on_commit(lambda: self.called.append("cancelled"))
                # When it waits for the COMMIT or ROLLBACK.
                asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
                if error is not None:
                    raise error

        def commit():
            with transaction.atomic():
                Author.objects.create(name="next")

        async def main():
            with self.assertRaises(asyncio.CancelledError):
                await run_sync(block)
            called = self.called.copy()
            await run_sync(commit)
            return called

        self.called = []
        called = asyncio.run(main())
        # Nothing is left for the next block.
        self.assertEqual(self.called, called)
        return called

    def test_commit(self):
        self.assertEqual(self.cancel(), ["cancelled"])
        self.assertEqual(Author.objects.count(), 2)

    def test_rollback(self):
        self.assertEqual(self.cancel(ValueError()), [])
        self.assertEqual(Author.objects.count(), 1)


class CancelledAtTheEndTests(CancelledAtTheEndMixin, NativeTestCase):
    pass


class PooledCancelledAtTheEndTests(CancelledAtTheEndMixin, PoolTestCase):
    pass


class FailedBlockTests(FailedBlockMixin, NativeTestCase):
    pass


class PooledFailedBlockTests(FailedBlockMixin, PoolTestCase):
    pass


class ClosedLoopTests(ClosedLoopMixin, NativeTestCase):
    pass


class PooledClosedLoopTests(ClosedLoopMixin, PoolTestCase):
    pool_options = {"min_size": 0, "max_size": 2, "timeout": 3}

    def test_iterator(self):
        Author.objects.create(name="a")
        event = threading.Event()

        async def iterate():
            async for _ in Author.objects.aiterator(chunk_size=1):
                event.set()
                await asyncio.sleep(20)

        for _ in range(2):
            event.clear()
            self.close_loop(iterate, event.is_set)
            asyncio.run(Author.objects.acount())
