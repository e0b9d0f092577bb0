"""
Promise 7: a cancellation leaves the transaction committed or rolled back.
"""

import asyncio
import contextvars
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from asgiref.sync import async_to_sync, sync_to_async

from django.db import connection, sharing, transaction
from django.db.transaction import TransactionManagementError

from .base import (
    AsyncTransactionTestCase,
    FreshConnectionsTestCase,
    Rollback,
    acreate,
    create,
    create_and_close,
    names,
    slow_query,
    slow_write,
    until,
)
from .models import Entry


def slow_queries():
    for _ in range(100):
        try:
            slow_query()
        except Exception:
            pass


class CancellationTests(AsyncTransactionTestCase):
    async def assertSoon(self, awaitable, seconds=5):
        begin = time.monotonic()
        try:
            return await awaitable
        finally:
            self.assertLess(time.monotonic() - begin, seconds)

    async def test_running_query_is_cancelled_on_the_server(self):
        async def block(call):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                async with asyncio.timeout(0.2):
                    await call()

        for name, call in {
            "sync_to_async": sync_to_async(slow_query),
            "insensitive": sync_to_async(slow_query, thread_sensitive=False),
            "to_thread": lambda: asyncio.to_thread(slow_query),
            "again and again": sync_to_async(slow_queries),
        }.items():
            with self.subTest(name):
                with self.assertRaises(TimeoutError):
                    await self.assertSoon(block(call))
                await self.assertAsyncNames()

    async def test_beside_an_unfinished_cursor(self):
        """SQLite goes on interrupting as long as there is one."""
        cursors = []

        def leave_unfinished():
            for name in "abc":
                create(name)
            cursor = connection.cursor()
            cursor.execute("SELECT name FROM async_transactions_entry")
            cursor.fetchone()
            cursors.append(cursor)

        with self.assertRaises(TimeoutError):
            async with transaction.aatomic():
                await sync_to_async(leave_unfinished)()
                async with asyncio.timeout(0.2):
                    await sync_to_async(slow_query)()
        await self.assertAsyncNames()
        async with transaction.aatomic():
            await Entry.objects.acreate(name="committed")
        await self.assertAsyncNames("committed")

    async def test_code_that_does_not_end(self):
        """Leaving doesn't wait for a function that's not in the database."""

        left = threading.Event()

        def function():
            create("rolled back")
            left.wait(20)

        async def block():
            async with transaction.aatomic():
                async with asyncio.timeout(0.3):
                    await sync_to_async(function)()

        with self.assertRaises(TimeoutError):
            await self.assertSoon(block())
        await self.assertAsyncNames()
        # Its thread ends after the function.
        left.set()

    async def test_swallowed(self):
        msg = "was cancelled inside the block that"
        with self.assertRaisesMessage(TransactionManagementError, msg):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                try:
                    async with asyncio.timeout(0.2):
                        await sync_to_async(slow_query)()
                except TimeoutError:
                    pass
                with self.assertRaisesMessage(
                    TransactionManagementError, "An error occurred in the current"
                ):
                    await Entry.objects.acreate(name="refused")
        await self.assertAsyncNames()

    async def test_swallowed_in_a_nested_block(self):
        """Its work is gone, so the outermost block says so."""
        msg = "was cancelled inside the block that"
        with self.assertRaisesMessage(TransactionManagementError, msg):
            async with transaction.aatomic():
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="nested")
                    try:
                        async with asyncio.timeout(0.2):
                            await sync_to_async(slow_query)()
                    except TimeoutError:
                        pass
                await Entry.objects.acreate(name="outer")
        await self.assertAsyncNames()

    async def test_caught_around_a_nested_block(self):
        """The savepoint was rolled back, so the transaction goes on."""
        async with transaction.aatomic():
            await Entry.objects.acreate(name="before")
            with self.assertRaises(TimeoutError):
                async with asyncio.timeout(0.2):
                    async with transaction.aatomic():
                        await Entry.objects.acreate(name="nested")
                        await sync_to_async(slow_query)()
            await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after", "before")

    async def test_write_in_a_nested_block(self):
        """
        What was done before the savepoint stays. For a write that's cancelled,
        SQLite would roll back the whole transaction.
        """
        async with transaction.aatomic():
            await Entry.objects.acreate(name="before")
            with self.assertRaises(TimeoutError):
                async with asyncio.timeout(0.2):
                    async with transaction.aatomic():
                        await Entry.objects.acreate(name="nested")
                        await sync_to_async(slow_write)()
            await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after", "before")

    def test_below_a_sync_block(self):
        async def main():
            await Entry.objects.acreate(name="before")
            with self.assertRaises(TimeoutError):
                async with asyncio.timeout(0.2):
                    async with transaction.aatomic():
                        await Entry.objects.acreate(name="nested")
                        await asyncio.to_thread(slow_query)
            await Entry.objects.acreate(name="after")

        with transaction.atomic():
            async_to_sync(main)()
        self.assertNames("after", "before")

    async def test_abandoned_code_is_refused(self):
        refused = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def function():
            create("before")
            time.sleep(0.4)
            try:
                create("after")
            except TransactionManagementError as exc:
                loop.call_soon_threadsafe(refused.set_result, str(exc))

        with self.assertRaises(TimeoutError):
            async with transaction.aatomic():
                async with asyncio.timeout(0.2):
                    await sync_to_async(function)()
        self.assertIn("can't use the database 'default' any more", await refused)
        await self.assertAsyncNames()

    async def test_abandoned_code_is_refused_in_an_open_block(self):
        """Also if it has run nothing in there, so that the block goes on."""
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()
        outcome = loop.create_future()

        def function():
            abandoned.wait(10)
            try:
                found = str(create("refused"))
            except TransactionManagementError as exc:
                found = str(exc)
            loop.call_soon_threadsafe(outcome.set_result, found)

        async with transaction.aatomic():
            with self.assertRaises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await sync_to_async(function)()
            # asyncio tells the thread in a callback.
            await asyncio.sleep(0)
            abandoned.set()
            found = await asyncio.wait_for(outcome, 10)
            self.assertIn("because the task that called it was cancelled", found)
            await Entry.objects.acreate(name="usable")
        await self.assertAsyncNames("usable")

    async def test_cancelling_begins_after_the_turn_was_taken(self):
        """It ends with that turn, which doesn't wait for it."""

        def take():
            connection = transaction.get_connection()
            turn = connection.turn
            turn.cancelled = (turn.count + 1, threading.Event())
            with sharing.taking_turn(connection):
                turn.cancelled[1].set()
            # The next one has waited for it.
            with sharing.taking_turn(connection):
                self.assertIsNone(turn.cancelled)

        async with transaction.aatomic():
            await sync_to_async(take)()

    async def test_at_any_moment(self):
        async def block(name):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"{name}, 1")
                async with transaction.aatomic():
                    await Entry.objects.acreate(name=f"{name}, 2")
                await asyncio.to_thread(create, f"{name}, 3")

        committed = []
        for number in range(40):
            name = f"{number}"
            task = asyncio.create_task(block(name))
            await asyncio.sleep(number * 0.0005)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
            # Committed as a whole or not at all.
            found = [found for found in await names() if found.startswith(f"{name},")]
            self.assertIn(len(found), (0, 3))
            committed.append(bool(found))
        async with transaction.aatomic():
            await Entry.objects.acreate(name="usable")
        self.assertIn("usable", await names())


