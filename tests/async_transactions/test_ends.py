"""
Promises 4 and 5: a block's end is the end, and who ends it doesn't matter.
"""

import asyncio
import contextvars
import threading
from contextlib import suppress
from functools import partial
from unittest import mock

from asgiref.sync import async_to_sync, sync_to_async

from django.db import (
    OperationalError,
    async_atomic,
    connection,
    connections,
    sharing,
    transaction,
)
from django.db.async_calls import run_sync
from django.db.transaction import TransactionManagementError

from .base import (
    AsyncTransactionTestCase,
    Rollback,
    create,
    create_and_close,
    is_in_memory,
    names,
    slow_query,
    until,
)
from .models import Entry

OUTLIVED = "can't use the database 'default' any more, because the block that it was"


class OutlivingTests(AsyncTransactionTestCase):
    async def outlive(self, use, **kwargs):
        """Call `use` in a task that goes on after its block has ended."""
        over = asyncio.Event()

        async def late():
            await until(over)
            return await use()

        async with transaction.aatomic():
            task = asyncio.create_task(late(), name="the late task")
            await asyncio.sleep(0)
        over.set()
        return await task

    async def test_every_use_is_refused(self):
        async def evaluate():
            return [entry async for entry in Entry.objects.all()]

        uses = {
            "a method": lambda: Entry.objects.acreate(name="late"),
            "iteration": evaluate,
            "sync_to_async": lambda: sync_to_async(create)("late"),
            "insensitive": lambda: sync_to_async(create, thread_sensitive=False)(
                "late"
            ),
            "to_thread": lambda: asyncio.to_thread(create_and_close, "late"),
            "on_commit": sync_to_async(lambda: transaction.on_commit(print)),
        }
        for name, use in uses.items():
            with self.subTest(name):
                with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
                    await self.outlive(use)
        await self.assertAsyncNames()

    async def test_message(self):
        opener = asyncio.current_task().get_name()
        msg = (
            "task 'the late task' can't use the database 'default' any more, because "
            "the block that it was started in, opened by task "
            f"'{opener}', has ended. Await it inside the block, leave what has to "
            "follow the commit to on_commit(), or open a block of its own or "
            "new_connection()."
        )
        with self.assertRaisesMessage(TransactionManagementError, msg):
            await self.outlive(lambda: Entry.objects.acreate(name="late"))

    async def test_a_block_of_its_own(self):
        async def use():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="own block")
            with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
                await Entry.objects.acreate(name="late")
            return "done"

        self.assertEqual(await self.outlive(use), "done")
        await self.assertAsyncNames("own block")

    async def test_a_sync_block_of_its_own(self):
        def use():
            with transaction.atomic():
                create("own block")
            try:
                with transaction.atomic():
                    create("rolled back")
                    raise Rollback
            except Rollback:
                pass
            with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
                create("late")
            connections.close_all()

        await self.outlive(lambda: asyncio.to_thread(use))
        await self.assertAsyncNames("own block")

    async def test_run_sync_with_a_block_of_its_own(self):
        def use():
            with transaction.atomic():
                create("own block")

        async def use_twice():
            await run_sync(use)
            with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
                await Entry.objects.acreate(name="late")

        await self.outlive(use_twice)
        await self.assertAsyncNames("own block")

    async def test_a_loop_of_its_own(self):
        """What async_to_sync() brings back to a thread is what was there."""

        def use():
            async_to_sync(asyncio.sleep)(0)
            with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
                create_and_close("late")

        await self.outlive(lambda: asyncio.to_thread(use))
        await self.assertAsyncNames()

    async def test_outliving_a_nested_block(self):
        over = asyncio.Event()

        async def late():
            await until(over)
            with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
                await Entry.objects.acreate(name="late")

        async with transaction.aatomic():
            async with transaction.aatomic():
                task = asyncio.create_task(late())
                await asyncio.sleep(0)
            over.set()
            await task
            await Entry.objects.acreate(name="usable")
        await self.assertAsyncNames("usable")

    async def test_a_sibling_that_goes_on_after_a_failure(self):
        wrote = asyncio.Event()
        failed = asyncio.Event()
        outcome = asyncio.get_running_loop().create_future()

        async def fails():
            await until(wrote)
            await Entry.objects.acreate(name="fails")
            raise Rollback

        async def goes_on():
            await Entry.objects.acreate(name="before")
            wrote.set()
            await until(failed)
            try:
                await Entry.objects.acreate(name="after")
            except Exception as exc:
                outcome.set_result(exc)

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await asyncio.gather(fails(), goes_on())
        failed.set()
        exception = await asyncio.wait_for(outcome, 10)
        self.assertIsInstance(exception, TransactionManagementError)
        await self.assertAsyncNames()

    async def test_a_sibling_that_is_writing(self):
        """No statement that's running when another task fails is kept."""

        def writes():
            for number in range(100_000):
                create(f"{number}")

        async def fails():
            await asyncio.sleep(0.05)
            raise Rollback

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                thread = asyncio.create_task(asyncio.to_thread(writes))
                await asyncio.gather(thread, fails())
        # A running statement is cancelled, the next one refused.
        with self.assertRaises((OperationalError, TransactionManagementError)):
            await thread
        await self.assertAsyncNames()

    async def test_siblings_that_wait_for_their_turn(self):
        """They arrived before, and yet don't delay the rollback."""
        release = threading.Event()

        def use():
            # As each statement does it.
            with sharing.taking_turn(transaction.get_connection()):
                release.wait(10)

        async def requested(turn, count):
            async with asyncio.timeout(10):
                while len(turn._requests) < count or not turn.depth:
                    await asyncio.sleep(0.001)

        async def release_later(turn):
            # The rollback is the last one.
            await requested(turn, 4)
            release.set()

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                turn = transaction.get_connection().turn
                holder = asyncio.create_task(asyncio.to_thread(use))
                await requested(turn, 0)
                siblings = [
                    asyncio.create_task(asyncio.to_thread(use)) for _ in range(3)
                ]
                await requested(turn, 3)
                releaser = asyncio.create_task(release_later(turn))
                raise Rollback
        await asyncio.gather(holder, releaser)
        for sibling in siblings:
            with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
                await sibling

    async def test_a_captured_connection_is_refused(self):
        """It neither sends anything nor connects again."""
        if is_in_memory():
            self.skipTest("An in-memory database has but one connection.")

        async def use():
            with self.assertRaises(TransactionManagementError):
                await sync_to_async(lambda: captured.cursor())()
            return captured.in_atomic_block

        over = asyncio.Event()

        async def late():
            await until(over)
            return await use()

        async with transaction.aatomic():
            captured = transaction.get_connection()
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        over.set()
        self.assertIs(await task, False)
        # Also while another block has the session.
        over.clear()
        async with transaction.aatomic():
            task = asyncio.create_task(late())
            captured = transaction.get_connection()
        async with transaction.aatomic():
            self.assertIsNot(transaction.get_connection(), captured)
            over.set()
            self.assertIs(await task, False)


