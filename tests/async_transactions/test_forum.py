"""
The questions that users asked on Django's forum.
"""

import asyncio
import threading

from asgiref.sync import async_to_sync, sync_to_async

from django.db import DEFAULT_DB_ALIAS, IntegrityError, connections, transaction

from .base import AsyncTransactionTestCase, Rollback, create, names, until
from .models import Entry


class ForumQuestionTests(AsyncTransactionTestCase):
    async def test_1_synchronous_connections_serve_asynchronous_code(self):
        """
        Are synchronous connections a design decision, or just not
        implemented? The one connection class serves both colours of code.
        """
        async with transaction.aatomic():
            block_connection = transaction.get_connection()
            self.assertIs(
                type(block_connection),
                type(connections.create_connection(DEFAULT_DB_ALIAS)),
            )
            await Entry.objects.acreate(name="async")
            await sync_to_async(create)("sync")
            self.assertIs(
                await sync_to_async(transaction.get_connection)(), block_connection
            )
        await self.assertAsyncNames("async", "sync")

    async def test_2_a_transaction_is_not_bound_to_a_thread(self):
        """
        Why are connections bound to threads when psycopg's are thread-safe? A
        transaction's connection isn't, it follows the code.
        """
        threads = set()

        def work(name):
            threads.add(threading.get_ident())
            create(name)
            return transaction.get_connection()

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                used = {
                    await sync_to_async(work)("sensitive"),
                    await sync_to_async(work, thread_sensitive=False)("insensitive"),
                    await asyncio.to_thread(work, "to_thread"),
                }
                self.assertEqual(len(await names()), 3)
                raise Rollback
        self.assertGreater(len(threads), 1)
        self.assertEqual(len(used), 1)
        await self.assertAsyncNames()

    def test_3_an_event_loop_started_in_a_sync_block_is_inside(self):
        """
        Is it safe to enter an atomic block in a sync function and then start
        an event loop within it? Does the async code respect the block?
        """

        async def main():
            await Entry.objects.acreate(name="started")
            self.assertEqual(await names(), ["started", "sync"])

        with self.assertRaises(Rollback):
            with transaction.atomic():
                create("sync")
                asyncio.run(main())
                raise Rollback
        self.assertNames()
        with transaction.atomic():
            create("sync")
            asyncio.run(main())
        self.assertNames("started", "sync")

    def test_3_async_to_sync_in_a_sync_block_is_inside(self):
        """Does it work through async_to_sync?"""

        async def main():
            await Entry.objects.acreate(name="started")
            await asyncio.to_thread(create, "thread")
            self.assertEqual(await names(), ["started", "sync", "thread"])

        with self.assertRaises(Rollback):
            with transaction.atomic():
                create("sync")
                async_to_sync(main)()
                raise Rollback
        self.assertNames()

    async def test_4_aatomic_is_the_wrapped_atomic_done_right(self):
        """
        Does an Atomic subclass behave whose asynchronous methods wrap
        __enter__ and __exit__ in sync_to_async? aatomic() keeps what that
        can't: two blocks at once don't mix.
        """
        entered = asyncio.Event()
        other_created = asyncio.Event()

        async def commits():
            await until(entered)
            async with transaction.aatomic():
                await Entry.objects.acreate(name="committed")
            other_created.set()

        async def rolls_back():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                entered.set()
                await asyncio.sleep(0.05)
                raise Rollback

        results = await asyncio.gather(commits(), rolls_back(), return_exceptions=True)
        self.assertIsInstance(results[1], Rollback)
        self.assertIs(other_created.is_set(), True)
        await self.assertAsyncNames("committed")

    async def _race(self, fail):
        """
        Task 1 starts first and touches the database. It wakes up between the
        question whether a row exists and its creation.
        """
        asked = asyncio.Event()
        seen = []

        async def task_1():
            await Entry.objects.aexists()
            await until(asked)
            for attempt in range(3):
                seen.append(await Entry.objects.filter(name="block").aexists())
                await Entry.objects.acreate(name=f"task 1, {attempt}")
                await asyncio.sleep(0)

        task = asyncio.create_task(task_1())
        await asyncio.sleep(0)
        try:
            async with transaction.aatomic():
                if not await Entry.objects.filter(name="block").aexists():
                    asked.set()
                    await asyncio.sleep(0.1)
                    await Entry.objects.acreate(name="block")
                    await asyncio.sleep(0.1)
                    others = await Entry.objects.exclude(name="block").acount()
                    if fail:
                        raise Rollback
        except Rollback:
            pass
        await task
        return seen, others

    async def test_5_the_race(self):
        """
        Task 1 works on another connection: the block's rollback doesn't touch
        what it wrote, and it never sees what's not committed.
        """
        seen, _ = await self._race(fail=True)
        self.assertEqual(seen, [False] * 3)
        await self.assertAsyncNames("task 1, 0", "task 1, 1", "task 1, 2")

    async def test_5_the_race_with_a_commit(self):
        await self._race(fail=False)
        await self.assertAsyncNames("block", "task 1, 0", "task 1, 1", "task 1, 2")

    async def test_5_check_then_create_by_fifty_tasks(self):
        """One creates the row. Every other sees it, or gets IntegrityError."""

        async def check_then_create():
            try:
                async with transaction.aatomic():
                    if await Entry.objects.filter(name="one").aexists():
                        return "seen"
                    await asyncio.sleep(0)
                    await Entry.objects.acreate(name="one")
                    return "created"
            except IntegrityError:
                return "refused"

        results = await asyncio.gather(*(check_then_create() for _ in range(50)))
        self.assertEqual(results.count("created"), 1)
        self.assertEqual(results.count("seen") + results.count("refused"), 49)
        await self.assertAsyncNames("one")