class CancelledCallTests(FreshConnectionsTestCase):
    """
    asgiref gives a task that's cancelled the context of the function which it
    has called, and which goes on in its thread. What that has opened isn't for
    the task (promise 2).
    """

    def setUp(self):
        super().setUp()
        self.opened = threading.Event()
        self.goes_on = threading.Event()

    def function(self):
        try:
            with self.assertRaises(Rollback), transaction.atomic():
                create("function")
                self.opened.set()
                self.goes_on.wait(10)
                raise Rollback
        finally:
            connection.close()

    async def be_cancelled(self, **kwargs):
        """Return a Future of the function's end."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def function():
            try:
                self.function()
            finally:
                loop.call_soon_threadsafe(ended.set_result, None)

        call = asyncio.create_task(asyncio.to_thread(self.opened.wait, 10))
        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(None) as timeout:
                call.add_done_callback(lambda call: timeout.reschedule(0))
                await sync_to_async(function, **kwargs)()
        return ended

    async def test_task_is_outside(self):
        async def create_in_thread(name):
            await sync_to_async(create)(name)

        async def create_in_any_thread(name):
            await asyncio.to_thread(create_and_close, name)

        async def create_in_block(name):
            async with transaction.aatomic(durable=True):
                await Entry.objects.acreate(name=name)

        async def create_in_task(name):
            await asyncio.create_task(Entry.objects.acreate(name=name))

        for use in (
            acreate,
            create_in_any_thread,
            create_in_block,
            create_in_task,
            create_in_thread,
        ):
            self.opened.clear()
            self.goes_on.clear()
            await Entry.objects.all().adelete()
            ended = await self.be_cancelled(thread_sensitive=False)
            self.assertIs(connection.in_atomic_block, False)
            # SQLite waits for the function.
            asyncio.get_running_loop().call_later(0.2, self.goes_on.set)
            await use("task")
            await ended
            await self.assertAsyncNames("task")

    async def test_tasks_that_share_a_context(self):
        """Behind the block of another task, there's that of the function."""
        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")
        ended = await self.be_cancelled(thread_sensitive=False)
        entered = asyncio.Event()
        left = asyncio.Event()

        async def block():
            async with transaction.aatomic():
                entered.set()
                await until(left)

        task = asyncio.get_running_loop().create_task(
            block(), context=asyncio.current_task().get_context()
        )
        try:
            await until(entered)
            self.assertIs(connection.in_atomic_block, False)
            async with transaction.aatomic(durable=True):
                await self.assertAsyncNames()
        finally:
            left.set()
            self.goes_on.set()
            await task
            await ended

    async def test_function_that_has_called_asynchronous_code(self):
        """asgiref notes the calls in there for the same thread."""
        function = self.function

        async def query():
            await sync_to_async(len)("")

        def call_before():
            async_to_sync(query)()
            function()

        self.function = call_before
        ended = await self.be_cancelled(thread_sensitive=False)
        self.assertIs(connection.in_atomic_block, False)
        self.goes_on.set()
        await ended

    async def test_tasks_started_inside(self):
        """They stay inside when async_to_sync() has returned."""
        goes_on = asyncio.Event()
        tasks = []

        async def go_on():
            await until(goes_on)
            self.assertIs(connection.in_atomic_block, True)
            await sync_to_async(create, thread_sensitive=False)("task")

        async def start():
            tasks.append(asyncio.create_task(go_on()))

        def function():
            with transaction.atomic():
                create("function")
                async_to_sync(start)()
                loop.call_soon_threadsafe(goes_on.set)
                future = asyncio.run_coroutine_threadsafe(
                    asyncio.wait(tasks, timeout=10), loop
                )
                future.result()
                transaction.set_rollback(True)
            connection.close()

        loop = asyncio.get_running_loop()
        await sync_to_async(function)()
        await tasks[0]
        await self.assertAsyncNames()

    def test_context_copied_by_hand(self):
        """Its thread isn't inside, nor inside of what's around that."""

        seen = []

        def look():
            seen.append(connection.in_atomic_block)

        def function():
            try:
                with transaction.atomic():
                    context = contextvars.copy_context()
                    thread = threading.Thread(target=context.run, args=[look])
                    thread.start()
                    thread.join()
            finally:
                connection.close()

        async def call():
            await sync_to_async(function, thread_sensitive=False)()

        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")
        with transaction.atomic():
            async_to_sync(call)()
        self.assertEqual(seen, [False])

    async def test_task_that_has_outlived_a_block(self):
        over = asyncio.Event()

        async def late():
            await until(over)
            ended = await self.be_cancelled(thread_sensitive=False)
            try:
                msg = "can't use the database 'default' any more"
                with self.assertRaisesMessage(TransactionManagementError, msg):
                    await Entry.objects.acreate(name="task")
            finally:
                self.goes_on.set()
                await ended

        async with transaction.aatomic():
            task = asyncio.create_task(late())
        over.set()
        await task
        await self.assertAsyncNames()

    async def test_block_entered_by_a_call_that_has_returned(self):
        """That's open for the task, whatever the thread does now."""
        released = threading.Event()
        with ThreadPoolExecutor(1) as executor:
            call = partial(sync_to_async, thread_sensitive=False, executor=executor)
            atomic = transaction.atomic()
            await call(atomic.__enter__)()
            await call(create)("task")
            waits = asyncio.create_task(call(released.wait)(10))
            await asyncio.sleep(0.05)
            self.assertIs(connection.in_atomic_block, True)
            released.set()
            await waits
            await call(transaction.set_rollback)(True)
            await call(atomic.__exit__)(None, None, None)
            await call(lambda: connection.close())()
        await self.assertAsyncNames()
