"""
Promise 7: no failure leaves a transaction open, and the error says what
happened.
"""

import asyncio
import contextvars
import gc
import threading
from contextlib import suppress

from asgiref.sync import sync_to_async

from django.db import (
    OperationalError,
    connection,
    new_connection,
    threads,
    transaction,
)
from django.db.backends.signals import connection_created
from django.db.transaction import TransactionManagementError

from . import server
from .base import (
    AsyncTransactionTestCase,
    create,
    is_in_memory,
    names,
    slow_query,
    transaction_threads,
    until,
    wait_until,
)
from .models import Entry
from .pool import PoolTestCase, close_connections


class KillingMixin:
    def setUp(self):
        self.addCleanup(server.end_busy_sessions)
        super().setUp()
        if not server.is_supported():
            self.skipTest("Needs a database server.")

    async def assertUsable(self):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="usable")
        await self.assertAsyncNames("usable")

    def assertRaisesEnded(self):
        msg = server.SESSION_ENDED[connection.vendor]
        return self.assertRaisesMessage(OperationalError, msg)

    async def end_session(self):
        """Let the server end the session that the caller uses."""
        session = await sync_to_async(server.session_id)()
        await asyncio.to_thread(server.ask, server.END_SESSION, session)

    async def test_session_ended_inside(self):
        called = []
        with self.assertRaisesEnded():
            async with transaction.aatomic():
                transaction.on_commit(lambda: called.append(True))
                await Entry.objects.acreate(name="lost")
                await self.end_session()
                await Entry.objects.acreate(name="lost, too")
        self.assertEqual(called, [])
        await self.assertUsable()

    async def test_session_ended_before_commit(self):
        called = []
        with self.assertRaisesEnded():
            async with transaction.aatomic():
                transaction.on_commit(lambda: called.append(True))
                await Entry.objects.acreate(name="lost")
                await self.end_session()
        self.assertEqual(called, [])
        await self.assertUsable()

    async def test_session_ended_in_commit(self):
        """
        The error says that the outcome is unknown. It isn't hidden by that of
        another connection, which nobody needs then.
        """

        def refuse(**kwargs):
            raise AssertionError("It connects again.")

        self.addCleanup(connection_created.disconnect, refuse)
        msg = "it's unknown whether the transaction was committed. "
        msg += server.SESSION_ENDED[connection.vendor]
        with self.assertRaisesMessage(OperationalError, msg) as cm:
            async with transaction.aatomic():
                await Entry.objects.acreate(name="lost")
                await self.end_session()
                connection_created.connect(refuse)
        self.assertIsInstance(cm.exception.__cause__, connection.Database.Error)
        connection_created.disconnect(refuse)
        await self.assertUsable()

    async def test_session_ended_before_a_commit_that_is_not_sent(self):
        """Nothing is unknown then."""
        with self.assertRaises(OperationalError) as cm:
            async with transaction.aatomic():
                await Entry.objects.acreate(name="lost")
                await self.end_session()
                with self.assertRaisesEnded():
                    await sync_to_async(server.session_id)()
        if connection.vendor == "postgresql":
            self.assertNotIn("unknown", str(cm.exception))
        await self.assertUsable()

    async def test_session_ended_in_a_nested_block(self):
        with self.assertRaisesEnded():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="lost")
                async with transaction.aatomic():
                    await self.end_session()
                    await Entry.objects.acreate(name="lost, too")
        await self.assertUsable()

    async def test_session_ended_before_a_nested_rollback(self):
        """The block around it doesn't lose its work in silence."""
        msg = (
            "opened on the database 'default' was rolled back, because the connection "
            "was lost inside of it."
        )
        with self.assertRaisesMessage(OperationalError, msg):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="lost")
                with suppress(ValueError):
                    async with transaction.aatomic():
                        await self.end_session()
                        raise ValueError
        await self.assertUsable()

    async def test_session_ended_while_siblings_use_it(self):
        async def nested(name):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=name)

        with self.assertRaises(ExceptionGroup) as cm:
            async with transaction.aatomic():
                await self.end_session()
                async with asyncio.TaskGroup() as group:
                    for number in range(5):
                        group.create_task(nested(f"{number}"))
        msg = server.SESSION_ENDED[connection.vendor]
        self.assertIn(msg, str(cm.exception.exceptions[0]))
        await self.assertUsable()

    async def test_session_ended_in_a_manual_transaction(self):
        await transaction.aset_autocommit(False)
        await Entry.objects.acreate(name="lost")
        await self.end_session()
        with self.assertRaisesEnded():
            await transaction.acommit()
        with self.assertRaises(OperationalError):
            await transaction.aset_autocommit(True)
        await self.assertUsable()

    async def test_session_ended_in_new_connection(self):
        """The transaction around it goes on."""
        async with transaction.aatomic():
            await Entry.objects.acreate(name="outer")
            with self.assertRaisesEnded():
                async with new_connection():
                    await self.end_session()
                    await Entry.objects.acreate(name="lost")
            await Entry.objects.acreate(name="outer, too")
        await self.assertAsyncNames("outer", "outer, too")

    async def while_it_runs(self, queries):
        """Run one of `queries` for the session in which the caller is slow."""
        session = await sync_to_async(server.session_id)()
        task = asyncio.create_task(sync_to_async(slow_query)())
        running = await asyncio.to_thread(
            wait_until, lambda: server.is_running(session)
        )
        self.assertIs(running, True)
        await asyncio.to_thread(server.ask, queries, session)
        await asyncio.wait_for(task, 10)

    async def test_session_ended_in_a_query(self):
        with self.assertRaisesEnded():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="lost")
                await self.while_it_runs(server.END_SESSION)
        await self.assertUsable()

    async def test_query_cancelled(self):
        msg = server.QUERY_CANCELLED[connection.vendor]
        with self.assertRaisesMessage(OperationalError, msg):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                await self.while_it_runs(server.CANCEL_QUERY)
        await self.assertUsable()

    async def test_query_cancelled_in_a_nested_block(self):
        """The savepoint was rolled back, so the transaction goes on."""
        msg = server.QUERY_CANCELLED[connection.vendor]
        async with transaction.aatomic():
            with self.assertRaisesMessage(OperationalError, msg):
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="rolled back")
                    await self.while_it_runs(server.CANCEL_QUERY)
            await Entry.objects.acreate(name="usable")
        await self.assertAsyncNames("usable")


