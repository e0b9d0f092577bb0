"""
Promise 2: what's started between set_autocommit(False) and its end, in
synchronous code, is inside that transaction.
"""

import asyncio

from asgiref.sync import async_to_sync

from django.db import IntegrityError, connection, transaction

from .base import AsyncTransactionTestCase, Rollback, create, is_in_memory
from .models import Entry


async def use_blocks():
    # On SQLite, this begins the transaction. A savepoint would be its own.
    await Entry.objects.acreate(name="method")
    async with transaction.aatomic():
        await Entry.objects.acreate(name="block")
    await asyncio.to_thread(create, "thread")
    try:
        async with transaction.aatomic():
            await Entry.objects.acreate(name="rolled back")
            raise Rollback
    except Rollback:
        pass


class ManualSyncTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(transaction.set_autocommit, True)
        self.addCleanup(transaction.rollback)
        transaction.set_autocommit(False)

    def run_and_end(self, run, end):
        run()
        self.assertIs(transaction.get_autocommit(), False)
        end()
        transaction.set_autocommit(True)
        self.assertEqual(connection.blocks, [])

    def test_rollback(self):
        for run in (async_to_sync(use_blocks), lambda: asyncio.run(use_blocks())):
            with self.subTest(run=run):
                transaction.set_autocommit(False)
                self.run_and_end(run, transaction.rollback)
                self.assertNames()

    def test_commit(self):
        self.run_and_end(async_to_sync(use_blocks), transaction.commit)
        self.assertNames("block", "method", "thread")

    def test_several_transactions(self):
        async_to_sync(use_blocks)()
        transaction.rollback()
        async_to_sync(use_blocks)()
        transaction.commit()
        transaction.set_autocommit(True)
        self.assertNames("block", "method", "thread")

    def test_atomic_inside(self):
        create("first")
        with transaction.atomic():
            async_to_sync(use_blocks)()
            with self.assertRaises(IntegrityError), transaction.atomic():
                create("block")
        self.run_and_end(lambda: None, transaction.rollback)
        self.assertNames()

    def test_connection_closed_inside(self):
        if is_in_memory():
            self.skipTest("Closing it would destroy the database.")
        create("lost")
        connection.close()
        self.assertNames()
        self.assertEqual(connection.blocks, [])
        self.check_blocks_are_transactions()

    def test_afterwards(self):
        transaction.set_autocommit(True)
        self.check_blocks_are_transactions()

    def check_blocks_are_transactions(self):
        async def fail():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="committed")
            await Entry.objects.acreate(name="autocommit")
            raise Rollback

        with self.assertRaises(Rollback):
            async_to_sync(fail)()
        transaction.set_autocommit(True)
        self.assertNames("autocommit", "committed")

    def test_changed_inside(self):
        """By asynchronous code, which uses the same connection."""

        async def commit():
            await use_blocks()
            await transaction.acommit()
            await transaction.aset_autocommit(True)

        async_to_sync(commit)()
        self.assertIs(transaction.get_autocommit(), True)
        self.assertEqual(connection.blocks, [])
        self.assertNames("block", "method", "thread")