class OutlivedNestedBlockTests(AsyncTransactionTestCase):
    """
    Promise 2: who has outlived a nested block is still inside the ones around
    it that are open. The blocks that it opens are nested in there.
    """

    databases = {"default", "other"}

    async def outlive(self, use):
        """Return a task that calls `use` after its nested block has ended."""
        over = asyncio.Event()

        async def late():
            await until(over)
            return await use()

        async with transaction.aatomic():
            task = asyncio.create_task(late())
            await Entry.objects.acreate(name="nested")
        over.set()
        return task

    async def use(self, **kwargs):
        """Write in a block, and return what's seen there."""
        async with transaction.aatomic(**kwargs):
            seen = await names()
            await Entry.objects.acreate(name="late")
            await Entry.objects.using("other").acreate(name="late")
        with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
            await Entry.objects.acreate(name="refused")
        return seen

    def use_sync(self, **kwargs):
        """Do so synchronously."""
        with transaction.atomic(**kwargs):
            seen = sorted(Entry.objects.values_list("name", flat=True))
            create("late")
            Entry.objects.using("other").create(name="late")
        with self.assertRaisesMessage(TransactionManagementError, OUTLIVED):
            create("refused")
        return seen

    def use_in_thread(self, **kwargs):
        try:
            return self.use_sync(**kwargs)
        finally:
            connections.close_all()

    def uses(self):
        return {
            "aatomic": self.use,
            "sync_to_async": sync_to_async(self.use_sync),
            "insensitive": sync_to_async(self.use_in_thread, thread_sensitive=False),
            "to_thread": partial(asyncio.to_thread, self.use_in_thread),
            "run_sync": partial(run_sync, self.use_sync),
        }

    async def test_rollback_of_the_block_around(self):
        for name, use in self.uses().items():
            with self.subTest(name):
                with self.assertRaises(Rollback):
                    async with transaction.aatomic():
                        await Entry.objects.acreate(name="outer")
                        seen = await (await self.outlive(use))
                        self.assertEqual(seen, ["nested", "outer"])
                        raise Rollback
                await self.assertAsyncNames()
                await Entry.objects.using("other").aget(name="late")
            await Entry.objects.using("other").all().adelete()

    async def test_rollback(self):
        async def use():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                raise Rollback

        async with transaction.aatomic():
            with self.assertRaises(Rollback):
                await (await self.outlive(use))
            await Entry.objects.acreate(name="outer")
        await self.assertAsyncNames("nested", "outer")

    async def test_durable(self):
        msg = "A durable atomic block cannot be nested within another atomic block."
        for name, use in self.uses().items():
            with self.subTest(name):
                with self.assertRaises(Rollback):
                    async with transaction.aatomic():
                        task = await self.outlive(partial(use, durable=True))
                        with self.assertRaisesMessage(RuntimeError, msg):
                            await task
                        raise Rollback
        await self.assertAsyncNames()

    def test_below_a_sync_block(self):
        async def main(use):
            await Entry.objects.acreate(name="outer")
            return await (await self.outlive(use))

        for name, use in self.uses().items():
            with self.subTest(name):
                with self.assertRaises(Rollback), transaction.atomic():
                    self.assertEqual(async_to_sync(main)(use), ["nested", "outer"])
                    raise Rollback
                self.assertNames()
            Entry.objects.using("other").all().delete()

    async def test_inside_a_block_for_another_database(self):
        """The block that was outlived needn't be the innermost one."""

        async def inside(use):
            async with transaction.aatomic("other"):
                self.seen = await use()
                raise Rollback

        def inside_sync(use):
            with transaction.atomic("other"):
                self.seen = use()
                raise Rollback

        uses = {
            "asynchronous": partial(inside, self.use),
            "asynchronous, synchronous": partial(
                inside, partial(run_sync, self.use_sync)
            ),
            "synchronous": partial(run_sync, inside_sync, self.use_sync),
            "synchronous, asynchronous": partial(
                run_sync, inside_sync, async_to_sync(self.use)
            ),
        }
        for name, use in uses.items():
            with self.subTest(name):
                async with transaction.aatomic():
                    with self.assertRaises(Rollback):
                        await (await self.outlive(use))
                self.assertEqual(self.seen, ["nested"])
                await self.assertAsyncNames("late", "nested")
                self.assertIs(await Entry.objects.using("other").aexists(), False)
            await Entry.objects.all().adelete()

    async def test_turn(self):
        entered = asyncio.Event()

        async def use():
            async with transaction.aatomic():
                entered.set()
                await Entry.objects.acreate(name="late")

        async with transaction.aatomic():
            task = await self.outlive(use)
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="rolled back")
                    self.assertIs(entered.is_set(), False)
                    raise Rollback
            await task
        await self.assertAsyncNames("late", "nested")

    async def test_turn_that_never_comes(self):
        sharing.TURN_TIMEOUT = 0.3

        async def use():
            async with transaction.aatomic():
                self.fail("The block was entered.")

        async with transaction.aatomic():
            task = await self.outlive(use)
            async with transaction.aatomic():
                msg = "waited 0.3 seconds for the block that"
                with self.assertRaisesMessage(TransactionManagementError, msg):
                    await asyncio.wait_for(task, 10)
        await self.assertAsyncNames("nested")

    async def test_swallowed_cancellation(self):
        """Promise 7: the outermost block, which is open, says so."""

        async def use():
            async with transaction.aatomic():
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await sync_to_async(slow_query)()

        def block():
            with transaction.atomic(), suppress(BaseException):
                slow_query()

        async def use_sync():
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await run_sync(block)

        msg = "was cancelled inside the block that"
        for use in (use, use_sync):
            with self.subTest(use=use):
                with self.assertRaisesMessage(TransactionManagementError, msg):
                    async with transaction.aatomic():
                        await (await self.outlive(use))
                await self.assertAsyncNames()


