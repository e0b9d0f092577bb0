"""
Promises 1, 3, 4 and 5, for every way to start and to await a task: those that
ran before the block are foreign to it, those that it started are inside, and
those that outlive it are refused.
"""

import asyncio
from contextlib import contextmanager
from unittest import mock

from asgiref.sync import async_to_sync, sync_to_async

from django.db import (
    IntegrityError,
    OperationalError,
    connection,
    connections,
    sharing,
    transaction,
)
from django.db.backends.utils import CursorWrapper
from django.db.transaction import TransactionManagementError

from .base import (
    AsyncTransactionTestCase,
    Rollback,
    create,
    create_and_close,
    is_in_memory,
    names,
    until,
)
from .models import Entry

OUTLIVED = (
    "task 'the late task' can't use the database 'default' any more, because the "
    "block that it was started in, opened by task 'the opener', has ended. Await it "
    "inside the block, leave what has to follow the commit to on_commit(), or open a "
    "block of its own or new_connection()."
)


@contextmanager
def statements_sent():
    """Record what any connection of any thread sends."""
    sent = []

    def record(method):
        def inner(self, sql, *args):
            sent.append(sql)
            return method(self, sql, *args)

        return inner

    with (
        mock.patch.object(CursorWrapper, "_execute", record(CursorWrapper._execute)),
        mock.patch.object(
            CursorWrapper, "_executemany", record(CursorWrapper._executemany)
        ),
    ):
        yield sent


async def in_gather(coroutine):
    await asyncio.gather(coroutine, asyncio.sleep(0))


async def in_task_group(coroutine):
    async with asyncio.TaskGroup() as group:
        group.create_task(coroutine)


async def in_create_task(coroutine):
    await asyncio.create_task(coroutine)


async def in_ensure_future(coroutine):
    await asyncio.wait([asyncio.ensure_future(coroutine)])


async def in_shield(coroutine):
    await asyncio.shield(coroutine)


async def in_wait_for(coroutine):
    await asyncio.wait_for(coroutine, 10)


async def in_timeout(coroutine):
    async with asyncio.timeout(10):
        await coroutine


async def in_as_completed(coroutine):
    for task in asyncio.as_completed([coroutine]):
        await task


WAYS = [
    in_gather,
    in_task_group,
    in_create_task,
    in_ensure_future,
    in_shield,
    in_wait_for,
    in_timeout,
    in_as_completed,
]


