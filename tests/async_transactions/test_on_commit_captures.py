"""
Promise 16: captureOnCommitCallbacks() and acaptureOnCommitCallbacks() see what
asynchronous code registers. assertNumQueries() refuses to call it.
"""

import threading

from asgiref.sync import sync_to_async

from django.db import transaction
from django.test import TestCase

from .base import Rollback, acreate, create
from .models import Entry


class CaptureOnCommitCallbacksTests(TestCase):
    def setUp(self):
        self.called = []

    def call(self):
        self.called.append(threading.current_thread())

    async def acall(self):
        await acreate(f"callback {len(self.called)}")
        self.called.append("async")

    async def test_captured(self):
        with self.captureOnCommitCallbacks() as callbacks:
            async with transaction.aatomic():
                transaction.on_commit(self.call)
                await transaction.aon_commit(self.call)
            await sync_to_async(transaction.on_commit)(self.call)
        self.assertEqual(callbacks, [self.call] * 3)
        self.assertEqual(self.called, [])

    async def test_start_inside_a_block(self):
        async with transaction.aatomic():
            transaction.on_commit(self.acall)
            with self.captureOnCommitCallbacks() as callbacks:
                transaction.on_commit(self.call)
                async with transaction.aatomic():
                    transaction.on_commit(self.call)
        self.assertEqual(callbacks, [self.call] * 2)

    async def test_rolled_back(self):
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            try:
                async with transaction.aatomic():
                    transaction.on_commit(self.call)
                    raise Rollback
            except Rollback:
                pass
        self.assertEqual(callbacks, [])
        self.assertEqual(self.called, [])

    async def test_execute(self):
        with self.captureOnCommitCallbacks(execute=True):
            async with transaction.aatomic():
                transaction.on_commit(self.call)
        self.assertEqual(self.called, [threading.current_thread()])

    async def test_execute_coroutine_function(self):
        msg = "Use acaptureOnCommitCallbacks() instead."
        with self.assertRaisesMessage(RuntimeError, msg):
            with self.captureOnCommitCallbacks(execute=True):
                transaction.on_commit(self.acall, robust=True)

    def test_execute_coroutine_function_in_sync_code(self):
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            transaction.on_commit(self.acall)
        self.assertEqual(len(callbacks), 1)
        self.assertEqual(self.called, ["async"])
        self.assertIs(Entry.objects.filter(name="callback 0").exists(), True)

    async def test_async_execute(self):
        """Functions may use the database, coroutine functions are awaited."""

        def use_database():
            create("function")
            transaction.on_commit(self.acall)

        async with self.acaptureOnCommitCallbacks(execute=True) as callbacks:
            async with transaction.aatomic():
                transaction.on_commit(use_database)
                await transaction.aon_commit(self.acall)
            self.assertEqual(callbacks, [])
        self.assertEqual(callbacks, [use_database, self.acall, self.acall])
        self.assertEqual(self.called, ["async"] * 2)
        self.assertEqual(await Entry.objects.acount(), 3)

    async def test_async_capture_only(self):
        async with self.acaptureOnCommitCallbacks() as callbacks:
            transaction.on_commit(self.acall)
        self.assertEqual(callbacks, [self.acall])
        self.assertEqual(self.called, [])
        await callbacks[0]()
        self.assertEqual(self.called, ["async"])

    async def test_async_failure(self):
        async def fail():
            raise Rollback

        with self.assertRaises(Rollback):
            async with self.acaptureOnCommitCallbacks(execute=True):
                transaction.on_commit(fail)
                transaction.on_commit(self.acall)
        self.assertEqual(self.called, [])

    async def test_async_robust(self):
        async def fail():
            raise Rollback("failure")

        msg = f"Error calling {fail.__qualname__} in on_commit() (failure)."
        with self.assertLogs("django.db.backends.base", "ERROR") as cm:
            async with self.acaptureOnCommitCallbacks(execute=True):
                transaction.on_commit(fail, robust=True)
                transaction.on_commit(self.acall)
        self.assertEqual([record.getMessage() for record in cm.records], [msg])
        self.assertEqual(self.called, ["async"])

    async def test_queries_of_callbacks(self):
        with self.assertNumQueries(1):
            async with self.acaptureOnCommitCallbacks(execute=True):
                transaction.on_commit(self.acall)


class AssertNumQueriesTests(TestCase):
    def test_coroutine_function(self):
        msg = "assertNumQueries() can't call a coroutine function."
        with self.assertRaisesMessage(TypeError, msg):
            self.assertNumQueries(1, acreate, "a")
