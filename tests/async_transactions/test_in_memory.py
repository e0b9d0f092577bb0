"""
Promise 1: an in-memory SQLite database has but one connection, whichever
blocks for other databases a transaction is in.
"""

import asyncio

from django.db.transaction import aatomic

from .base import AsyncTransactionTestCase, is_in_memory, until
from .models import Entry


class BlocksOfSeveralDatabasesTests(AsyncTransactionTestCase):
    databases = {"default", "other"}

    def setUp(self):
        super().setUp()
        if not is_in_memory():
            self.skipTest("Blocks have connections of their own.")

    async def test_foreign_work_waits(self):
        entered, waiting = asyncio.Event(), asyncio.Event()

        async def work():
            await until(entered)
            waiting.set()
            await Entry.objects.acreate(name="foreign")

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        async with aatomic("other"):
            async with aatomic():
                await Entry.objects.acreate(name="inside")
                entered.set()
                await until(waiting)
                await Entry.objects.aget(name="inside")
                self.assertIs(task.done(), False)
        await task
        await self.assertAsyncNames("foreign", "inside")
