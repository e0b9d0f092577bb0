"""
What was found by trying to break the promises.
"""

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from contextlib import nullcontext
from unittest import mock, skipUnless

from asgiref.sync import async_to_sync, sync_to_async

import django.db.backends.sqlite3.base
from django.db import (
    IntegrityError,
    OperationalError,
    belonging,
    connection,
    connections,
    scopes,
    sharing,
    threads,
    transaction,
)
from django.db.async_calls import run_sync
from django.db.transaction import TransactionManagementError
from django.dispatch import Signal
from django.utils.connection import ConnectionDoesNotExist

from .base import (
    AsyncTransactionTestCase,
    Rollback,
    create,
    create_and_close,
    is_in_memory,
    is_native,
    names,
    transaction_threads,
    until,
    wait_until,
)
from .models import Entry


class SharedContextTests(AsyncTransactionTestCase):
    """Promises 1 and 5, in receivers of asend()."""

    async def receive(self, use):
        """Call `use` in a receiver while another one is in a block."""
        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")
        signal = Signal()
        inside = asyncio.Event()
        used = asyncio.Event()

        async def rolls_back(**kwargs):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="b1")
                inside.set()
                await until(used)
                await Entry.objects.acreate(name="b2")
                raise Rollback

        async def foreign(**kwargs):
            await until(inside)
            try:
                await use()
            finally:
                used.set()

        signal.connect(foreign)
        signal.connect(rolls_back)
        results = dict(await signal.asend_robust(self))
        self.assertIsInstance(results[rolls_back], Rollback)
        self.assertIsNone(results[foreign])
        await self.assertAsyncNames("a")

    async def test_orm(self):
        await self.receive(lambda: Entry.objects.acreate(name="a"))

    async def test_sync_to_async(self):
        await self.receive(lambda: sync_to_async(create)("a"))

    async def test_insensitive(self):
        function = sync_to_async(create_and_close, thread_sensitive=False)
        await self.receive(lambda: function("a"))

    async def test_to_thread(self):
        await self.receive(lambda: asyncio.to_thread(create_and_close, "a"))

    async def test_tasks_of_a_receiver(self):
        async def use():
            await asyncio.gather(Entry.objects.acreate(name="a"))

        await self.receive(use)

    async def test_exception_thrown_into_a_receiver(self):
        signal = Signal()
        seen = []

        async def cancelled(**kwargs):
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError as exc:
                seen.append(exc)
                raise

        async def fails(**kwargs):
            await asyncio.sleep(0)
            raise Rollback

        signal.connect(cancelled)
        signal.connect(fails)
        with self.assertRaises(Rollback):
            await signal.asend(self)
        self.assertEqual(len(seen), 1)

    async def use_in_one_context(self, use):
        """
        Call `use` in a task while another one, in the same context, is in a
        block that's rolled back.
        """
        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")
        context = contextvars.copy_context()
        inside = asyncio.Event()
        used = asyncio.Event()

        async def rolls_back():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="b1")
                inside.set()
                await until(used)
                await Entry.objects.acreate(name="b2")
                raise Rollback

        async def foreign():
            await until(inside)
            try:
                await use()
            finally:
                used.set()

        loop = asyncio.get_running_loop()
        results = await asyncio.gather(
            loop.create_task(rolls_back(), context=context),
            loop.create_task(foreign(), context=context),
            return_exceptions=True,
        )
        self.assertIsInstance(results[0], Rollback)
        self.assertIsNone(results[1])
        await self.assertAsyncNames("a")

    async def test_tasks_in_one_context(self):
        """Promise 5: what a task opened is kept for the task."""

        async def use():
            await Entry.objects.acreate(name="a")

        await self.use_in_one_context(use)

    async def test_run_sync_of_tasks_in_one_context(self):
        await self.use_in_one_context(lambda: run_sync(create, "a"))

    async def test_sync_to_async_of_tasks_in_one_context(self):
        """asgiref asks for the thread before it copies the context."""
        await self.use_in_one_context(lambda: sync_to_async(create)("a"))

    async def test_sync_to_async_after_the_end_of_another_block(self):
        """
        asgiref brings back the context that it copied before the block was
        entered, and what the other one leaves behind is for this block, too.
        """
        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")
        context = contextvars.copy_context()
        started = asyncio.Event()
        ended = asyncio.Event()
        entered = threading.Event()

        async def other():
            async with transaction.aatomic():
                started.set()
                await sync_to_async(entered.wait)(10)
            ended.set()

        async def rolls_back():
            await until(started)
            async with transaction.aatomic():
                entered.set()
                await until(ended)
                await sync_to_async(create)("a")
                raise Rollback

        loop = asyncio.get_running_loop()
        results = await asyncio.gather(
            loop.create_task(other(), context=context),
            loop.create_task(rolls_back(), context=context),
            return_exceptions=True,
        )
        self.assertIsInstance(results[1], Rollback)
        await self.assertAsyncNames()

    async def test_blocks_that_are_left_in_one_context(self):
        """What others have left there meanwhile isn't put back."""

        async def block(name):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=name)

        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")
        loop = asyncio.get_running_loop()
        context = asyncio.current_task().get_context()
        for attempt in range(10):
            tasks = [
                loop.create_task(block(f"{attempt} {number}"), context=context)
                for number in range(5)
            ]
            await asyncio.gather(*tasks)
            self.assertEqual(await Entry.objects.acount(), (attempt + 1) * 5)

    async def test_blocks_of_tasks_in_one_context(self):
        """Each is inside of its own, also in the thread that it calls."""

        async def use():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                await transaction.aset_rollback(True)
            async with transaction.aatomic():
                await run_sync(create, "a")

        await self.use_in_one_context(use)