class KillingTests(KillingMixin, AsyncTransactionTestCase):
    pass


class KillingWithPoolTests(KillingMixin, PoolTestCase):
    # For the block, for new_connection() in it, and for the test.
    pool_options = {"min_size": 0, "max_size": 3, "timeout": 5}


class ManualTransactionTests(AsyncTransactionTestCase):
    async def test_cancelled_query_is_not_committed(self):
        """The cancellation was swallowed, so acommit() says so."""
        await transaction.aset_autocommit(False)
        await Entry.objects.acreate(name="rolled back")
        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(0.2):
                await sync_to_async(slow_query)()
        msg = "was cancelled inside the block that"
        with self.assertRaisesMessage(TransactionManagementError, msg):
            await transaction.acommit()
        await Entry.objects.acreate(name="committed")
        await transaction.acommit()
        await transaction.aset_autocommit(True)
        await self.assertAsyncNames("committed")

    async def test_rolled_back_after_a_cancelled_query(self):
        await transaction.aset_autocommit(False)
        await Entry.objects.acreate(name="rolled back")
        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(0.2):
                await sync_to_async(slow_query)()
        await transaction.arollback()
        await Entry.objects.acreate(name="committed")
        await transaction.acommit()
        await transaction.aset_autocommit(True)
        await self.assertAsyncNames("committed")

    async def test_cancelled_while_it_waits_for_a_nested_block(self):
        inside = asyncio.Event()
        over = asyncio.Event()

        async def nested():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                inside.set()
                await until(over)

        async def manual():
            await transaction.aset_autocommit(False)
            task = asyncio.create_task(nested())
            await until(inside)
            asyncio.get_running_loop().call_later(0.1, asyncio.current_task().cancel)
            with self.assertRaises(asyncio.CancelledError):
                await transaction.aset_autocommit(True)
            over.set()
            msg = "was rolled back, because a block around it ended first"
            with self.assertRaisesMessage(TransactionManagementError, msg):
                await task

        await asyncio.create_task(manual())
        await self.assertAsyncNames()


