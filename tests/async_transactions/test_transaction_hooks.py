"""
Promise 6: on_commit() works in asynchronous blocks as in synchronous ones.

Each assertion of Django's tests/transaction_hooks about the synchronous API is
made here about the asynchronous one.
"""

import asyncio
from functools import partial

from asgiref.sync import async_to_sync, sync_to_async

from django.db import connection, transaction
from django.db.transaction import TransactionManagementError
from django.test import skipUnlessDBFeature

from .base import AsyncTransactionTestCase, Rollback, is_in_memory
from .models import Entry


class OnCommitTests:
    """
    The tests, for a way to register callbacks and for one kind of callback.

    What is written shows that it matches what is called.
    """

    def setUp(self):
        super().setUp()
        self.notified = []

    async def on_commit(self, func, robust=False):
        raise NotImplementedError

    def pick(self, func, coroutine_function):
        """Return the callback to register."""
        raise NotImplementedError

    def notify(self, number):
        self.notified.append(number)

    async def anotify(self, number):
        await asyncio.sleep(0)
        self.notified.append(number)

    async def do(self, number):
        """Write an entry and notify about it."""
        await Entry.objects.acreate(name=f"{number}", count=number)
        await self.on_commit(
            self.pick(lambda: self.notify(number), partial(self.anotify, number))
        )

    async def assertDone(self, numbers):
        self.assertEqual(self.notified, numbers)
        stored = [entry.count async for entry in Entry.objects.order_by("count")]
        self.assertEqual(stored, sorted(numbers))

    async def test_called_immediately_outside_of_transactions(self):
        await self.do(1)
        await self.assertDone([1])

    def failing_callback(self):
        def sync_callback():
            raise Rollback("robust callback")

        async def callback():
            await asyncio.sleep(0)
            raise Rollback("robust callback")

        return self.pick(sync_callback, callback)

    def assertLogged(self, record, message):
        self.assertEqual(record.getMessage(), message)
        self.assertIsNotNone(record.exc_info)
        exc = record.exc_info[1]
        self.assertIsInstance(exc, Rollback)
        self.assertEqual(str(exc), "robust callback")

    async def check_robust_outside(self, callback, name):
        with self.assertLogs("django.db.backends.base", "ERROR") as cm:
            await self.on_commit(callback, robust=True)
            await self.do(1)
        await self.assertDone([1])
        self.assertLogged(
            cm.records[0], f"Error calling {name} in on_commit() (robust callback)."
        )

    async def test_robust_outside_of_transactions(self):
        callback = self.failing_callback()
        await self.check_robust_outside(callback, callback.__qualname__)

    async def test_robust_partial_outside_of_transactions(self):
        callback = partial(self.failing_callback())
        await self.check_robust_outside(callback, callback)

    async def check_robust(self, callback, name):
        with self.assertLogs("django.db.backends", "ERROR") as cm:
            async with transaction.aatomic():
                await self.on_commit(callback, robust=True)
                await self.do(1)
        await self.assertDone([1])
        self.assertLogged(
            cm.records[0],
            f"Error calling {name} in on_commit() during transaction "
            "(robust callback).",
        )

    async def test_robust(self):
        callback = self.failing_callback()
        await self.check_robust(callback, callback.__qualname__)

    async def test_robust_partial(self):
        callback = partial(self.failing_callback())
        await self.check_robust(callback, callback)

    async def test_called_after_the_commit(self):
        async with transaction.aatomic():
            await self.do(1)
            self.assertEqual(self.notified, [])
        await self.assertDone([1])

    async def test_not_called_after_a_rollback(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await self.do(1)
                raise Rollback
        await self.assertDone([])

    async def test_called_after_the_outermost_commit_only(self):
        async with transaction.aatomic():
            async with transaction.aatomic():
                await self.do(1)
                self.assertEqual(self.notified, [])
            self.assertEqual(self.notified, [])
        await self.assertDone([1])

    async def test_discarded_with_a_savepoint(self):
        async with transaction.aatomic():
            async with transaction.aatomic():
                await self.do(1)
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    await self.do(2)
                    raise Rollback
            async with transaction.aatomic():
                await self.do(3)
        await self.assertDone([1, 3])

    async def test_discarded_with_the_outer_block(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                async with transaction.aatomic():
                    await self.do(1)
                raise Rollback
        await self.assertDone([])

    async def test_inner_savepoint_rolled_back_with_outer(self):
        async with transaction.aatomic():
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    async with transaction.aatomic():
                        await self.do(1)
                    raise Rollback
            await self.do(2)
        await self.assertDone([2])

    async def test_discarded_with_a_merged_block(self):
        async with transaction.aatomic():
            async with transaction.aatomic():
                await self.do(1)
                with self.assertRaises(Rollback):
                    async with transaction.aatomic(savepoint=False):
                        raise Rollback
        await self.assertDone([])

    async def test_inner_savepoint_does_not_affect_outer(self):
        async with transaction.aatomic():
            async with transaction.aatomic():
                await self.do(1)
                with self.assertRaises(Rollback):
                    async with transaction.aatomic():
                        raise Rollback
        await self.assertDone([1])

    async def test_called_in_order(self):
        async with transaction.aatomic():
            await self.do(1)
            async with transaction.aatomic():
                await self.do(2)
            await self.do(3)
        await self.assertDone([1, 2, 3])

    async def test_forgotten_after_a_commit(self):
        for number in (1, 2):
            async with transaction.aatomic():
                await self.do(number)
        await self.assertDone([1, 2])

    async def test_forgotten_after_a_rollback(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await self.do(1)
                raise Rollback
        async with transaction.aatomic():
            await self.do(2)
        await self.assertDone([2])

    async def test_forgotten_with_a_closed_connection(self):
        if is_in_memory():
            self.skipTest("Closing the connection would destroy the database.")
        async with transaction.aatomic():
            await self.do(1)
            await sync_to_async(connection.close)()
        async with transaction.aatomic():
            await self.do(2)
        await self.assertDone([2])

    async def test_forgotten_after_an_error_in_one(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await self.on_commit(self.failing_callback())
                await self.on_commit(self.pick(self.fail, self.anotify))
        async with transaction.aatomic():
            await self.do(1)
        await self.assertDone([1])

    async def test_query_in_a_callback(self):
        def sync_callback():
            for entry in Entry.objects.all():
                self.notify(entry.count)

        async def callback():
            async for entry in Entry.objects.all():
                await self.anotify(entry.count)

        async with transaction.aatomic():
            await Entry.objects.acreate(count=1)
            await self.on_commit(self.pick(sync_callback, callback))
        await self.assertDone([1])

    async def test_transaction_in_a_callback(self):
        def sync_callback():
            with transaction.atomic(durable=True):
                self.notify(Entry.objects.create(count=1).count)

        async def callback():
            async with transaction.aatomic(durable=True):
                self.notify((await Entry.objects.acreate(count=1)).count)

        async with transaction.aatomic():
            await self.on_commit(self.pick(sync_callback, callback))
        await self.assertDone([1])

    async def test_registered_by_a_callback(self):
        def sync_callback(number, register):
            with transaction.atomic():
                if register:
                    transaction.on_commit(partial(sync_callback, number + 10, False))
                Entry.objects.create(name=f"{number}", count=number)
                self.notify(number)

        async def callback(number, register):
            async with transaction.aatomic():
                if register:
                    await self.on_commit(partial(callback, number + 10, False))
                await Entry.objects.acreate(name=f"{number}", count=number)
                await self.anotify(number)

        func = self.pick(sync_callback, callback)
        async with transaction.aatomic():
            await self.on_commit(partial(func, 1, True))
            await self.on_commit(partial(func, 2, True))
        await self.assertDone([1, 11, 2, 12])

    async def test_refused_in_a_manual_transaction(self):
        msg = "on_commit() cannot be used in manual transaction management"
        await transaction.aset_autocommit(False)
        try:
            with self.assertRaisesMessage(TransactionManagementError, msg):
                await self.on_commit(self.pick(self.fail, self.anotify))
        finally:
            await transaction.aset_autocommit(True)

    async def test_not_callable(self):
        msg = "on_commit()'s callback must be a callable."
        with self.assertRaisesMessage(TypeError, msg):
            await self.on_commit(None)
        async with transaction.aatomic():
            with self.assertRaisesMessage(TypeError, msg):
                await self.on_commit(None)


class Functions:
    def pick(self, func, coroutine_function):
        return func


class CoroutineFunctions:
    def pick(self, func, coroutine_function):
        return coroutine_function


class AonCommit:
    async def on_commit(self, func, robust=False):
        await transaction.aon_commit(func, robust=robust)


class OnCommit:
    async def on_commit(self, func, robust=False):
        if connection.in_atomic_block:
            transaction.on_commit(func, robust=robust)
        else:
            # It queries the database.
            await sync_to_async(transaction.on_commit)(func, robust=robust)


@skipUnlessDBFeature("supports_transactions", "uses_savepoints")
class AonCommitFunctionTests(
    Functions, AonCommit, OnCommitTests, AsyncTransactionTestCase
):
    pass


@skipUnlessDBFeature("supports_transactions", "uses_savepoints")
class AonCommitCoroutineFunctionTests(
    CoroutineFunctions, AonCommit, OnCommitTests, AsyncTransactionTestCase
):
    pass


@skipUnlessDBFeature("supports_transactions", "uses_savepoints")
class OnCommitFunctionTests(
    Functions, OnCommit, OnCommitTests, AsyncTransactionTestCase
):
    pass


@skipUnlessDBFeature("supports_transactions", "uses_savepoints")
class OnCommitCoroutineFunctionTests(
    CoroutineFunctions, OnCommit, OnCommitTests, AsyncTransactionTestCase
):
    pass


@skipUnlessDBFeature("supports_transactions")
class CoroutineFunctionsInSyncBlocksTests(AsyncTransactionTestCase):
    """Synchronous code may register coroutine functions as well."""

    def setUp(self):
        super().setUp()
        self.called = []

    async def callback(self):
        await Entry.objects.acreate(name="callback")
        self.called.append(connection.in_atomic_block)

    def test_called_after_the_commit(self):
        with transaction.atomic():
            transaction.on_commit(self.callback)
            self.assertEqual(self.called, [])
        self.assertEqual(self.called, [False])
        self.assertNames("callback")

    def test_called_immediately_outside_of_transactions(self):
        transaction.on_commit(self.callback)
        self.assertEqual(self.called, [False])
        self.assertNames("callback")

    def test_not_called_after_a_rollback(self):
        with self.assertRaises(Rollback), transaction.atomic():
            transaction.on_commit(self.callback)
            raise Rollback
        self.assertEqual(self.called, [])

    def test_robust(self):
        async def fail():
            raise Rollback("robust")

        with self.assertLogs("django.db.backends", "ERROR") as cm:
            with transaction.atomic():
                transaction.on_commit(fail, robust=True)
                transaction.on_commit(self.callback)
            transaction.on_commit(fail, robust=True)
        self.assertEqual(self.called, [False])
        self.assertEqual(
            [record.getMessage() for record in cm.records],
            [
                f"Error calling {fail.__qualname__} in on_commit() during transaction "
                "(robust).",
                f"Error calling {fail.__qualname__} in on_commit() (robust).",
            ],
        )

    def test_object_with_an_asynchronous_call(self):
        class Callback:
            async def __call__(callback):
                self.called.append("object")

        with transaction.atomic():
            transaction.on_commit(Callback())
        transaction.on_commit(Callback())
        self.assertEqual(self.called, ["object", "object"])

    def test_registered_across_colours(self):
        """By asynchronous code in a synchronous block, called at its end."""

        async def register():
            async with transaction.aatomic():
                await transaction.aon_commit(self.callback)
            self.assertEqual(self.called, [])

        with transaction.atomic():
            async_to_sync(register)()
            self.assertEqual(self.called, [])
        self.assertEqual(self.called, [False])