class EndTests(AsyncTransactionTestCase):
    """Promise 4."""

    async def test_cursor_kept_beyond_the_end(self):
        began = threading.Event()
        over = threading.Event()

        def late():
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
                began.set()
                over.wait(10)
                cursor.execute(
                    "INSERT INTO async_transactions_entry (name, count) "
                    "VALUES ('late', 0)"
                )

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                task = asyncio.create_task(asyncio.to_thread(late))
                await asyncio.to_thread(began.wait, 10)
                raise Rollback
        over.set()
        with self.assertRaisesMessage(TransactionManagementError, "any more"):
            await task
        await self.assertAsyncNames()

    def test_block_that_gets_its_turn_after_the_end(self):
        """The block around it has ended, so it's an outermost one."""
        inside = asyncio.Event()
        leave = asyncio.Event()

        async def first():
            async with transaction.aatomic():
                inside.set()
                await until(leave)

        async def second():
            await until(inside)
            async with transaction.aatomic():
                await Entry.objects.acreate(name="second")
                await asyncio.sleep(0.3)
                raise Rollback

        async def start():
            tasks = [asyncio.create_task(first()), asyncio.create_task(second())]
            await until(inside)
            await asyncio.sleep(0.05)
            return tasks

        async def main():
            def block():
                with transaction.atomic():
                    create("block")
                    return async_to_sync(start)()

            tasks = await sync_to_async(block)()
            await asyncio.sleep(0.05)
            creation = asyncio.create_task(Entry.objects.acreate(name="autocommit"))
            leave.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await creation
            return results

        results = async_to_sync(main)()
        self.assertIsInstance(results[0], TransactionManagementError)
        self.assertIsInstance(results[1], Rollback)
        self.assertNames("autocommit", "block")

    async def test_nested_block_that_outlives_async_to_sync(self):
        inside = asyncio.Event()
        tasks = []

        async def nested():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="nested")
                inside.set()
                await asyncio.sleep(0.1)

        async def start():
            tasks.append(asyncio.create_task(nested()))
            await until(inside)

        async with transaction.aatomic():
            await sync_to_async(lambda: async_to_sync(start)())()
            await asyncio.gather(*tasks)
            await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after", "nested")

    async def test_leaving_with_a_nested_block_of_the_same_task(self):
        outer, nested = transaction.aatomic(), transaction.aatomic()
        await outer.__aenter__()
        await nested.__aenter__()
        await Entry.objects.acreate(name="a")
        began = time.monotonic()
        with self.assertRaises(TransactionManagementError):
            await outer.__aexit__(None, None, None)
        self.assertLess(time.monotonic() - began, 5)
        with self.assertRaises(TransactionManagementError):
            await nested.__aexit__(None, None, None)
        await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after")

    def test_thread_is_usable_after_a_block_was_left_elsewhere(self):
        """The opener's context is what asgiref hands on to the thread."""

        async def main():
            block = transaction.aatomic()
            await block.__aenter__()
            await asyncio.gather(block.__aexit__(None, None, None))

        async_to_sync(main)()
        create("sync")
        asyncio.run(main())
        self.assertNames("sync")

    async def test_blocks_left_in_odd_order(self):
        first, second = transaction.aatomic(), transaction.aatomic()
        await first.__aenter__()
        await second.__aenter__()
        await first.__aexit__(Rollback, Rollback(), None)
        await second.__aexit__(Rollback, Rollback(), None)
        await Entry.objects.acreate(name="a")
        await asyncio.to_thread(create_and_close, "b")
        await self.assertAsyncNames("a", "b")

    async def test_rollback_flag_of_a_sibling(self):
        inside = asyncio.Event()
        flagged = asyncio.Event()

        async def nested():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="nested")
                inside.set()
                await until(flagged)
                self.assertIs(transaction.get_rollback(), False)

        async with transaction.aatomic():
            task = asyncio.create_task(nested())
            await until(inside)
            transaction.set_rollback(True)
            self.assertIs(transaction.get_rollback(), True)
            flagged.set()
            await task
        await self.assertAsyncNames()

    async def test_connection_opened_anew_inside(self):
        if is_in_memory():
            self.skipTest("Closing it would destroy the database.")

        def reconnect():
            used = transaction.get_connection()
            used.close()
            used.connect()

        async with transaction.aatomic():
            await sync_to_async(reconnect)()
        await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after")

    async def test_unknown_alias(self):
        msg = "The connection 'unknown' doesn't exist."
        with self.assertRaisesMessage(ConnectionDoesNotExist, msg):
            async with transaction.aatomic("unknown"):
                self.fail("The block was entered.")


