"""
Promise 10: new_connection() gives the code inside it connections of its own.
"""

import asyncio
import contextvars
import inspect
import threading
from contextlib import nullcontext
from functools import partial

from asgiref.sync import async_to_sync, sync_to_async

from django.db import (
    NotSupportedError,
    connection,
    connections,
    new_connection,
    transaction,
)
from django.db.async_calls import run_sync
from django.db.transaction import TransactionManagementError
from django.test import TestCase
from django.utils.connection import ConnectionDoesNotExist

from .base import AsyncTransactionTestCase, Rollback, create, is_in_memory, names, until
from .models import Entry
from .test_ends import OUTLIVED


def session():
    """Return what tells this session of the database from others."""
    used = transaction.get_connection()
    used.ensure_connection()
    return id(used.connection)


class NewConnectionTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        if is_in_memory():
            self.skipTest("An in-memory database has but one connection.")

    async def test_pauses_the_transaction(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                self.assertEqual(await names(), [])
                outer = await sync_to_async(session)()
                async with new_connection():
                    self.assertNotEqual(await sync_to_async(session)(), outer)
                    self.assertIs(transaction.get_connection().in_atomic_block, False)
                    self.assertEqual(await names(), [])
                self.assertEqual(await sync_to_async(session)(), outer)
                await Entry.objects.acreate(name="outer")
                async with new_connection("default"):
                    self.assertEqual(await names(), [])
                self.assertEqual(await names(), ["outer"])
                raise Rollback
        await self.assertAsyncNames()

    async def test_commits_by_itself(self):
        if connection.vendor == "sqlite":
            self.skipTest("The transaction keeps others from writing.")
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="outer")
                async with new_connection():
                    await Entry.objects.acreate(name="autocommit")
                    async with transaction.aatomic(durable=True):
                        await Entry.objects.acreate(name="block")
                    with self.assertRaises(Rollback):
                        async with transaction.aatomic():
                            await Entry.objects.acreate(name="rolled back")
                            raise Rollback
                raise Rollback
        await self.assertAsyncNames("autocommit", "block")

    async def test_covers_what_is_started_inside(self):
        async with new_connection():
            own = await sync_to_async(session)()
            self.assertEqual(
                await asyncio.gather(
                    sync_to_async(session)(),
                    sync_to_async(session, thread_sensitive=False)(),
                    asyncio.to_thread(session),
                    asyncio.create_task(sync_to_async(session)()),
                ),
                [own] * 4,
            )
            async with new_connection():
                self.assertNotEqual(await sync_to_async(session)(), own)
            self.assertEqual(await sync_to_async(session)(), own)

    async def test_held_for_the_whole_block(self):
        def set_variable():
            with transaction.get_connection().cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE mine (number integer)")

        def use_variable():
            with transaction.get_connection().cursor() as cursor:
                cursor.execute("INSERT INTO mine VALUES (1)")

        async with new_connection():
            await sync_to_async(set_variable)()
            await asyncio.gather(*(Entry.objects.acount() for _ in range(5)))
            await asyncio.to_thread(use_variable)

    async def test_opened_at_the_first_use(self):
        async with new_connection():
            self.assertIsNone(transaction.get_connection().connection)
            await Entry.objects.acount()
            used = transaction.get_connection()
            self.assertIsNotNone(used.connection)
        self.assertIsNone(used.connection)

    async def test_beside_a_block_of_the_paused_transaction(self):
        """Who is inside doesn't wait for it to be left."""
        inside = asyncio.Event()
        entered = asyncio.Event()

        async def count():
            async with new_connection():
                inside.set()
                await until(entered)
                return await Entry.objects.acount()

        async with transaction.aatomic():
            task = asyncio.create_task(count())
            await until(inside)
            async with transaction.aatomic():
                entered.set()
                self.assertEqual(await asyncio.wait_for(task, 5), 0)

    def test_copied_context_after_the_end(self):
        """A thread with a copy by hand isn't inside of a sync block around."""
        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")

        def block():
            with transaction.atomic():
                create("thread")

        def run_in(context):
            try:
                context.run(block)
            finally:
                connection.close()

        with self.assertRaises(Rollback), transaction.atomic():
            create("outer")
            with new_connection():
                context = contextvars.copy_context()
            thread = threading.Thread(target=run_in, args=[context])
            thread.start()
            thread.join()
            raise Rollback
        self.assertNames("thread")

    async def test_on_commit(self):
        called = []
        async with new_connection():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="a")
                transaction.on_commit(lambda: called.append("sync"))
            self.assertEqual(called, ["sync"])
        await self.assertAsyncNames("a")

    async def test_outliving_it(self):
        over = asyncio.Event()

        async def late():
            await until(over)
            await Entry.objects.acreate(name="late")

        async with new_connection():
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        over.set()
        with self.assertRaises(TransactionManagementError):
            await task
        await self.assertAsyncNames()

    async def test_blocks_of_who_outlives_a_nested_one(self):
        """They are inside of what's still open around that."""

        def session_of_a_block():
            with transaction.atomic():
                return session()

        async def late(over):
            await until(over)
            async with transaction.aatomic():
                sessions = {await sync_to_async(session)()}
            sessions.add(await sync_to_async(session_of_a_block)())
            sessions.add(await run_sync(session_of_a_block))
            return sessions

        async def outlive(block):
            over = asyncio.Event()
            async with block:
                task = asyncio.create_task(late(over))
                await asyncio.sleep(0)
            over.set()
            return await task

        async with new_connection():
            own = await sync_to_async(session)()
            self.assertEqual(await outlive(transaction.aatomic()), {own})
        async with transaction.aatomic():
            outer = await sync_to_async(session)()
            self.assertEqual(await outlive(new_connection()), {outer})

    async def test_left_by_exceptions_and_cancellation(self):
        with self.assertRaises(Rollback):
            async with new_connection():
                await Entry.objects.acreate(name="a")
                raise Rollback

        async def is_cancelled():
            async with new_connection():
                await Entry.objects.acreate(name="b")
                asyncio.current_task().cancel()
                await asyncio.sleep(1)

        with self.assertRaises(asyncio.CancelledError):
            await asyncio.create_task(is_cancelled())
        await self.assertAsyncNames("a", "b")

    async def test_unknown_alias(self):
        msg = "The connection 'unknown' doesn't exist."
        with self.assertRaisesMessage(ConnectionDoesNotExist, msg):
            async with new_connection("unknown"):
                self.fail("The block was entered.")

    async def test_decorator(self):
        @new_connection
        async def bare():
            return await sync_to_async(session)()

        @new_connection("default")
        def sync():
            return session()

        self.assertIs(inspect.iscoroutinefunction(bare), True)
        self.assertIs(inspect.iscoroutinefunction(sync), False)
        async with transaction.aatomic():
            outer = await sync_to_async(session)()
            self.assertNotEqual(await bare(), outer)
            self.assertNotEqual(await sync_to_async(sync)(), outer)

    def test_sync(self):
        # On SQLite, a transaction keeps others from writing.
        no_block = connection.vendor == "sqlite"
        with nullcontext() if no_block else transaction.atomic():
            outer = session()
            with new_connection():
                own = session()
                self.assertNotEqual(own, outer)
                with transaction.atomic(durable=True):
                    self.assertEqual(session(), own)
                    async_to_sync(names)()
                with new_connection():
                    self.assertNotEqual(session(), own)
            self.assertEqual(session(), outer)
            create("outer")
        self.assertNames("outer")