class ClosedLoopMixin:
    """An event loop is closed with tasks pending, and nobody cancels them."""

    def setUp(self):
        self.addCleanup(server.end_busy_sessions)
        super().setUp()
        self.addCleanup(setattr, threads, "LOOP_INTERVAL", threads.LOOP_INTERVAL)
        threads.LOOP_INTERVAL = 0.05

    def close_loop(self, *functions):
        """
        Close a loop once each function, in a task of its own, has called the
        one that it's given. Return what keeps the tasks alive.
        """
        loop = asyncio.new_event_loop()
        events = [asyncio.Event() for _ in functions]
        tasks = [
            loop.create_task(function(event.set))
            for function, event in zip(functions, events)
        ]

        async def all_inside():
            await asyncio.gather(*map(until, events))

        loop.run_until_complete(all_inside())
        # Their destruction would be reported to the loop's exception handler.
        for task in tasks:
            task._log_destroy_pending = False
        loop.close()
        return tasks

    def check_after_closing(self, *functions):
        tasks = self.close_loop(*functions)
        self.assertIs(wait_until(lambda: not transaction_threads()), True)
        self.assertNothingIsOpen()
        asyncio.run(self.use())
        self.assertNames("usable")
        # Whether or not they are destroyed makes no difference. asgiref leaves
        # their context variables wherever that happens.
        contextvars.copy_context().run(self.destroy, tasks)
        asyncio.run(self.use("usable, too"))
        self.assertNames("usable", "usable, too")
        close_connections()

    def destroy(self, tasks):
        tasks.clear()
        gc.collect()

    def assertNothingIsOpen(self):
        if server.is_supported():
            self.assertIs(
                wait_until(lambda: not server.ask(server.BUSY_SESSIONS)), True
            )

    async def use(self, name="usable"):
        async with transaction.aatomic():
            await Entry.objects.acreate(name=name)

    async def block(self, inside):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="rolled back")
            inside()
            await asyncio.Event().wait()

    def distinct(self, number):
        async def block(inside):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"rolled back {number}")
                inside()
                await asyncio.Event().wait()

        return block

    async def nested(self, inside):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="rolled back, too")
            await self.block(inside)

    async def siblings(self, inside):
        """One is in a block, the other waits for its turn."""

        async def waits():
            inside()
            await Entry.objects.acreate(name="rolled back, too")

        entered = asyncio.Event()
        async with transaction.aatomic():
            task = asyncio.create_task(self.block(entered.set))
            await until(entered)
            other = asyncio.create_task(waits())
            task._log_destroy_pending = other._log_destroy_pending = False
            await asyncio.gather(task, other)

    async def manual(self, inside):
        await transaction.aset_autocommit(False)
        await Entry.objects.acreate(name="rolled back")
        inside()
        await asyncio.Event().wait()

    async def query(self, inside):
        loop = asyncio.get_running_loop()

        def function():
            create("rolled back")
            loop.call_soon_threadsafe(inside)
            over.wait(0.5)
            create("rolled back, too")

        over = threading.Event()
        async with transaction.aatomic():
            await sync_to_async(function)()

    async def own_connection(self, inside):
        async with new_connection():
            await Entry.objects.acount()
            inside()
            await asyncio.Event().wait()

    async def block_on_own_connection(self, inside):
        async with new_connection():
            await self.block(inside)

    def test_block(self):
        self.check_after_closing(self.block)

    def test_nested_block(self):
        self.check_after_closing(self.nested)

    def test_siblings(self):
        self.check_after_closing(self.siblings)

    def test_manual_transaction(self):
        self.check_after_closing(self.manual)

    def test_function_that_is_running(self):
        self.check_after_closing(self.query)

    def test_several(self):
        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")
        self.check_after_closing(*[self.distinct(number) for number in range(3)])

    def test_own_connection(self):
        if is_in_memory():
            self.skipTest("An in-memory database has but one connection.")
        self.check_after_closing(self.own_connection)

    def test_block_on_own_connection(self):
        if is_in_memory():
            self.skipTest("An in-memory database has but one connection.")
        self.check_after_closing(self.block_on_own_connection)

    async def generator(self):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="rolled back")
            yield await names()

    async def begin(self, generator):
        self.assertEqual(await anext(generator), ["rolled back"])

    def test_generator_that_outlives_run(self):
        """asyncio.run() closes what nobody has closed."""
        generator = self.generator()
        asyncio.run(self.begin(generator))
        self.assertIs(wait_until(lambda: not transaction_threads()), True)
        self.assertNothingIsOpen()
        asyncio.run(self.use())
        self.assertNames("usable")
        close_connections()

    def test_generator_that_outlives_its_loop(self):
        generator = self.generator()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(self.begin(generator))
        loop.close()
        self.assertIs(wait_until(lambda: not transaction_threads()), True)
        self.assertNothingIsOpen()
        asyncio.run(self.use())
        del generator
        gc.collect()
        self.assertNames("usable")
        close_connections()


class ClosedLoopTests(ClosedLoopMixin, AsyncTransactionTestCase):
    pass


class ClosedLoopWithPoolTests(ClosedLoopMixin, PoolTestCase):
    # For each of the blocks, and for the test.
    pool_options = {"min_size": 0, "max_size": 4, "timeout": 5}