class ThreadTests(AsyncTransactionTestCase):
    """Promise 3: no ordinary wait is a deadlock."""

    async def together(self, function):
        async def block():
            async with transaction.aatomic():
                await asyncio.sleep(0.02)
                await Entry.objects.acreate(name="block")

        began = time.monotonic()
        async with transaction.aatomic():
            await asyncio.gather(block(), sync_to_async(function)())
        self.assertLess(time.monotonic() - began, 5)
        await self.assertAsyncNames("block", "function")

    async def acreate(self):
        await Entry.objects.acreate(name="function")

    async def nested(self):
        async with transaction.aatomic():
            await self.acreate()

    async def test_async_to_sync(self):
        await self.together(lambda: async_to_sync(self.acreate)())

    async def test_async_to_sync_with_a_block(self):
        await self.together(lambda: async_to_sync(self.nested)())

    async def test_asyncio_run(self):
        await self.together(lambda: asyncio.run(self.acreate()))

    async def test_asyncio_run_with_a_block(self):
        await self.together(lambda: asyncio.run(self.nested()))

    def test_loop_in_the_thread_that_runs_sync_code(self):
        """The thread for thread-sensitive functions runs the loop itself."""
        if is_in_memory():
            self.skipTest("asgiref's thread has another connection.")

        def block():
            with transaction.atomic():
                asyncio.run(self.nested())
                asyncio.run(Entry.objects.acreate(name="another"))
                raise Rollback

        def block_and_close():
            try:
                block()
            finally:
                connections.close_all()

        async def main():
            await sync_to_async(block_and_close)()

        with self.assertRaises(Rollback):
            asyncio.run(main())
        self.assertNames()

    def test_coroutine_on_the_loop_of_the_blocks_thread(self):
        called = []

        async def main():
            self.assertIs(connections["default"], main_connection)
            async with transaction.aatomic():
                transaction.on_commit(lambda: called.append(True))

        with transaction.atomic():
            main_connection = connections["default"]
            asyncio.run(main())
        self.assertEqual(called, [True])

    async def test_leaving_does_not_wait_for_a_function(self):
        """One that's not in the database, and whose caller was cancelled."""
        over = threading.Event()

        def function():
            create("rolled back")
            over.wait(10)

        began = time.monotonic()
        with self.assertRaises(TimeoutError):
            async with transaction.aatomic():
                async with asyncio.timeout(0.2):
                    await sync_to_async(function)()
        self.assertLess(time.monotonic() - began, 5)
        over.set()
        await self.assertAsyncNames()

    def test_loop_closed_with_a_block_open(self):
        async def block():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                await asyncio.sleep(100)

        loop = asyncio.new_event_loop()
        task = loop.create_task(block())
        loop.run_until_complete(asyncio.sleep(0.3))
        self.assertEqual(len(transaction_threads()), 0 if is_native() else 1)
        loop.close()
        self.assertIs(wait_until(lambda: not transaction_threads()), True)
        self.assertNames()
        # Its destruction is reported to the loop's exception handler.
        task._log_destroy_pending = False
        del task
        gc.collect()
        connections.close_all()