class TasksTests(AsyncTransactionTestCase):
    async def write(self, name):
        """Do so in each way that code can write."""
        await Entry.objects.acreate(name=name)
        await sync_to_async(create)(f"{name}, sync_to_async")
        await asyncio.to_thread(create_and_close, f"{name}, to_thread")
        async with transaction.aatomic():
            await Entry.objects.acreate(name=f"{name}, block")

    def written(self, name):
        return [name, f"{name}, sync_to_async", f"{name}, to_thread", f"{name}, block"]

    async def clean(self):
        await Entry.objects.all().adelete()

    async def test_started_inside(self):
        """Promise 2: all of it is committed or rolled back."""
        for way in WAYS:
            for fails in (True, False):
                with self.subTest(way=way.__name__, fails=fails):
                    try:
                        async with transaction.aatomic():
                            await way(self.write_inside("task"))
                            if fails:
                                raise Rollback
                    except Rollback:
                        await self.assertAsyncNames()
                    else:
                        await self.assertAsyncNames(*self.written("task"))
                    await self.clean()

    async def write_inside(self, name):
        await Entry.objects.acreate(name=name)
        await sync_to_async(create)(f"{name}, sync_to_async")
        await asyncio.to_thread(create, f"{name}, to_thread")
        async with transaction.aatomic():
            await Entry.objects.acreate(name=f"{name}, block")

    async def test_started_before(self):
        """Promise 1: it neither sees the block nor is rolled back with it."""
        for way in WAYS:
            with self.subTest(way=way.__name__):
                await self.check_started_before(way)
                await self.clean()

    async def check_started_before(self, way):
        inside = asyncio.Event()
        read = asyncio.Event()

        async def foreign():
            await until(inside)
            self.assertEqual(await names(), [])
            read.set()
            await self.write("foreign")

        task = asyncio.create_task(way(foreign()))
        await asyncio.sleep(0.01)
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="block")
                inside.set()
                if is_in_memory():
                    # It has but one connection.
                    await asyncio.wait([task], timeout=0.05)
                    self.assertIs(read.is_set(), False)
                else:
                    await until(read)
                if connection.vendor != "sqlite":
                    await asyncio.wait([task], timeout=10)
                    self.assertIs(task.done(), True)
                raise Rollback
        await task
        await self.assertAsyncNames(*self.written("foreign"))

    async def test_awaited_after_the_end(self):
        """Promise 4: it's refused before anything is sent."""
        for way in WAYS:
            for fails in (True, False):
                with self.subTest(way=way.__name__, fails=fails):
                    await self.outlive(way, fails)

    async def outlive(self, way, fails):
        over = asyncio.Event()
        refusals = []

        async def late():
            await until(over)
            asyncio.current_task().set_name("the late task")
            for write in (
                lambda: Entry.objects.acreate(name="late"),
                lambda: sync_to_async(create)("late"),
                lambda: asyncio.to_thread(create, "late"),
                lambda: sync_to_async(transaction.get_autocommit)(),
            ):
                try:
                    await write()
                except TransactionManagementError as exc:
                    refusals.append(str(exc).replace("thread", "task"))

        asyncio.current_task().set_name("the opener")
        try:
            async with transaction.aatomic():
                task = asyncio.create_task(way(late()))
                await Entry.objects.acreate(name="block")
                if fails:
                    raise Rollback
        except Rollback:
            pass
        with statements_sent() as sent:
            over.set()
            await task
        self.assertEqual(sent, [])
        self.assertEqual(len(refusals), 4)
        self.assertEqual(refusals[0], OUTLIVED)
        await self.assertAsyncNames(*[] if fails else ["block"])
        await self.clean()

    async def test_cancelled_by_wait_for_or_timeout(self):
        """The work of a task that was cancelled is gone with its own block."""

        async def slow():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="slow")
                await asyncio.sleep(10)

        async def wait_for():
            await asyncio.wait_for(slow(), 0.1)

        async def timeout():
            async with asyncio.timeout(0.1):
                await slow()

        for way in (wait_for, timeout):
            with self.subTest(way.__name__):
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="block")
                    with self.assertRaises(TimeoutError):
                        await way()
                    await Entry.objects.acreate(name="usable")
                await self.assertAsyncNames("block", "usable")
                await self.clean()

    async def test_shielded_from_cancellation(self):
        """Promise 4: what goes on after the block has failed is refused."""
        over = asyncio.Event()
        began = asyncio.Event()

        async def shielded():
            await Entry.objects.acreate(name="before")
            began.set()
            await until(over)
            await Entry.objects.acreate(name="after")

        async def block():
            nonlocal task
            async with transaction.aatomic():
                task = asyncio.create_task(shielded())
                await asyncio.shield(task)

        task = None
        blocking = asyncio.create_task(block())
        await until(began)
        blocking.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await blocking
        with statements_sent() as sent:
            over.set()
            with self.assertRaisesMessage(TransactionManagementError, "any more"):
                await task
        self.assertEqual(sent, [])
        await self.assertAsyncNames()