class LeavingTests(AsyncTransactionTestCase):
    async def test_leaving_waits_for_nested_blocks(self):
        inside = asyncio.Event()

        async def nested():
            async with transaction.aatomic():
                inside.set()
                await asyncio.sleep(0.05)
                await Entry.objects.acreate(name="nested")

        async with transaction.aatomic():
            task = asyncio.create_task(nested())
            await until(inside)
        self.assertIs(task.done() or not await task, True)
        await self.assertAsyncNames("nested")

    async def test_swallowed_in_a_nested_block(self):
        """
        Whoever waits for it to be left learns of the cancellation before
        (promise 7).
        """
        swallowed = asyncio.Event()
        exit = async_atomic._Nested._exit

        async def exit_slowly(entry, *exc_info):
            await exit(entry, *exc_info)
            await asyncio.sleep(0.2)

        async def nested():
            async with transaction.aatomic():
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await run_sync(slow_query)
                swallowed.set()
                await asyncio.sleep(0.05)

        msg = "was cancelled inside the block that"
        with mock.patch.object(async_atomic._Nested, "_exit", exit_slowly):
            with self.assertRaisesMessage(TransactionManagementError, msg):
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="rolled back")
                    task = asyncio.create_task(nested())
                    await until(swallowed)
            await task
        await self.assertAsyncNames()

    async def test_cancelled_while_a_nested_block_is_left(self):
        """That's raised, whatever was swallowed in the nested one before."""
        inside = asyncio.Event()
        leaves = asyncio.Event()
        over = asyncio.Event()

        async def innermost():
            async with transaction.aatomic():
                inside.set()
                await until(over)

        async def work():
            async with transaction.aatomic():
                async with transaction.aatomic():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.1):
                            await run_sync(slow_query)
                    tasks.append(asyncio.create_task(innermost()))
                    await until(inside)
                    leaves.set()
                self.fail("It went on.")

        tasks = []
        task = asyncio.create_task(work())
        await until(leaves)
        await asyncio.sleep(0.05)
        task.cancel()
        over.set()
        with self.assertRaises(asyncio.CancelledError):
            await task
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.assertAsyncNames()

    async def test_an_exception_rolls_back_at_once(self):
        inside = asyncio.Event()
        over = asyncio.Event()

        async def nested():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="nested")
                inside.set()
                await until(over)

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                task = asyncio.create_task(nested())
                await until(inside)
                raise Rollback
        await self.assertAsyncNames()
        over.set()
        msg = "was rolled back, because a block around it ended first"
        with self.assertRaisesMessage(TransactionManagementError, msg):
            await task
        await self.assertAsyncNames()

    async def test_a_nested_block_in_a_thread(self):
        inside = asyncio.Event()
        over = asyncio.Event()
        loop = asyncio.get_running_loop()

        def nested():
            with transaction.atomic():
                create("nested")
                loop.call_soon_threadsafe(inside.set)
                asyncio.run_coroutine_threadsafe(over.wait(), loop).result()
                create("late")

        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                task = asyncio.create_task(asyncio.to_thread(nested))
                await until(inside)
                raise Rollback
        over.set()
        with self.assertRaises(TransactionManagementError):
            await task
        await self.assertAsyncNames()

    async def test_a_nested_block_of_a_sibling_is_rolled_back_alone(self):
        """An outer savepoint is left by an exception while it's open."""
        inside = asyncio.Event()

        async def nested():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="nested")
                inside.set()
                await asyncio.sleep(10)

        async with transaction.aatomic():
            await Entry.objects.acreate(name="outer")
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="middle")
                    task = asyncio.create_task(nested())
                    await until(inside)
                    raise Rollback
            task.cancel()
            await asyncio.wait([task])
            await Entry.objects.acreate(name="usable")
        await self.assertAsyncNames("outer", "usable")