class HookTests(AsyncTransactionTestCase):
    """Promise 6: on_commit() after cancellations and in odd places."""

    async def test_cancelled_in_a_callback(self):
        called = []

        async def first():
            called.append("first")
            await asyncio.sleep(10)

        async def block():
            async with transaction.aatomic():
                transaction.on_commit(first)
                transaction.on_commit(lambda: called.append("second"))
                transaction.on_commit(lambda: called.append("third"), robust=True)

        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(0.5):
                await block()
        self.assertEqual(called, ["first", "second", "third"])

    async def test_cancelled_at_any_time(self):
        for number in range(40):
            called = []

            async def block():
                async with transaction.aatomic():
                    await Entry.objects.acreate(name=f"{number}")
                    transaction.on_commit(lambda: called.append(number))

            task = asyncio.create_task(block())
            await asyncio.sleep(number * 0.0004)
            task.cancel()
            await asyncio.wait([task])
            committed = await Entry.objects.filter(name=f"{number}").aexists()
            self.assertEqual(called, [number] if committed else [])

    async def test_object_with_an_asynchronous_call(self):
        called = []

        class Callback:
            async def __call__(self):
                called.append("object")

        async def coroutine():
            called.append("coroutine")

        async with transaction.aatomic():
            transaction.on_commit(Callback())
            transaction.on_commit(lambda: coroutine())
        self.assertEqual(called, ["object", "coroutine"])

    def test_many_callbacks_rolled_back(self):
        with transaction.atomic():
            for _ in range(5000):
                transaction.on_commit(lambda: None)
            began = time.monotonic()
            with self.assertRaises(Rollback):
                with transaction.atomic():
                    for _ in range(5000):
                        transaction.on_commit(lambda: None)
                    raise Rollback
            self.assertLess(time.monotonic() - began, 1)
            self.assertEqual(len(connection.run_on_commit), 5000)


class MarkTests(AsyncTransactionTestCase):
    """Promise 3: an error outside of a nested block doesn't fail that one."""

    async def test_failure_while_a_siblings_block_is_open(self):
        await Entry.objects.acreate(name="existing")
        asked = threading.Event()
        inside = asyncio.Event()

        def fail(*args, **kwargs):
            asked.wait(10)
            raise Rollback

        async def nested():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="nested")
                inside.set()
                asked.set()
                await asyncio.sleep(0.1)
                await Entry.objects.acreate(name="nested, too")

        def failing_save():
            with transaction.mark_for_rollback_on_error():
                fail()

        async def sibling():
            await until(inside)
            with self.assertRaises(Rollback):
                await asyncio.to_thread(failing_save)

        async with transaction.aatomic():
            await asyncio.gather(nested(), sibling())
            # The mark is for the block that the sibling is in.
            self.assertIs(transaction.get_rollback(), True)
        await self.assertAsyncNames("existing")

    async def test_failure_while_a_nested_block_is_rolled_back(self):
        """
        Abandoned code may fail when the mark on the connection was reset. The
        next one would be for the block around.
        """

        def fail(execute, sql, params, many, context):
            if sql.startswith("ROLLBACK TO"):
                sharing.mark_block_for_rollback(nested, OperationalError("late"))
            return execute(sql, params, many, context)

        async with transaction.aatomic():
            with connection.execute_wrapper(fail), self.assertRaises(Rollback):
                async with transaction.aatomic():
                    nested = belonging.current()
                    await Entry.objects.acreate(name="rolled back")
                    raise Rollback
            await Entry.objects.acreate(name="a")
        await self.assertAsyncNames("a")

    async def test_refusal_does_not_mark(self):
        """Nothing was sent, so the transaction stays usable."""
        refused = asyncio.Event()
        inside = asyncio.Event()
        self.addCleanup(setattr, sharing, "TURN_TIMEOUT", sharing.TURN_TIMEOUT)
        sharing.TURN_TIMEOUT = 0.2

        async def sibling():
            await until(inside)
            with self.assertRaises(TransactionManagementError):
                await asyncio.to_thread(create, "refused")
            refused.set()

        async with transaction.aatomic():
            task = asyncio.create_task(sibling())
            async with transaction.aatomic():
                inside.set()
                await until(refused)
                await Entry.objects.acreate(name="nested")
            await task
            await Entry.objects.acreate(name="outer")
        await self.assertAsyncNames("nested", "outer")

    async def test_savepoint_while_rows_are_returned(self):
        """On SQLite, an INSERT goes on while its rows are fetched."""

        def returns_rows():
            return connection.features.can_return_columns_from_insert

        if not await sync_to_async(returns_rows)():
            self.skipTest("Needs INSERT ... RETURNING.")
        executed = threading.Event()

        def insert():
            with connection.cursor() as cursor:
                cursor.execute(
                    "INSERT INTO async_transactions_entry (name, count) "
                    "VALUES ('a', 0), ('b', 0) RETURNING id"
                )
                executed.set()
                time.sleep(0.2)
                return len(cursor.fetchall())

        async def nested():
            await asyncio.to_thread(executed.wait, 10)
            async with transaction.aatomic():
                await Entry.objects.acreate(name="nested")

        async with transaction.aatomic():
            rows, _ = await asyncio.gather(asyncio.to_thread(insert), nested())
        self.assertEqual(rows, 2)
        await self.assertAsyncNames("a", "b", "nested")


