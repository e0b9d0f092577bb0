"""
Promise 2: a transaction covers what is started inside it, whichever colour the
code and the block have.
"""

import asyncio
import contextvars
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async

from django.db import connections, new_connection, threads, transaction

from .base import AsyncTransactionTestCase, Rollback, create, is_in_memory, names
from .models import Entry

DURABLE = "A durable atomic block cannot be nested within another atomic block."

variable = contextvars.ContextVar("variable", default=())


def run_in_runner(func, *args):
    """Run two coroutines in one event loop."""
    with asyncio.Runner() as runner:
        runner.run(asyncio.sleep(0))
        return runner.run(func(*args))


def call_insensitive(func, *args):
    return sync_to_async(func, thread_sensitive=False)(*args)


# How synchronous code calls asynchronous code, and the other way round.
TO_ASYNC = {
    "async_to_sync": lambda func, *args: async_to_sync(func)(*args),
    "asyncio.run": lambda func, *args: asyncio.run(func(*args)),
    "Runner": run_in_runner,
}
TO_SYNC = {
    "sync_to_async": lambda func, *args: sync_to_async(func)(*args),
    "insensitive": call_insensitive,
    "to_thread": asyncio.to_thread,
}

# Three crossings each, so four levels of code.
FROM_SYNC = list(itertools.product(TO_ASYNC, TO_SYNC, TO_ASYNC))
FROM_ASYNC = list(itertools.product(TO_SYNC, TO_ASYNC, TO_SYNC))
LEVELS = range(4)


class Descent:
    """
    Code of both colours by turns, each level called by the one before.

    The levels in `blocks` open a block, the one that `fails` rolls it back.
    """

    def __init__(self, crossings, blocks=LEVELS, fails=None, durable=False):
        self.crossings = crossings
        self.blocks = blocks
        self.fails = fails
        self.durable = durable
        # What the innermost level finds.
        self.found = None
        self.variables = {}

    def options(self, level):
        return {"durable": self.durable and level == max(self.blocks)}

    def create(self, level, when):
        if level >= min(self.blocks):
            create(f"{level} {when}")

    async def acreate(self, level, when):
        if level >= min(self.blocks):
            await Entry.objects.acreate(name=f"{level} {when}")

    def sync_level(self, level=0):
        self.variables[level] = variable.get()
        if level not in self.blocks:
            self.sync_body(level)
            return
        try:
            with transaction.atomic(**self.options(level)):
                self.sync_body(level)
                if level == self.fails:
                    raise Rollback
        except Rollback:
            pass
        finally:
            if level and level == min(self.blocks):
                # The connection of a thread that has an end.
                connections.close_all()

    def sync_body(self, level):
        self.create(level, "before")
        if level < len(self.crossings):
            variable.set((*variable.get(), level))
            TO_ASYNC[self.crossings[level]](self.async_level, level + 1)
            self.variables[f"{level} after"] = variable.get()
        else:
            self.found = sorted(Entry.objects.values_list("name", flat=True))
        self.create(level, "after")

    async def async_level(self, level=0):
        self.variables[level] = variable.get()
        if level not in self.blocks:
            await self.async_body(level)
            return
        try:
            async with transaction.aatomic(**self.options(level)):
                await self.async_body(level)
                if level == self.fails:
                    raise Rollback
        except Rollback:
            pass

    async def async_body(self, level):
        await self.acreate(level, "before")
        if level < len(self.crossings):
            variable.set((*variable.get(), level))
            await TO_SYNC[self.crossings[level]](self.sync_level, level + 1)
            self.variables[f"{level} after"] = variable.get()
        else:
            self.found = await names()
        await self.acreate(level, "after")