class OutlivedFailureTests(AsyncTransactionTestCase):
    """Promise 4: who has outlived a block that failed may open another one."""

    async def test_a_block_of_its_own(self):
        """Also if they are on the same connection."""

        def use_synchronously():
            with transaction.atomic():
                create("own block")
                Entry.objects.get(name="own block")
            with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
                create("late")

        def use_in_thread():
            try:
                use_synchronously()
            finally:
                connections.close_all()

        async def use():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="own block")
                await Entry.objects.aget(name="own block")
            with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
                await Entry.objects.acreate(name="late")

        uses = {
            "aatomic": use,
            "to_thread": partial(asyncio.to_thread, use_in_thread),
            "insensitive": sync_to_async(use_in_thread, thread_sensitive=False),
            "run_sync": partial(run_sync, use_synchronously),
        }
        blocks = {"nothing": nullcontext}
        if not is_in_memory():
            blocks["new_connection"] = partial(new_connection, "default")
        for around, block in blocks.items():
            for name, use in uses.items():
                with self.subTest(around=around, use=name):
                    async with block():
                        await self.outlive_failure(use)
                    await self.assertAsyncNames("own block")
                await Entry.objects.all().adelete()

    async def outlive_failure(self, use):
        over = asyncio.Event()

        async def late():
            await until(over)
            await use()

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                # Others than the task take turns on the connection.
                await asyncio.to_thread(create, "rolled back")
                task = asyncio.create_task(late())
                raise Rollback
        over.set()
        await task


class UnsupportedTests(AsyncTransactionTestCase):
    async def test_in_memory_database(self):
        if not is_in_memory():
            self.skipTest("Needs an in-memory database.")
        msg = "an in-memory SQLite database has but one connection."
        with self.assertRaisesMessage(NotSupportedError, msg):
            async with new_connection():
                self.fail("The block was entered.")
        await Entry.objects.acreate(name="usable")
        await self.assertAsyncNames("usable")


class TestCaseTests(TestCase):
    def test_refused(self):
        msg = (
            "new_connection() would escape the transaction of this TestCase. Use "
            "TransactionTestCase to test it."
        )
        with self.assertRaisesMessage(TransactionManagementError, msg):
            with new_connection():
                self.fail("The block was entered.")
        create("usable")