class MemoryTests(AsyncTransactionTestCase):
    databases = {"default", "other"}

    async def test_chain_of_tasks_started_inside(self):
        """Each block ends before the next: none is kept alive."""
        block = None

        async def job(number, may_begin):
            nonlocal block
            await until(may_begin)
            ended = asyncio.Event()
            async with transaction.aatomic():
                block = belonging.current()
                if number:
                    following = asyncio.create_task(job(number - 1, ended))
            ended.set()
            if number:
                await following

        may_begin = asyncio.Event()
        may_begin.set()
        await job(20, may_begin)
        self.assertLess(len(list(belonging.chain(block))), 5)

    def test_error_that_leads_to_a_context(self):
        """What Django keeps of it doesn't keep the block."""

        async def fail():
            # Its context holds what asgiref finds inside of the block.
            task = asyncio.create_task(asyncio.sleep(0))
            with self.assertRaises(IntegrityError):
                await Entry.objects.using("other").acreate(name="a")
            await task

        async def block():
            async with transaction.aatomic("other"):
                await Entry.objects.using("other").acreate(name="a")
                async with transaction.aatomic():
                    await asyncio.create_task(fail())
                    return weakref.ref(belonging.current())

        # With its event loop, that ends timers which hold contexts, too.
        ref = async_to_sync(block)()
        gc.collect()
        self.assertIsNone(ref())

    def test_contexts_left_elsewhere(self):
        for _ in range(50):
            atomic = transaction.atomic()
            atomic.__enter__()
            contextvars.copy_context().run(atomic.__exit__, None, None, None)
        self.assertLess(len(list(belonging.chain(belonging.current()))), 3)

    def test_blocks_left_out_of_order(self):
        def generator():
            with transaction.atomic():
                yield

        first, second = generator(), generator()
        next(first)
        next(second)
        first.close()
        second.close()
        self.assertEqual(connection.blocks, [])

    def test_connection_opened_anew_in_a_sync_block(self):
        if is_in_memory():
            self.skipTest("Closing it would destroy the database.")
        with transaction.atomic():
            connection.close()
            connection.connect()
            create("autocommit")
        self.assertNames("autocommit")


class FetchTests(AsyncTransactionTestCase):
    async def test_iterator_waits_for_a_siblings_block(self):
        await Entry.objects.abulk_create(Entry(name=f"{n:03}") for n in range(100))
        began = threading.Event()
        inside = threading.Event()

        def read():
            found = []
            for entry in Entry.objects.order_by("name").iterator(chunk_size=10):
                if not found:
                    began.set()
                    inside.wait(10)
                found.append(entry.name)
            return found

        async def nested():
            await asyncio.to_thread(began.wait, 10)
            async with transaction.aatomic():
                with self.assertRaises(Exception):
                    await sync_to_async(broken)()
                inside.set()
                await asyncio.sleep(0.05)
                raise Rollback

        def broken():
            with connection.cursor() as cursor:
                cursor.execute("SELECT nothing")

        async with transaction.aatomic():
            results = await asyncio.gather(
                asyncio.to_thread(read), nested(), return_exceptions=True
            )
        self.assertEqual(results[0], [f"{n:03}" for n in range(100)])
        self.assertIsInstance(results[1], Rollback)


