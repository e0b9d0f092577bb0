"""
Promise 5: an asynchronous generator that holds a block across its yields may
be closed by whoever happens to close it.
"""

import asyncio
import gc
from contextlib import aclosing, asynccontextmanager

from asgiref.sync import async_to_sync, sync_to_async

from django.db import connections, transaction
from django.db.transaction import TransactionManagementError

from .base import (
    AsyncTransactionTestCase,
    Rollback,
    create,
    transaction_threads,
    until,
    wait_until,
)
from .models import Entry


class Closing:
    """An asynchronous generator, and an event for its end."""

    def __init__(self, name="generator"):
        self.name = name
        self.closed = asyncio.Event()

    async def __call__(self):
        try:
            async with transaction.aatomic():
                for number in range(3):
                    await Entry.objects.acreate(name=f"{self.name} {number}")
                    yield number
        finally:
            self.closed.set()


async def in_task(func):
    await asyncio.create_task(func())


async def exhaust(generator):
    async for _ in generator:
        pass


class GeneratorTestsMixin:
    """
    Each way to end a generator, by itself and inside a block. What it wrote is
    there if it was exhausted, and what the consumer writes afterwards is in
    the consumer's hands.
    """

    complete = ["generator 0", "generator 1", "generator 2"]

    async def check(self, end, expected=()):
        raise NotImplementedError

    async def use(self, end):
        """Begin with a generator, end it, and go on."""
        closing = Closing()
        generator = closing()
        self.assertEqual(await anext(generator), 0)
        generators = [generator]
        del generator
        await end(generators)
        generators.clear()
        await until(closing.closed)
        await Entry.objects.acreate(name="consumer")
        await sync_to_async(create)("consumer, sync")
        async with transaction.aatomic():
            await Entry.objects.acreate(name="consumer's block")

    async def test_exhausted(self):
        async def end(generators):
            await exhaust(generators[0])

        await self.check(end, self.complete)

    async def test_exhausted_by_another_task(self):
        async def end(generators):
            await in_task(lambda: exhaust(generators[0]))

        await self.check(end, self.complete)

    async def test_closed_by_the_consumer(self):
        async def end(generators):
            await generators[0].aclose()

        await self.check(end)

    async def test_closed_by_a_context_manager(self):
        async def end(generators):
            async with aclosing(generators[0]) as generator:
                async for _ in generator:
                    break

        await self.check(end)

    async def test_closed_by_another_task(self):
        async def end(generators):
            await in_task(generators[0].aclose)

        await self.check(end)

    async def test_closed_by_a_thread(self):
        async def end(generators):
            async def close():
                await generators[0].aclose()

            await sync_to_async(async_to_sync(close))()

        await self.check(end)

    async def test_left_by_break(self):
        """The event loop closes it in a task once it's not referred to."""

        async def end(generators):
            async for _ in generators[0]:
                break

        await self.check(end)

    async def test_exception_thrown_into_it(self):
        async def end(generators):
            with self.assertRaises(Rollback):
                await generators[0].athrow(Rollback)

        await self.check(end)

    async def test_collected_as_garbage(self):
        async def end(generators):
            cycle = [generators.pop()]
            cycle.append(cycle)
            del cycle
            gc.collect()

        await self.check(end)

    async def test_consumer_is_cancelled(self):
        began = asyncio.Event()

        async def end(generators):
            async def consume():
                async with aclosing(generators[0]) as generator:
                    async for _ in generator:
                        began.set()
                        await asyncio.sleep(10)

            task = asyncio.create_task(consume())
            await until(began)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        await self.check(end)


class GeneratorTests(GeneratorTestsMixin, AsyncTransactionTestCase):
    """The generator's block is the outermost one."""

    async def check(self, end, expected=()):
        await self.use(end)
        await self.assertAsyncNames(
            *expected, "consumer", "consumer, sync", "consumer's block"
        )


class GeneratorInsideTests(GeneratorTestsMixin, AsyncTransactionTestCase):
    """The generator's block is a savepoint."""

    async def check(self, end, expected=()):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await self.use(end)
                raise Rollback
        await self.assertAsyncNames()
        async with transaction.aatomic():
            await self.use(end)
        await self.assertAsyncNames(
            *expected, "consumer", "consumer, sync", "consumer's block"
        )


class LoopEndTests(AsyncTransactionTestCase):
    """The event loop ends before the generator does."""

    def begin(self, run):
        kept = []

        async def main():
            kept.append(Closing()())
            await anext(kept[0])

        run(main)
        return kept

    def check(self):
        self.assertIs(wait_until(lambda: not transaction_threads()), True)
        self.assertNames()
        create("after")
        self.assertNames("after")

    def test_shutdown_of_asynchronous_generators(self):
        kept = self.begin(lambda main: asyncio.run(main()))
        self.check()
        with self.assertRaises(StopAsyncIteration):
            asyncio.run(self.next(kept[0]))

    async def next(self, generator):
        return await anext(generator)

    def test_async_to_sync(self):
        self.begin(lambda main: async_to_sync(main)())
        self.check()

    def test_loop_closed_without_it(self):
        def run(main):
            loop = asyncio.new_event_loop()
            try:
                loop.run_until_complete(main())
            finally:
                loop.close()

        kept = self.begin(run)
        self.check()
        # Its destruction sends nothing.
        kept.clear()
        gc.collect()
        self.assertNames("after")
        # The thread's last work was in this context.
        connections.close_all()

    def test_shutdown_in_a_sync_block(self):
        """It's a savepoint of the block, which goes on."""
        with transaction.atomic():
            create("before")
            kept = self.begin(lambda main: asyncio.run(main()))
            self.assertNames("before")
            create("after")
        self.assertEqual(len(kept), 1)
        self.assertNames("before", "after")


class SeveralTests(AsyncTransactionTestCase):
    @asynccontextmanager
    async def block(self, name):
        """A context manager made of a generator."""
        async with transaction.aatomic():
            await Entry.objects.acreate(name=name)
            yield

    async def test_context_managers(self):
        with self.assertRaises(Rollback):
            async with self.block("outer"):
                async with self.block("inner"):
                    pass
                raise Rollback
        await self.assertAsyncNames()
        async with self.block("outer"):
            with self.assertRaises(Rollback):
                async with self.block("inner"):
                    raise Rollback
        await self.assertAsyncNames("outer")

    async def test_first_is_closed_before_second(self):
        """
        The second one's block is nested in that of the first, because both
        have one consumer. Closing the first one rolls both back.
        """
        first, second = Closing("first")(), Closing("second")()
        await anext(first)
        await anext(second)
        await first.aclose()
        await second.aclose()
        await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after")

    async def test_first_is_exhausted_before_second(self):
        """It can't be committed with the other one's work half done."""
        first, second = Closing("first")(), Closing("second")()
        await anext(first)
        await anext(second)
        with self.assertRaises(TransactionManagementError):
            await asyncio.wait_for(exhaust(first), 10)
        with self.assertRaises(TransactionManagementError):
            await asyncio.wait_for(exhaust(second), 10)
        await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after")

    async def test_one_for_each_task(self):
        """Each task's block is a transaction of its own."""

        async def consume(name, fails):
            async with aclosing(Closing(name)()) as generator:
                async for _ in generator:
                    await asyncio.sleep(0)
                    if fails:
                        return

        await asyncio.gather(*(consume(f"{n}", n % 2 == 1) for n in range(4)))
        await self.assertAsyncNames(
            *(f"{name} {number}" for name in "02" for number in range(3))
        )
