"""
Promise 1: no statement of a foreign execution reaches a transaction.
"""

import asyncio

from asgiref.sync import sync_to_async

from django.db import (
    IntegrityError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.db.transaction import TransactionManagementError
from django.dispatch import Signal

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
)
from .models import Entry


class IsolationTests(AsyncTransactionTestCase):
    async def test_running_task_is_foreign(self):
        inside = asyncio.Event()

        async def foreign():
            await until(inside)
            found = await names()
            await sync_to_async(create)("foreign, sync_to_async")
            await asyncio.to_thread(create_and_close, "foreign, to_thread")
            async with transaction.aatomic():
                await Entry.objects.acreate(name="foreign, own block")
            return found

        task = asyncio.create_task(foreign())
        await asyncio.sleep(0)
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="block")
                inside.set()
                await asyncio.sleep(0.2)
                self.assertEqual(await Entry.objects.filter(name="block").acount(), 1)
                raise Rollback
        self.assertEqual(await task, [])
        await self.assertAsyncNames(
            "foreign, own block", "foreign, sync_to_async", "foreign, to_thread"
        )

    async def test_running_task_is_foreign_to_a_warm_connection(self):
        """The connection that the parent task used isn't the transaction's."""
        await Entry.objects.acreate(name="before")

        async def block():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="block")
                raise Rollback

        results = await asyncio.gather(
            block(), Entry.objects.acreate(name="parallel"), return_exceptions=True
        )
        self.assertIsInstance(results[0], Rollback)
        await self.assertAsyncNames("before", "parallel")

    async def test_parent_is_foreign_to_a_child_task(self):
        inside = asyncio.Event()
        leave = asyncio.Event()

        async def child():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="child")
                inside.set()
                await until(leave)
                raise Rollback

        task = asyncio.create_task(child())
        await until(inside)
        query = asyncio.create_task(names())
        await asyncio.wait([query], timeout=0.2)
        # An in-memory database has but one connection.
        self.assertIs(query.done(), not is_in_memory())
        leave.set()
        with self.assertRaises(Rollback):
            await task
        self.assertEqual(await query, [])
        await Entry.objects.acreate(name="parent")
        await self.assertAsyncNames("parent")

    async def test_rollback_of_one_while_others_commit(self):
        async def block(number):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"{number}")
                await asyncio.sleep(0)
                await Entry.objects.acreate(name=f"{number} again")
                if number % 3 == 0:
                    raise Rollback

        results = await asyncio.gather(
            *(block(number) for number in range(12)), return_exceptions=True
        )
        self.assertEqual(
            [isinstance(result, Rollback) for result in results],
            [number % 3 == 0 for number in range(12)],
        )
        self.assertEqual(await Entry.objects.acount(), 16)
        self.assertIs(await Entry.objects.filter(name="3").aexists(), False)

    async def test_interleaved_savepoints_in_many_tasks(self):
        async def block(number):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"{number} outer")
                for inner in range(3):
                    try:
                        async with transaction.aatomic():
                            await Entry.objects.acreate(name=f"{number} {inner}")
                            await asyncio.sleep(0)
                            if inner == number % 3:
                                raise Rollback
                    except Rollback:
                        pass

        await asyncio.gather(*(block(number) for number in range(9)))
        expected = [f"{number} outer" for number in range(9)] + [
            f"{number} {inner}"
            for number in range(9)
            for inner in range(3)
            if inner != number % 3
        ]
        await self.assertAsyncNames(*expected)

    async def test_lock_waits_do_not_starve_the_holder(self):
        """
        Fifty tasks wait for one row's lock, each in its own thread, so that
        the holder can go on.
        """
        if not connection.features.has_select_for_update:
            self.skipTest("Needs row locks.")
        await Entry.objects.acreate(name="counter")

        async def increment():
            async with transaction.aatomic():
                entry = await Entry.objects.select_for_update().aget(name="counter")
                await asyncio.sleep(0)
                entry.count += 1
                await entry.asave()

        await asyncio.wait_for(asyncio.gather(*(increment() for _ in range(50))), 60)
        self.assertEqual((await Entry.objects.aget()).count, 50)

    async def test_foreign_connection_object_is_refused(self):
        """A connection handed out of its transaction refuses to work."""
        if is_in_memory():
            self.skipTest("An in-memory database has but one connection.")
        handed = asyncio.get_running_loop().create_future()

        def use(connection):
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")

        async def foreign():
            return await sync_to_async(use)(await handed)

        task = asyncio.create_task(foreign())
        await asyncio.sleep(0)
        async with transaction.aatomic():
            handed.set_result(transaction.get_connection())
            msg = "can't use this connection to the database 'default'"
            with self.assertRaisesMessage(TransactionManagementError, msg):
                await task
            await Entry.objects.acreate(name="block")
        await self.assertAsyncNames("block")

    async def test_tasks_sharing_a_context(self):
        """
        Receivers of asend() run in tasks with one context. Neither is inside
        the block of the other.
        """
        signal = Signal()
        both = asyncio.Barrier(2)

        async def commits(**kwargs):
            async with transaction.aatomic():
                await wait_at(both)
                await Entry.objects.acreate(name="committed")
                await sync_to_async(create)("committed, sync")
                await asyncio.sleep(0.05)

        async def rolls_back(**kwargs):
            async with transaction.aatomic():
                await wait_at(both)
                await Entry.objects.acreate(name="rolled back")
                await sync_to_async(create)("rolled back, sync")
                raise Rollback

        async def wait_at(barrier):
            # On SQLite, transactions that write follow each other.
            if connection.vendor != "sqlite":
                await until(barrier)

        signal.connect(commits)
        signal.connect(rolls_back)
        results = dict(await signal.asend_robust(self))
        self.assertIsInstance(results[rolls_back], Rollback)
        await self.assertAsyncNames("committed", "committed, sync")
        # The sender's context is left as it was.
        await Entry.objects.acreate(name="sender")
        await asyncio.create_task(Entry.objects.acreate(name="sender's task"))


