"""
Promises 2, 3 and 4 for atomic(): asynchronous code that's called in a block is
inside of it, takes turns there, and goes on in autocommit after its end.
"""

import asyncio
import threading

from asgiref.sync import async_to_sync, sync_to_async

from django.db import transaction

from .base import AsyncTransactionTestCase, Rollback, acreate, create, until
from .models import Entry


class SyncBlockTestCase(AsyncTransactionTestCase):
    def assertInside(self, work, *expected):
        with self.assertRaises(Rollback):
            with transaction.atomic():
                work()
                self.assertNames(*expected)
                raise Rollback
        self.assertNames()
        with transaction.atomic():
            work()
        self.assertNames(*expected)


class SyncBlockTests(SyncBlockTestCase):
    async def everything(self):
        await acreate("async")
        await sync_to_async(create)("sensitive")
        await sync_to_async(create, thread_sensitive=False)("insensitive")
        await asyncio.to_thread(create, "to_thread")
        await asyncio.gather(acreate("gather 1"), acreate("gather 2"))

    expected = [
        "async",
        "gather 1",
        "gather 2",
        "insensitive",
        "sensitive",
        "to_thread",
    ]

    def test_async_to_sync(self):
        self.assertInside(lambda: async_to_sync(self.everything)(), *self.expected)

    def test_asyncio_run(self):
        self.assertInside(lambda: asyncio.run(self.everything()), *self.expected)

    def test_to_thread_alone(self):
        """No coroutine has touched the database before the thread does."""

        async def main():
            await asyncio.to_thread(create, "thread")

        self.assertInside(lambda: asyncio.run(main()), "thread")
        Entry.objects.all().delete()
        self.assertInside(lambda: async_to_sync(main)(), "thread")

    def test_nested_sync_blocks(self):
        async def main():
            def block():
                with transaction.atomic():
                    create("b")

            await asyncio.gather(
                asyncio.to_thread(block),
                sync_to_async(create)("a"),
                sync_to_async(create, thread_sensitive=False)("c"),
            )

        self.assertInside(lambda: async_to_sync(main)(), *"abc")

    def test_on_commit(self):
        called = []

        async def main():
            transaction.on_commit(lambda: called.append("coroutine"))
            await asyncio.to_thread(
                transaction.on_commit, lambda: called.append("thread")
            )

        with transaction.atomic():
            async_to_sync(main)()
            self.assertEqual(called, [])
        self.assertEqual(called, ["coroutine", "thread"])

    def test_after_its_end_work_goes_on_in_autocommit(self):
        async def main():
            over = asyncio.Event()

            async def late():
                await until(over)
                await acreate("late")

            async def start():
                return asyncio.create_task(late())

            def block():
                with transaction.atomic():
                    return async_to_sync(start)()

            task = await sync_to_async(block)()
            over.set()
            await task

        async_to_sync(main)()
        self.assertNames("late")


class SyncBlockTurnTests(AsyncTransactionTestCase):
    def nested(self, entered, may_end):
        with transaction.atomic():
            create("rolled back")
            entered.set()
            may_end.wait(10)
            raise Rollback

    async def siblings(self, sibling):
        """Call `sibling` while a nested block is open in a thread."""
        entered, may_end = threading.Event(), threading.Event()
        task = asyncio.create_task(asyncio.to_thread(self.nested, entered, may_end))
        await asyncio.to_thread(entered.wait, 10)
        asyncio.get_running_loop().call_later(0.1, may_end.set)
        try:
            await sibling()
        finally:
            may_end.set()
            with self.assertRaises(Rollback):
                await task

    def test_others_wait_for_a_nested_block(self):
        """Nothing is rolled back with a sibling's savepoint."""
        for call in (
            lambda: asyncio.to_thread(create, "a"),
            lambda: sync_to_async(create)("a"),
            lambda: sync_to_async(create, thread_sensitive=False)("a"),
        ):
            with transaction.atomic():
                async_to_sync(self.siblings)(call)
                self.assertNames("a")
                transaction.set_rollback(True)
