"""
Promise 6: aatomic() does what atomic() does.
"""

import asyncio
import inspect

from asgiref.sync import sync_to_async

from django.db import (
    DatabaseError,
    Error,
    IntegrityError,
    OperationalError,
    connection,
    transaction,
)
from django.db.transaction import TransactionManagementError

from .base import AsyncTransactionTestCase, Rollback, is_in_memory
from .models import Entry


class AsyncAtomicTests(AsyncTransactionTestCase):
    async def acreate(self, name):
        return await Entry.objects.acreate(name=name)

    def test_signature(self):
        self.assertEqual(
            inspect.signature(transaction.aatomic),
            inspect.signature(transaction.atomic),
        )

    async def test_commit(self):
        async with transaction.aatomic():
            await self.acreate("a")
        await self.assertAsyncNames("a")

    async def test_rollback(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await self.acreate("a")
                raise Rollback
        await self.assertAsyncNames()

    async def test_nested(self):
        for outer_fails in (False, True):
            for inner_fails in (False, True):
                with self.subTest(outer=outer_fails, inner=inner_fails):
                    await Entry.objects.all().adelete()
                    try:
                        async with transaction.aatomic():
                            await self.acreate("outer")
                            try:
                                async with transaction.aatomic():
                                    await self.acreate("inner")
                                    if inner_fails:
                                        raise Rollback
                            except Rollback:
                                pass
                            if outer_fails:
                                raise Rollback
                    except Rollback:
                        pass
                    await self.assertAsyncNames(
                        *[] if outer_fails else ["outer"],
                        *[] if outer_fails or inner_fails else ["inner"],
                    )

    async def test_merged(self):
        """Without a savepoint, a failure inside fails the outer block."""
        async with transaction.aatomic():
            await self.acreate("outer")
            with self.assertRaises(Rollback):
                async with transaction.aatomic(savepoint=False):
                    await self.acreate("inner")
                    raise Rollback
            self.assertIs(transaction.get_rollback(), True)
        await self.assertAsyncNames()

    async def test_reuse(self):
        block = transaction.aatomic()
        async with block:
            await self.acreate("outer")
            with self.assertRaises(Rollback):
                async with block:
                    await self.acreate("inner")
                    raise Rollback
        async with block:
            await self.acreate("again")
        await self.assertAsyncNames("again", "outer")

    async def test_decorators(self):
        @transaction.aatomic
        async def bare(name, *, fail=False):
            """Docstring."""
            await self.acreate(name)
            if fail:
                raise Rollback
            return name

        @transaction.aatomic()
        async def called(name, *, fail=False):
            await self.acreate(name)
            if fail:
                raise Rollback
            return name

        class Service:
            @transaction.aatomic(savepoint=False)
            async def method(service, name, *, fail=False):
                await self.acreate(name)
                if fail:
                    raise Rollback
                return name

        self.assertEqual(bare.__name__, "bare")
        self.assertEqual(bare.__doc__, "Docstring.")
        for func in (bare, called, Service().method):
            self.assertIs(inspect.iscoroutinefunction(func), True)
            self.assertEqual(await func(func.__name__), func.__name__)
            with self.assertRaises(Rollback):
                await func("rolled back", fail=True)
        await self.assertAsyncNames("bare", "called", "method")

    async def test_decorated_function_called_by_many_tasks(self):
        @transaction.aatomic
        async def work(number):
            await self.acreate(f"{number}")
            await asyncio.sleep(0.001)
            if number % 2:
                raise Rollback

        await asyncio.gather(*(work(n) for n in range(6)), return_exceptions=True)
        await self.assertAsyncNames("0", "2", "4")

    def test_decorating_a_sync_function(self):
        def func():
            pass

        msg = "aatomic() can only decorate coroutine functions. Use atomic() for"
        for decorator in (transaction.aatomic, transaction.aatomic()):
            with self.assertRaisesMessage(TypeError, msg):
                decorator(func)

    def test_atomic_decorating_asynchronous_functions(self):
        async def coroutine_function():
            pass

        async def generator_function():
            yield

        msg = "atomic() can't decorate the asynchronous function"
        for func in (coroutine_function, generator_function):
            # A decorated function would do nothing in the block.
            for decorator in (transaction.atomic, transaction.atomic()):
                with self.assertRaisesMessage(TypeError, msg):
                    decorator(func)

    async def test_durable(self):
        msg = "A durable atomic block cannot be nested within another atomic block."
        async with transaction.aatomic(durable=True):
            await self.acreate("durable")
            with self.assertRaisesMessage(RuntimeError, msg):
                async with transaction.aatomic(durable=True):
                    self.fail("The block was entered.")
            async with transaction.aatomic():
                await self.acreate("not durable")
        await self.assertAsyncNames("durable", "not durable")

    async def test_broken_transaction(self):
        await self.acreate("a")
        async with transaction.aatomic():
            with self.assertRaises(IntegrityError):
                await self.acreate("a")
            msg = (
                "An error occurred in the current transaction. You can't execute "
                "queries until the end of the 'atomic' block."
            )
            with self.assertRaisesMessage(TransactionManagementError, msg) as cm:
                await self.acreate("b")
            self.assertIsInstance(cm.exception.__cause__, IntegrityError)
        await self.assertAsyncNames("a")

    async def test_error_in_a_nested_block(self):
        await self.acreate("a")
        async with transaction.aatomic():
            with self.assertRaises(IntegrityError):
                async with transaction.aatomic():
                    await self.acreate("a")
            await self.acreate("b")
        await self.assertAsyncNames("a", "b")

    async def test_rollback_flag(self):
        async with transaction.aatomic():
            await self.acreate("outer")
            async with transaction.aatomic():
                await self.acreate("inner")
                self.assertIs(transaction.get_rollback(), False)
                transaction.set_rollback(True)
            self.assertIs(transaction.get_rollback(), False)
        await self.assertAsyncNames("outer")
        async with transaction.aatomic():
            await self.acreate("flagged")
            transaction.set_rollback(True)
        await self.assertAsyncNames("outer")

    async def test_using(self):
        async with transaction.aatomic(using="default"):
            await self.acreate("a")
        async with transaction.aatomic("default"):
            await self.acreate("b")
        await self.assertAsyncNames("a", "b")

    async def test_connection_closed_inside(self):
        if is_in_memory():
            self.skipTest("Closing it would destroy the database.")
        async with transaction.aatomic():
            await self.acreate("lost")
            await sync_to_async(transaction.get_connection().close)()
            with self.assertRaises((Error, DatabaseError)):
                await self.acreate("refused")
        await self.acreate("after")
        await self.assertAsyncNames("after")

    async def test_session_killed_inside(self):
        if connection.vendor != "postgresql":
            self.skipTest("Needs a server.")

        def pid():
            with transaction.get_connection().cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                return cursor.fetchone()[0]

        def kill(pid):
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s)", [pid])

        pids = asyncio.Queue()

        async def killer():
            await sync_to_async(kill)(await pids.get())

        task = asyncio.create_task(killer())
        with self.assertRaises(OperationalError):
            async with transaction.aatomic():
                await self.acreate("lost")
                pids.put_nowait(await sync_to_async(pid)())
                await task
                await self.acreate("refused")
        async with transaction.aatomic():
            await self.acreate("after")
        await self.assertAsyncNames("after")


class OnCommitTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        self.called = []

    def do(self, name):
        self.called.append(name)

    async def test_order_and_time(self):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="a")
            transaction.on_commit(lambda: self.do("first"))
            transaction.on_commit(lambda: self.do("second"))
            await asyncio.sleep(0.01)
            self.assertEqual(self.called, [])
        self.assertEqual(self.called, ["first", "second"])

    async def test_not_called_after_a_rollback(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                transaction.on_commit(lambda: self.do("outer"))
                raise Rollback
        self.assertEqual(self.called, [])

    async def test_nested(self):
        async with transaction.aatomic():
            transaction.on_commit(lambda: self.do("outer"))
            async with transaction.aatomic():
                transaction.on_commit(lambda: self.do("inner"))
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    transaction.on_commit(lambda: self.do("rolled back"))
                    raise Rollback
            self.assertEqual(self.called, [])
        self.assertEqual(self.called, ["outer", "inner"])

    async def test_registered_by_a_sibling_of_a_nested_block(self):
        """It belongs to the sibling's block, not to the nested one."""
        inside = asyncio.Event()
        registered = asyncio.Event()

        async def nested():
            async with transaction.aatomic():
                inside.set()
                await registered.wait()
                raise Rollback

        async def sibling():
            await inside.wait()
            transaction.on_commit(lambda: self.do("sibling"))
            registered.set()

        async with transaction.aatomic():
            await asyncio.gather(nested(), sibling(), return_exceptions=True)
        self.assertEqual(self.called, ["sibling"])

    async def test_outside_of_the_transaction(self):
        async def check():
            self.do(connection.in_atomic_block)
            await Entry.objects.acreate(name="async")

        def sync_check():
            self.do(connection.in_atomic_block)
            Entry.objects.create(name="sync")

        async with transaction.aatomic():
            await Entry.objects.acreate(name="block")
            transaction.on_commit(check)
            transaction.on_commit(sync_check)
        self.assertEqual(self.called, [False, False])
        await self.assertAsyncNames("async", "block", "sync")

    async def test_in_the_task_that_ends_it(self):
        async def check():
            self.do(asyncio.current_task())

        async with transaction.aatomic():
            transaction.on_commit(check)
        self.assertEqual(self.called, [asyncio.current_task()])

    async def test_robust(self):
        def fail():
            raise Rollback("robust")

        with self.assertLogs("django.db.backends.base", "ERROR") as cm:
            async with transaction.aatomic():
                transaction.on_commit(fail, robust=True)
                transaction.on_commit(lambda: self.do("next"))
        self.assertIn("Error calling", cm.output[0])
        self.assertIn("fail in on_commit() during transaction (robust).", cm.output[0])
        self.assertEqual(self.called, ["next"])

    async def test_exception(self):
        def fail():
            raise Rollback

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="committed")
                transaction.on_commit(fail)
                transaction.on_commit(lambda: self.do("never"))
        self.assertEqual(self.called, [])
        await self.assertAsyncNames("committed")