class WhoEndsItTests(AsyncTransactionTestCase):
    async def generator(self, fail=False):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="generator")
            yield await names()
            await Entry.objects.acreate(name="resumed")
            if fail:
                raise Rollback

    async def test_async_generator(self):
        async for found in self.generator():
            self.assertEqual(found, ["generator"])
        await self.assertAsyncNames("generator", "resumed")

    async def test_async_generator_closed_by_its_consumer(self):
        generator = self.generator()
        await anext(generator)
        await generator.aclose()
        await Entry.objects.acreate(name="consumer")
        await self.assertAsyncNames("consumer")

    async def test_async_generator_closed_by_another_task(self):
        generator = self.generator()
        await anext(generator)
        await asyncio.create_task(generator.aclose())
        await Entry.objects.acreate(name="consumer")
        await sync_to_async(create)("consumer, sync")
        await self.assertAsyncNames("consumer", "consumer, sync")

    async def test_async_generator_closed_by_the_loop(self):
        async for _ in self.generator():
            break
        # The loop's hook closes it in a task, once nothing refers to it.
        del _
        for _ in range(100):
            if not connection.blocks and not transaction.get_connection().blocks:
                break
            await asyncio.sleep(0.01)
        await Entry.objects.acreate(name="consumer")
        await self.assertAsyncNames("consumer")

    async def test_left_by_another_task(self):
        block = transaction.aatomic()
        await asyncio.create_task(block.__aenter__())
        await asyncio.create_task(block.__aexit__(None, None, None))
        await Entry.objects.acreate(name="after")
        await self.assertAsyncNames("after")

    async def test_never_left(self):
        """
        A later task isn't inside of it, although it has the id() of the task
        that entered it. The block ends with its event loop.
        """
        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")
        opener = asyncio.create_task(transaction.aatomic().__aenter__())
        await opener
        number = id(opener)
        del opener

        async def foreign():
            if id(asyncio.current_task()) != number:
                return False
            await self.write("foreign")
            return True

        for _ in range(1000):
            if await asyncio.create_task(foreign()):
                break
        else:
            self.skipTest("No other task got the id().")
        async with transaction.aatomic():
            self.assertEqual(await names(), ["foreign"])

    async def test_entered_and_left_in_contexts_of_their_own(self):
        """As frameworks do that set up tests in a task."""
        block = transaction.aatomic()
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        await loop.create_task(block.__aenter__(), context=context)
        await loop.create_task(self.write("inside"), context=context)
        if not is_in_memory():
            self.assertEqual(await names(), [])
        await loop.create_task(
            block.__aexit__(Rollback, Rollback(), None), context=context
        )
        await loop.create_task(self.write("after"), context=context)
        await self.assertAsyncNames("after")

    async def write(self, name):
        await Entry.objects.acreate(name=name)

    async def test_one_instance_in_many_tasks(self):
        block = transaction.aatomic()

        async def work(number):
            async with block:
                await Entry.objects.acreate(name=f"{number}")
                await asyncio.sleep(0.001)
                if number % 2:
                    raise Rollback

        await asyncio.gather(*(work(n) for n in range(6)), return_exceptions=True)
        await self.assertAsyncNames("0", "2", "4")