class CrossingTestsMixin:
    """Each test is run with all combinations of three crossings."""

    def check(self, **kwargs):
        """
        All levels see what the others wrote, and all of it is committed but
        what was written inside the block that fails.
        """
        for crossings in self.combinations:
            with self.subTest(crossings=crossings):
                descent = Descent(crossings, **kwargs)
                self.start(descent)
                self.assertEqual(descent.found, [f"{level} before" for level in LEVELS])
                self.assertNames(
                    *(
                        f"{level} {when}"
                        for level in LEVELS[: descent.fails]
                        for when in ("before", "after")
                    )
                )
            Entry.objects.all().delete()

    def test_commit(self):
        self.check()

    def test_outermost_fails(self):
        self.check(fails=0)

    def test_second_fails(self):
        self.check(fails=1)

    def test_third_fails(self):
        self.check(fails=2)

    def test_innermost_fails(self):
        self.check(fails=3)

    def test_commit_of_one_block(self):
        self.check(blocks=[0])

    def test_rollback_of_one_block(self):
        self.check(blocks=[0], fails=0)

    def test_durable(self):
        """The innermost block isn't the outermost one, so it's refused."""
        for crossings in self.combinations:
            with self.subTest(crossings=crossings):
                descent = Descent(crossings, blocks=[0, 3], durable=True)
                with self.assertRaisesMessage(RuntimeError, DURABLE):
                    self.start(descent)
                self.assertNames()

    def test_durable_alone(self):
        """Without a block around it, it's the outermost one."""
        for crossings in self.combinations:
            if crossings.count("sync_to_async") > 1:
                # Outside of blocks, asgiref refuses to wait for its thread.
                continue
            with self.subTest(crossings=crossings):
                descent = Descent(crossings, blocks=[3], durable=True)
                self.start(descent)
                self.assertEqual(descent.found, ["3 before"])
            Entry.objects.all().delete()

    def test_context_variables(self):
        """
        What's set on one side is seen on the other, and asgiref brings it
        back. The others copy the context.
        """
        for crossings in self.combinations:
            with self.subTest(crossings=crossings):
                descent = Descent(crossings)
                variable.set(())
                self.start(descent)
                seen = descent.variables
                for level in LEVELS:
                    self.assertEqual(seen[level], tuple(range(level)))
                expected = (0, 1, 2)
                for level in (2, 1, 0):
                    self.assertEqual(seen[f"{level} after"], expected)
                    if level and crossings[level - 1] not in (
                        "async_to_sync",
                        "sync_to_async",
                        "insensitive",
                    ):
                        expected = tuple(range(level))
            Entry.objects.all().delete()


class FromSyncTests(CrossingTestsMixin, AsyncTransactionTestCase):
    combinations = FROM_SYNC

    def start(self, descent):
        descent.sync_level()


class FromAsyncTests(CrossingTestsMixin, AsyncTransactionTestCase):
    combinations = FROM_ASYNC

    def start(self, descent):
        asyncio.run(descent.async_level())


class OccupiedThreadTests(AsyncTransactionTestCase):
    """
    The thread for thread-sensitive functions runs the event loop, so it can't
    get to them.
    """

    def run_in_that_thread(self, func):
        async def main():
            # Or what follows would wait for itself.
            executor = next(threads.thread_sensitive_executors())
            self.assertIsNot(executor, SyncToAsync.single_thread_executor)
            await func()

        async def outer():
            await sync_to_async(lambda: asyncio.run(main()))()
            # The thread keeps them otherwise.
            await sync_to_async(connections.close_all)()

        asyncio.run(outer())

    def test_on_commit(self):
        called = []

        async def work():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="a")
                transaction.on_commit(lambda: called.append(True))

        self.run_in_that_thread(work)
        self.assertEqual(called, [True])
        self.assertNames("a")

    def test_first_function(self):
        """The executor notes its thread after it has started that."""

        class Threads(set):
            def add(self, thread):
                time.sleep(0.2)
                super().add(thread)

        async def work():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="a")

        with ThreadPoolExecutor(max_workers=1) as executor:
            executor._threads = Threads()
            with mock.patch.object(SyncToAsync, "single_thread_executor", executor):
                self.run_in_that_thread(work)
        self.assertNames("a")

    def test_nested_blocks(self):
        async def work():
            async with transaction.aatomic():
                await asyncio.gather(*map(nested, "abc"), return_exceptions=True)

        async def nested(name):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=name)
                await asyncio.to_thread(create, f"{name}, thread")
                if name == "b":
                    raise Rollback

        self.run_in_that_thread(work)
        self.assertNames("a", "a, thread", "c", "c, thread")

    def test_new_connection(self):
        if is_in_memory():
            self.skipTest("An in-memory database has but one connection.")

        async def work():
            async with new_connection():
                await Entry.objects.acreate(name="a")

        self.run_in_that_thread(work)
        self.assertNames("a")

    def test_below_another_thread(self):
        """An event loop in a thread that the occupied one waits for."""

        async def innermost():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="innermost")

        async def work():
            async with transaction.aatomic():
                await asyncio.to_thread(lambda: asyncio.run(innermost()))

        self.run_in_that_thread(work)
        self.assertNames("innermost")