class ResourceTests(AsyncTransactionTestCase):
    async def test_the_thread_is_idle_after_the_block(self):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="one")
            self.assertEqual(len(transaction_threads()), 0 if is_native() else 1)
        await asyncio.sleep(0.05)
        self.assertEqual(transaction_threads(), [])

    async def test_that_is_so_on_every_path(self):
        async def commits():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="committed")

        async def raises():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="raised")
                raise Rollback

        async def breaks():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="committed")

        async def is_cancelled():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="cancelled")
                asyncio.current_task().cancel()
                await asyncio.sleep(1)

        await commits()
        for failing, exception in (
            (raises, Rollback),
            (breaks, IntegrityError),
            (is_cancelled, asyncio.CancelledError),
        ):
            with self.subTest(failing.__name__):
                with self.assertRaises(exception):
                    await asyncio.create_task(failing())
        await self.assertAsyncNames("committed")

    async def test_cancelled_while_entering(self):
        async def block():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="never")
                await asyncio.sleep(10)

        for steps in range(12):
            with self.subTest(steps=steps):
                task = asyncio.create_task(block())
                for _ in range(steps):
                    await asyncio.sleep(0.0005)
                task.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await task
        await self.assertAsyncNames()

    async def test_cancelled_while_leaving(self):
        """COMMIT runs to its end, and then the cancellation is raised."""
        called = []

        async def block(name):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=name)
                transaction.on_commit(lambda: called.append(name))
                asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)

        with self.assertRaises(asyncio.CancelledError):
            await asyncio.create_task(block("committed"))
        await self.assertAsyncNames("committed")
        self.assertEqual(called, ["committed"])

    async def test_failure_to_connect(self):
        if connection.vendor not in ("postgresql", "mysql"):
            self.skipTest("Needs a server that can refuse.")
        settings = connections.settings["default"]
        host, settings["HOST"] = settings["HOST"], "/nowhere"
        try:
            with self.assertRaises(OperationalError):
                async with transaction.aatomic():
                    self.fail("The block was entered.")
        finally:
            settings["HOST"] = host
        await Entry.objects.acreate(name="outside")
        await self.assertAsyncNames("outside")
