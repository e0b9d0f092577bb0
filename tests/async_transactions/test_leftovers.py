"""
Promises 4 and 9: what blocks leave to the next one of their scope, and what
they don't.
"""

import asyncio
import gc
import threading
import weakref
from contextvars import Context, copy_context
from functools import partial

from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async

from django.db import connection, connections, new_connection, transaction
from django.db.life_cycle import request_scope
from django.db.transaction import TransactionManagementError

from .base import (
    AsyncTransactionTestCase,
    FreshConnectionsTestCase,
    names,
    wait_until,
)
from .models import Entry


class ThreadTests(FreshConnectionsTestCase):
    databases = {"default", "other"}

    def test_other_connections_of_the_thread_are_closed(self):
        """
        Nobody else could, for example if the server ends their sessions, while
        the thread waits for the next transaction.
        """

        def use_other():
            with connections["other"].cursor() as cursor:
                cursor.execute("SELECT 1")
            return connections["other"]

        async def block():
            async with transaction.aatomic():
                return await sync_to_async(use_other)()

        other = async_to_sync(block)()
        self.assertIs(wait_until(lambda: other.connection is None), True)


class CursorTests(FreshConnectionsTestCase):
    def setUp(self):
        super().setUp()
        Entry.objects.bulk_create([Entry(name="first"), Entry(name="second")])

    def open_cursor(self):
        cursor = connection.cursor()
        cursor.execute(f"SELECT name FROM {Entry._meta.db_table}")
        cursor.fetchone()
        return cursor

    async def test_a_cursor_of_an_earlier_block(self):
        """
        Promise 4: not all of its methods ask the connection, but none reaches
        the next block's session.
        """
        async with transaction.aatomic():
            cursor = await sync_to_async(self.open_cursor)()
        async with transaction.aatomic():
            await names()
            # The driver's, as others of its methods.
            execute = cursor.cursor.execute
            with self.assertRaises(connection.Database.Error):
                await sync_to_async(execute)("SELECT 1")

    async def test_a_cursor_of_new_connection(self):
        """A pool would hand on what it works on."""
        async with new_connection("default"):
            cursor = await sync_to_async(self.open_cursor)()
        if connection.vendor == "postgresql":
            self.assertIs(cursor.cursor.closed, True)
            return
        # The cursor is, rather than the connection alone.
        with self.assertRaisesMessage(connection.Database.Error, "cursor"):
            await sync_to_async(cursor.cursor.execute)("SELECT 1")

    async def test_what_an_abandoned_cursor_read(self):
        """On SQLite, the next block would see the database as it was then."""
        async with transaction.aatomic():
            cursor = await sync_to_async(self.open_cursor)()
        await Entry.objects.acreate(name="between")
        async with transaction.aatomic():
            await self.assertAsyncNames("between", "first", "second")
            await Entry.objects.acreate(name="inside")
        await self.assertAsyncNames("between", "first", "inside", "second")
        del cursor


class ConnectionTests(FreshConnectionsTestCase):
    """Promise 4: what refers to a block's connection gets no further."""

    async def assertRefused(self, func):
        with self.assertRaisesMessage(TransactionManagementError, "has ended"):
            await asyncio.to_thread(func)

    async def test_between_blocks(self):
        async with transaction.aatomic():
            await names()
            earlier = transaction.get_connection()
        for name, arguments in (
            ("set_autocommit", [False]),
            ("ensure_connection", []),
            ("cursor", []),
        ):
            with self.subTest(name):
                await self.assertRefused(partial(getattr(earlier, name), *arguments))
        # Not on a connection without autocommit, where it wouldn't commit.
        async with transaction.aatomic():
            await Entry.objects.acreate(name="committed")
        await self.assertAsyncNames("committed")

    async def test_in_the_next_block(self):
        async with transaction.aatomic():
            await names()
            earlier = transaction.get_connection()
            earlier.inc_thread_sharing()
        async with transaction.aatomic():
            await names()
            connection = transaction.get_connection()
            self.assertIsNot(connection, earlier)
            self.assertIs(connection.allow_thread_sharing, False)
            await self.assertRefused(earlier.cursor)


class CollectorTests(AsyncTransactionTestCase):
    def test_collected_while_an_executor_is_locked(self):
        """
        Promise 15: what a task that outlived its request leaves is released by
        the garbage collector, which may run inside of Executor.submit().
        """

        async def outlives(ended):
            await ended.wait()
            await sync_to_async(int)()
            return copy_context()

        async def request():
            ended = asyncio.Event()
            async with request_scope():
                task = asyncio.create_task(outlives(ended))
            ended.set()
            return await task

        # A context without what earlier tests have left.
        contexts = [Context().run(asyncio.run, request())]
        key = contexts[0][SyncToAsync.thread_sensitive_context]
        executors = [SyncToAsync.context_to_thread_executor[key]]
        # A function that's done, too, holds its context for a moment.
        executors[0].submit(int).result()
        closed = threading.Event()

        def collect():
            with executors[0]._shutdown_lock:
                contexts.clear()
                gc.collect()
            # The connections are closed in the executor's thread.
            weakref.finalize(executors[0], closed.set)

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        thread.join(10)
        self.assertIs(thread.is_alive(), False)
        del key
        executors.clear()
        gc.collect()
        self.assertIs(closed.wait(10), True)
