"""
Promise 6: aatomic() does what atomic() does.

The counterparts of Django's own tests are in test_transactions.py and
test_transaction_hooks.py.
"""

import asyncio
import inspect

from asgiref.sync import sync_to_async

from django.db import IntegrityError, OperationalError, connection, transaction

from . import server
from .base import AsyncTransactionTestCase, Rollback, until
from .models import Entry


class AsyncAtomicTests(AsyncTransactionTestCase):
    async def acreate(self, name):
        return await Entry.objects.acreate(name=name)

    def test_signature(self):
        self.assertEqual(
            inspect.signature(transaction.aatomic),
            inspect.signature(transaction.atomic),
        )

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

    def test_decorating_other_functions(self):
        def func():
            pass

        async def generator_function():
            yield

        msg = "aatomic() can only decorate coroutine functions. Use atomic() for"
        for func in (func, generator_function):
            for decorator in (transaction.aatomic, transaction.aatomic()):
                with self.assertRaisesMessage(TypeError, msg):
                    decorator(func)

    def test_atomic_decorating_asynchronous_functions(self):
        async def coroutine_function():
            pass

        async def generator_function():
            yield

        class Callable:
            async def __call__(self):
                pass

        class Service:
            async def method(self):
                pass

        msg = "atomic() can't decorate the asynchronous function"
        for func in (
            coroutine_function,
            generator_function,
            Callable(),
            Service().method,
        ):
            # A decorated function would do nothing in the block.
            for decorator in (transaction.atomic, transaction.atomic()):
                with self.assertRaisesMessage(TypeError, msg):
                    decorator(func)

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

    async def test_session_killed_inside(self):
        if not server.is_supported():
            self.skipTest("Needs a database server.")
        sessions = asyncio.Queue()

        async def killer():
            session = await sessions.get()
            await asyncio.to_thread(server.ask, server.END_SESSION, session)

        task = asyncio.create_task(killer())
        with self.assertRaises(OperationalError):
            async with transaction.aatomic():
                await self.acreate("lost")
                sessions.put_nowait(await sync_to_async(server.session_id)())
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

    async def test_registered_by_a_sibling_of_a_nested_block(self):
        """It belongs to the sibling's block, not to the nested one."""
        inside = asyncio.Event()
        registered = asyncio.Event()

        async def nested():
            async with transaction.aatomic():
                inside.set()
                await until(registered)
                raise Rollback

        async def sibling():
            await until(inside)
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
