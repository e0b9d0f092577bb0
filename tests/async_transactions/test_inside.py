"""
Promise 2: a transaction covers what is started inside it.
"""

import asyncio
import contextvars

from asgiref.sync import async_to_sync, sync_to_async

from django.db import transaction
from django.db.models.signals import pre_save
from django.dispatch import Signal
from django.test import TestCase

from .base import AsyncTransactionTestCase, Rollback, acreate, create, names
from .models import Entry
from .test_sync_blocks import SyncBlockTestCase

variable = contextvars.ContextVar("variable", default=None)


class InsideAatomicTests(AsyncTransactionTestCase):
    async def assertInside(self, work, *expected):
        """What `work` writes is seen in the block and rolled back with it."""
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await work()
                self.assertEqual(await names(), sorted(expected))
                raise Rollback
        await self.assertAsyncNames()
        async with transaction.aatomic():
            await work()
        await self.assertAsyncNames(*expected)

    async def test_coroutines(self):
        await self.assertInside(lambda: acreate("a"), "a")

    async def test_gather(self):
        async def work():
            await asyncio.gather(*(acreate(f"{number}") for number in range(5)))

        await self.assertInside(work, *"01234")

    async def test_task_group_shield_and_wait_for(self):
        async def work():
            async with asyncio.TaskGroup() as group:
                group.create_task(acreate("a"))
                group.create_task(asyncio.to_thread(create, "b"))
            await asyncio.shield(acreate("c"))
            await asyncio.wait_for(acreate("d"), 10)
            async with asyncio.timeout(10):
                await acreate("e")

        await self.assertInside(work, *"abcde")

    async def test_sync_code(self):
        async def work():
            await sync_to_async(create)("a")
            await sync_to_async(create, thread_sensitive=False)("b")
            await asyncio.to_thread(create, "c")

        await self.assertInside(work, *"abc")

    async def test_sync_blocks(self):
        def block(name):
            with transaction.atomic():
                create(name)
            try:
                with transaction.atomic():
                    create(f"{name}, rolled back")
                    raise Rollback
            except Rollback:
                pass

        async def work():
            await sync_to_async(block)("a")
            await sync_to_async(block, thread_sensitive=False)("b")
            await asyncio.to_thread(block, "c")

        await self.assertInside(work, *"abc")

    async def test_back_to_async(self):
        def back(name):
            create(f"{name}, before")
            async_to_sync(acreate)(name)
            create(f"{name}, after")

        async def work():
            await sync_to_async(back)("a")
            await asyncio.to_thread(back, "b")

        await self.assertInside(
            work, "a", "a, before", "a, after", "b", "b, before", "b, after"
        )

    async def test_another_loop(self):
        def start(name):
            create(f"{name}, before")
            asyncio.run(acreate(name))

        async def work():
            await sync_to_async(start)("a")
            await sync_to_async(start, thread_sensitive=False)("b")
            await asyncio.to_thread(start, "c")

        await self.assertInside(
            work, "a", "a, before", "b", "b, before", "c", "c, before"
        )

    async def test_three_deep(self):
        async def innermost(name):
            async with transaction.aatomic():
                await acreate(name)
            await asyncio.to_thread(create, f"{name}, thread")

        def middle(name):
            with transaction.atomic():
                async_to_sync(innermost)(name)

        async def outer(name):
            async with transaction.aatomic():
                await sync_to_async(middle)(name)

        def outermost(name):
            with transaction.atomic():
                async_to_sync(outer)(name)

        async def work():
            await outer("a")
            await sync_to_async(outermost)("b")
            await asyncio.to_thread(outermost, "c")

        await self.assertInside(
            work, "a", "a, thread", "b", "b, thread", "c", "c, thread"
        )

    async def test_signal_receivers(self):
        signal = Signal()

        def sync_receiver(**kwargs):
            create("sync")

        async def async_receiver(**kwargs):
            async with transaction.aatomic():
                await acreate("async")

        async def another(**kwargs):
            async with transaction.aatomic():
                await acreate("another")

        for receiver in (sync_receiver, async_receiver, another):
            signal.connect(receiver)

        await self.assertInside(lambda: signal.asend(self), "another", "async", "sync")
        await Entry.objects.all().adelete()
        await self.assertInside(
            lambda: sync_to_async(signal.send)(self), "another", "async", "sync"
        )

    async def test_model_signals(self):
        def receiver(instance, **kwargs):
            if instance.name == "a":
                create("from the receiver")

        pre_save.connect(receiver, sender=Entry)
        self.addCleanup(pre_save.disconnect, receiver, sender=Entry)
        await self.assertInside(lambda: acreate("a"), "a", "from the receiver")

    async def test_durable_across_a_crossing(self):
        def durable():
            with transaction.atomic(durable=True):
                pass

        msg = "A durable atomic block cannot be nested within another atomic block."
        async with transaction.aatomic():
            for call in (
                sync_to_async(durable),
                sync_to_async(durable, thread_sensitive=False),
                lambda: asyncio.to_thread(durable),
            ):
                with self.assertRaisesMessage(RuntimeError, msg):
                    await call()
            await acreate("usable")
        await self.assertAsyncNames("usable")

    async def test_context_variables(self):
        def set_in_sync():
            self.assertEqual(variable.get(), "async")
            variable.set("sync")

        variable.set("async")
        async with transaction.aatomic():
            self.assertEqual(variable.get(), "async")
            await sync_to_async(set_in_sync)()
            self.assertEqual(variable.get(), "sync")
            variable.set("inside")
        self.assertEqual(variable.get(), "inside")

    async def test_other_thread_while_the_blocks_thread_is_busy(self):
        def both():
            async def main():
                await asyncio.gather(
                    acreate("a"), asyncio.to_thread(create, "b"), acreate("c")
                )

            async_to_sync(main)()

        await self.assertInside(sync_to_async(both), *"abc")