class FailingSiblingTests(AsyncTransactionTestCase):
    """Promise 4: what a sibling was writing is gone with the block."""

    async def test_gather(self):
        writing = asyncio.Event()
        tasks = []

        async def fails():
            await until(writing)
            raise Rollback

        async def writes(name):
            for number in range(10_000):
                await Entry.objects.acreate(name=f"{name} {number}")

        async def writes_in_a_block():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="block")
                writing.set()
                await writes("block")

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                tasks.append(asyncio.create_task(writes("plain")))
                tasks.append(asyncio.create_task(writes_in_a_block()))
                await asyncio.gather(fails(), *tasks)
        for task in tasks:
            # A statement on its way is cancelled, the next one refused.
            with self.assertRaises((OperationalError, TransactionManagementError)):
                await task
        await self.assertAsyncNames()

    async def test_task_group(self):
        async def writes(name):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=name)
                writing.set()
                await asyncio.sleep(10)

        async def fails():
            await until(writing)
            raise Rollback

        writing = asyncio.Event()
        with self.assertRaises(ExceptionGroup):
            async with transaction.aatomic():
                async with asyncio.TaskGroup() as group:
                    group.create_task(writes("a"))
                    group.create_task(writes("b"))
                    group.create_task(fails())
        await self.assertAsyncNames()
        # Caught inside, the group's own rows are gone, and nothing else.
        writing.clear()
        async with transaction.aatomic():
            await Entry.objects.acreate(name="before")
            with self.assertRaises(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(writes("a"))
                    group.create_task(fails())
            await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after", "before")

    async def test_savepoints_of_siblings(self):
        """Promise 3: each is rolled back with what's in it, at any depth."""

        async def sibling(number):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"{number}")
                try:
                    async with transaction.aatomic():
                        await asyncio.gather(
                            Entry.objects.acreate(name=f"{number} async"),
                            asyncio.to_thread(create, f"{number} thread"),
                        )
                        if number % 2:
                            raise Rollback
                except Rollback:
                    pass
                if number == 2:
                    raise Rollback

        async with transaction.aatomic():
            await asyncio.gather(*map(sibling, range(4)), return_exceptions=True)
        await self.assertAsyncNames("0", "0 async", "0 thread", "1", "3")

    async def test_database_error_of_a_sibling(self):
        """It fails the sibling's block only."""
        await Entry.objects.acreate(name="existing")

        async def breaks():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="existing")

        async def works(number):
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"{number}")

        async with transaction.aatomic():
            results = await asyncio.gather(
                works(0), breaks(), works(1), breaks(), return_exceptions=True
            )
            self.assertEqual(
                [type(result) for result in results],
                [type(None), IntegrityError, type(None), IntegrityError],
            )
        await self.assertAsyncNames("0", "1", "existing")


class UndisturbedTests(AsyncTransactionTestCase):
    """Promises 1 and 5: what others do to connections isn't the block's."""

    async def close_all(self):
        await sync_to_async(connections.close_all)()
        await sync_to_async(connections.close_all, thread_sensitive=False)()
        await asyncio.to_thread(connections.close_all)
        async with transaction.aatomic():
            await sync_to_async(connections.close_all)()
            await Entry.objects.aexists()

    async def check(self, disturb):
        """`disturb` in a foreign task, and in one that was started inside."""
        inside = asyncio.Event()

        async def foreign():
            await until(inside)
            await disturb()

        task = asyncio.create_task(foreign())
        await asyncio.sleep(0)
        async with transaction.aatomic():
            await Entry.objects.acreate(name="a")
            inside.set()
            await asyncio.wait([task], timeout=0.1)
            await Entry.objects.acreate(name="b")
            await asyncio.gather(disturb())
            await disturb()
            async with transaction.aatomic():
                await disturb()
                await Entry.objects.acreate(name="c")
        await task
        await self.assertAsyncNames("a", "b", "c")

    async def test_close_all(self):
        await self.check(self.close_all)

    async def test_exceptions(self):
        async def disturb():
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    raise Rollback
            with self.assertRaises(ValueError):
                raise ValueError

        await self.check(disturb)

    def test_close_all_below_a_sync_block(self):
        for start in (
            lambda func: async_to_sync(func)(),
            lambda func: asyncio.run(func()),
        ):
            with self.assertRaises(Rollback):
                with transaction.atomic():
                    create("a")
                    start(self.close_all)
                    create("b")
                    self.assertNames("a", "b")
                    raise Rollback
            self.assertNames()