class CursorTests(AsyncTransactionTestCase):
    """What a driver can't bear."""

    @skipUnless(connection.vendor == "sqlite", "A test for SQLite.")
    async def test_close_outlives_the_cursor(self):
        def close():
            close = connection.create_cursor().close
            gc.collect()
            close()

        async with transaction.aatomic():
            await sync_to_async(close)()

    @skipUnless(connection.vendor == "sqlite", "A test for SQLite.")
    async def test_closed_by_two_threads(self):
        """
        Leaving a block closes a cursor that another thread is closing, but not
        at the same time: both would free its statement.
        """
        cursor_class = django.db.backends.sqlite3.base.SQLiteCursorWrapper
        closing = threading.Event()
        closes_too = threading.Event()
        active = []
        overlaps = []

        def close(cursor):
            active.append(cursor)
            overlaps.append(len(active) > 1)
            if closing.is_set():
                closes_too.set()
            else:
                closing.set()
                closes_too.wait(0.5)
            super(cursor_class, cursor).close()
            active.remove(cursor)

        def select():
            cursor = connection.cursor()
            cursor.execute("SELECT 1")
            return cursor

        with mock.patch.object(cursor_class, "close", close, create=True):
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    cursor = await sync_to_async(select)()
                    task = asyncio.create_task(asyncio.to_thread(cursor.close))
                    await asyncio.to_thread(closing.wait)
                    raise Rollback
            await task
        self.assertGreater(len(overlaps), 1)
        self.assertNotIn(True, overlaps)


class ReliefTests(AsyncTransactionTestCase):
    async def test_function_that_waits_for_a_queued_one(self):
        """Both are queued while the block's thread is idle."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def queued():
            create("queued")
            loop.call_soon_threadsafe(done.set)

        async with transaction.aatomic():
            await names()
            # Until the thread waits for work.
            await asyncio.sleep(0.1)
            await asyncio.gather(
                sync_to_async(async_to_sync(until))(done), sync_to_async(queued)()
            )
        await self.assertAsyncNames("queued")


class ThreadStartTests(AsyncTransactionTestCase):
    """Promise 7, while no thread can be started."""

    def no_threads(self):
        error = RuntimeError("can't start new thread")
        return mock.patch("threading.Thread.start", side_effect=error)

    async def test_entering(self):
        if is_native():
            self.skipTest("No thread is started.")

        async def enter():
            # That of the test may have kept a thread.
            scopes.request.set(scopes.Scope())
            with self.no_threads():
                async with asyncio.timeout(5):
                    async with transaction.aatomic():
                        self.fail("The block was entered.")

        with self.assertRaisesMessage(OperationalError, "can't start new thread"):
            await asyncio.create_task(enter())
        await Entry.objects.acreate(name="usable")
        self.assertEqual(await names(), ["usable"])
        self.assertGreater(sharing.TURN_TIMEOUT, 0)

    async def leave(self, busy):
        """Leave a block while its thread runs `busy` until it's released."""
        loop = asyncio.get_running_loop()
        began = asyncio.Event()
        released = threading.Event()

        def run():
            create("rolled back")
            with busy():
                loop.call_soon_threadsafe(began.set)
                released.wait(10)

        no_threads = self.no_threads()
        try:
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    task = asyncio.create_task(sync_to_async(run)())
                    await until(began)
                    no_threads.start()
                    # It's being left by then.
                    loop.call_later(0.2, released.set)
                    raise Rollback
        finally:
            no_threads.stop()
        await task
        await self.assertAsyncNames()

    async def test_leaving_while_a_function_runs(self):
        """The rollback waits for the thread that there is."""
        await self.leave(nullcontext)

    async def test_leaving_while_a_statement_runs(self):
        """It can't be cancelled."""

        def statement():
            return sharing.taking_turn(transaction.get_connection())

        with self.assertLogs("django.db.backends.base", "WARNING") as cm:
            await self.leave(statement)
        self.assertEqual(
            [record.getMessage() for record in cm.records],
            ["A query couldn't be cancelled."],
        )

    async def test_relief(self):
        """It's tried again to start a thread for one that waits for a loop."""
        if is_native():
            self.skipTest("The sibling doesn't need one.")
        created = asyncio.Event()
        waiting = asyncio.Event()
        start = threads.Worker.start
        attempts = []

        def fail_once(worker):
            attempts.append(worker)
            if len(attempts) == 1:
                raise RuntimeError("can't start new thread")
            start(worker)

        def wait():
            async def main():
                waiting.set()
                await until(created)

            async_to_sync(main)()

        async def sibling():
            await until(waiting)
            await Entry.objects.acreate(name="sibling")
            created.set()

        async with transaction.aatomic():
            await names()
            with mock.patch.object(threads.Worker, "start", fail_once):
                await asyncio.gather(sync_to_async(wait)(), sibling())
            self.assertGreater(len(attempts), 1)
        await self.assertAsyncNames("sibling")