class InsideAtomicTests(SyncBlockTestCase):
    async def everything(self):
        await acreate("before")
        async with transaction.aatomic():
            await acreate("nested")
            await asyncio.to_thread(create, "nested, to_thread")
        try:
            async with transaction.aatomic():
                await acreate("rolled back")
                raise Rollback
        except Rollback:
            pass
        await acreate("after")

    expected = ["after", "before", "nested", "nested, to_thread"]

    def test_async_to_sync(self):
        self.assertInside(lambda: async_to_sync(self.everything)(), *self.expected)

    def test_asyncio_run(self):
        self.assertInside(lambda: asyncio.run(self.everything()), *self.expected)

    def test_durable_is_enforced(self):
        async def main():
            async with transaction.aatomic(durable=True):
                pass

        msg = "A durable atomic block cannot be nested within another atomic block."
        with transaction.atomic():
            with self.assertRaisesMessage(RuntimeError, msg):
                async_to_sync(main)()
            create("usable")
        self.assertNames("usable")

    def test_on_commit_inside(self):
        called = []

        async def main():
            transaction.on_commit(lambda: called.append("outer"))
            async with transaction.aatomic():
                transaction.on_commit(lambda: called.append("nested"))
            try:
                async with transaction.aatomic():
                    transaction.on_commit(lambda: called.append("rolled back"))
                    raise Rollback
            except Rollback:
                pass

        with transaction.atomic():
            async_to_sync(main)()
            self.assertEqual(called, [])
        self.assertEqual(called, ["outer", "nested"])


class InsideTestCaseTests(TestCase):
    """TestCase's own blocks cover what its asynchronous tests do."""

    @classmethod
    def setUpTestData(cls):
        cls.entry = create("fixture")

    async def test_blocks_nest_in_the_testcase(self):
        async with transaction.aatomic(durable=True):
            await acreate("durable")
        async with transaction.aatomic():
            await asyncio.gather(acreate("a"), asyncio.to_thread(create, "b"))
        self.assertEqual(await names(), ["a", "b", "durable", "fixture"])

    async def test_nothing_is_left_of_other_tests(self):
        self.assertEqual(await names(), ["fixture"])

    async def test_siblings_with_blocks(self):
        async def block(name):
            async with transaction.aatomic():
                await acreate(name)
                await asyncio.sleep(0.01)
                if name == "b":
                    raise Rollback

        results = await asyncio.gather(
            *(block(name) for name in "abc"), acreate("d"), return_exceptions=True
        )
        self.assertIsInstance(results[1], Rollback)
        self.assertEqual(await names(), ["a", "c", "d", "fixture"])