class RefusalTests(AsyncTransactionTestCase):
    """Promise 3: a refusal sends nothing. The transaction stays usable."""

    def setUp(self):
        super().setUp()
        sharing.TURN_TIMEOUT = 0.2

    async def check(self, use):
        """The nested block awaits a task that was started before it."""
        inside = asyncio.Event()

        async def earlier():
            await until(inside)
            await use()

        asyncio.current_task().set_name("the opener")
        async with transaction.aatomic():
            await Entry.objects.acreate(name="a")
            task = asyncio.create_task(earlier(), name="the earlier task")
            async with transaction.aatomic():
                await Entry.objects.acreate(name="b")
                inside.set()
                with statements_sent() as sent:
                    with self.assertRaises(TransactionManagementError) as caught:
                        await asyncio.wait_for(task, 10)
                self.assertEqual(sent, [])
                await Entry.objects.acreate(name="c")
            await Entry.objects.acreate(name="d")
        await self.assertAsyncNames(*"abcd")
        message = str(caught.exception)
        self.assertIn(
            "waited 0.2 seconds for the block that task 'the opener' opened on the "
            "database 'default' to end. If that waits for it in turn, neither can go "
            "on: start it inside the block, or await it before the block.",
            message,
        )
        return message

    async def test_method(self):
        message = await self.check(lambda: Entry.objects.acreate(name="refused"))
        self.assertIn("task 'the earlier task' waited", message)

    async def test_block(self):
        async def use():
            async with transaction.aatomic():
                self.fail("The block was entered.")

        message = await self.check(use)
        self.assertIn("task 'the earlier task' waited", message)

    async def test_iteration(self):
        async def use():
            async for _ in Entry.objects.all():
                self.fail("A row was fetched.")

        message = await self.check(use)
        self.assertIn("task 'the earlier task' waited", message)

    async def test_sync_to_async(self):
        await self.check(lambda: sync_to_async(create)("refused"))

    async def test_insensitive(self):
        await self.check(
            lambda: sync_to_async(create, thread_sensitive=False)("refused")
        )

    async def test_to_thread(self):
        await self.check(lambda: asyncio.to_thread(create, "refused"))


class ElsewhereTests(AsyncTransactionTestCase):
    """Promise 5: a nested block may be entered and left by different tasks."""

    async def test_nested_block(self):
        for fails in (True, False):
            nested = transaction.aatomic()
            exc_info = (Rollback, Rollback(), None) if fails else (None, None, None)
            async with transaction.aatomic():
                await Entry.objects.acreate(name="outer")
                await asyncio.create_task(self.enter_and_write(nested))
                await asyncio.create_task(nested.__aexit__(*exc_info))
                await Entry.objects.acreate(name="after")
            expected = ["after", "outer"] if fails else ["after", "nested", "outer"]
            await self.assertAsyncNames(*expected)
            await Entry.objects.all().adelete()

    async def enter_and_write(self, block):
        await block.__aenter__()
        await Entry.objects.acreate(name="nested")

    def test_two_event_loops(self):
        """As test set-up and tear-down do it."""
        for fails in (True, False):
            block = transaction.aatomic()
            exc_info = (Rollback, Rollback(), None) if fails else (None, None, None)
            with asyncio.Runner() as runner:
                runner.run(self.enter_and_write(block))
                runner.run(block.__aexit__(*exc_info))
            self.assertNames(*[] if fails else ["nested"])

    def test_two_calls_of_async_to_sync(self):
        async def main():
            def function():
                block = transaction.aatomic()
                async_to_sync(self.enter_and_write)(block)
                # The function is inside the block now.
                create("sync")
                async_to_sync(block.__aexit__)(Rollback, Rollback(), None)

            await sync_to_async(function)()
            await Entry.objects.acreate(name="after")

        async_to_sync(main)()
        create("sync, after")
        self.assertNames("after", "sync, after")
