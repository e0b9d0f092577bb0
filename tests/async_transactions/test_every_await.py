"""
Promise 7: a CancelledError delivered at any await of any of these APIs leaves
the transaction committed or rolled back, never open.
"""

import asyncio
import itertools

from asgiref.sync import async_to_sync, sync_to_async

from django.db import belonging, new_connection, transaction

from . import server
from .base import (
    AsyncTransactionTestCase,
    acreate,
    create,
    is_in_memory,
    is_native,
    names,
    wait_until,
)
from .interruptions import Interruption
from .models import Entry
from .pool import PoolTestCase

# What to cancel, given the number of the first suspension that's meant.
MOMENTS = {
    "once": lambda number: Interruption(number),
    "too late": lambda number: Interruption(number, late=True),
    "again": lambda number: Interruption(number, number + 1),
    "again, too late": lambda number: Interruption(number, number + 1, late=True),
    "again and again": lambda number: Interruption(*range(number, number + 20)),
}


async def nested(name):
    async with transaction.aatomic():
        await Entry.objects.acreate(name=name)


class Scenarios:
    """
    Each writes two rows whose names begin with `name`, and lets the commit
    call `callback`, which is a coroutine function.
    """

    async def block(self, name, callback):
        async with transaction.aatomic():
            await Entry.objects.acreate(name=f"{name} 1")
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"{name} 2")
                await asyncio.sleep(0)
            transaction.on_commit(callback)
            async for _ in Entry.objects.all():
                pass

    async def siblings(self, name, callback):
        async with transaction.aatomic():
            transaction.on_commit(callback)
            await asyncio.gather(nested(f"{name} 1"), nested(f"{name} 2"))

    async def nested_block_to_wait_for(self, name, callback):
        entered = asyncio.Event()

        async def nested():
            try:
                async with transaction.aatomic():
                    entered.set()
                    await Entry.objects.acreate(name=f"{name} 2")
            finally:
                entered.set()

        async with transaction.aatomic():
            await Entry.objects.acreate(name=f"{name} 1")
            transaction.on_commit(callback)
            task = asyncio.create_task(nested())
            # Nobody awaits it.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            await entered.wait()

    async def colours(self, name, callback):
        async with transaction.aatomic():
            transaction.on_commit(callback)
            await sync_to_async(create)(f"{name} 1")
            await asyncio.to_thread(names_in_thread)
            # Without a block: one entered after the end would be its own.
            await sync_to_async(async_to_sync(acreate))(f"{name} 2")

    async def functions(self, name, callback):
        async with transaction.aatomic():
            sid = await transaction.asavepoint_create()
            await Entry.objects.acreate(name=f"{name}, rolled back")
            await transaction.asavepoint_rollback(sid)
            sid = await transaction.asavepoint_create()
            await Entry.objects.acreate(name=f"{name} 1")
            await transaction.asavepoint_commit(sid)
            await transaction.aclean_savepoints()
            await transaction.aset_rollback(await transaction.aget_rollback())
            await transaction.aon_commit(callback)
            await Entry.objects.acreate(name=f"{name} 2")

    async def manual(self, name, callback):
        await transaction.aset_autocommit(False)
        try:
            # SQLite has no savepoints here.
            sid = await transaction.asavepoint_create()
            await Entry.objects.acreate(name=f"{name} 1")
            await transaction.asavepoint_commit(sid)
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"{name} 2")
                transaction.on_commit(callback)
            await transaction.acommit()
        except BaseException:
            await transaction.arollback()
            raise
        finally:
            await transaction.aset_autocommit(True)

    async def own_connection(self, name, callback):
        async with new_connection():
            await Entry.objects.acount()
            async with transaction.aatomic():
                await Entry.objects.acreate(name=f"{name} 1")
                transaction.on_commit(callback)
                await Entry.objects.acreate(name=f"{name} 2")

    async def own_connection_in_a_block(self, name, callback):
        async with transaction.aatomic():
            await Entry.objects.acreate(name=f"{name} 1")
            transaction.on_commit(callback)
            async with new_connection():
                await Entry.objects.acount()
            await Entry.objects.acreate(name=f"{name} 2")


def names_in_thread():
    return list(Entry.objects.values_list("name", flat=True))


class EveryAwaitMixin:
    scenarios = Scenarios()
    moments = MOMENTS

    def setUp(self):
        self.addCleanup(server.end_busy_sessions)
        super().setUp()
        if server.is_supported():
            # It would be opened thousands of times.
            observer = server.observer()
            self.query = observer.__enter__()
            self.addCleanup(observer.__exit__, None, None, None)

    async def cancel_everywhere(self, scenario):
        for moment, interruption_at in self.moments.items():
            # It's cancelled before and after the COMMIT, and not at last.
            expected = {(False, True), (True, True), (True, False)}
            outcomes = set()
            # In native mode, how often it's suspended also depends on how fast
            # the server is, so that some suspension may be left out.
            for _ in range(5 if is_native() else 1):
                if outcomes != expected:
                    outcomes |= await self.outcomes(scenario, moment, interruption_at)
            self.assertEqual(outcomes, expected)

    async def outcomes(self, scenario, moment, interruption_at):
        outcomes = set()
        for number in itertools.count():
            interruption = interruption_at(number)
            try:
                outcomes.add(await self.cancel(scenario, moment, interruption))
            except Exception as exc:
                exc.add_note(f"It was cancelled {moment}, at suspension {number}.")
                raise
            if not interruption.happened:
                return outcomes

    async def cancel(self, scenario, name, interruption):
        """Return whether it was committed, and whether it was cancelled."""
        called = []

        async def callback():
            called.append(name)

        task = asyncio.create_task(interruption.run(scenario(name, callback)))
        done, _ = await asyncio.wait([task], timeout=10)
        self.assertEqual(done, {task})
        if not task.cancelled():
            await task
        self.assertIs(task.cancelled(), interruption.happened)
        self.assertIsNone(belonging.current())
        self.assertIs(transaction.get_connection().in_atomic_block, False)
        found = await names()
        self.assertIn(found, ([], [f"{name} 1", f"{name} 2"]))
        self.assertEqual(called, [name] if found else [])
        if server.is_supported():
            self.assertIs(await asyncio.to_thread(self.nothing_is_open), True)
        async with transaction.aatomic():
            await Entry.objects.all().adelete()
        self.assertEqual(await names(), [])
        return bool(found), task.cancelled()

    def nothing_is_open(self):
        return wait_until(lambda: not self.query(server.BUSY_SESSIONS))

    async def test_block(self):
        await self.cancel_everywhere(self.scenarios.block)

    async def test_siblings(self):
        await self.cancel_everywhere(self.scenarios.siblings)

    async def test_nested_block_of_a_task(self):
        """The block around it goes on."""
        for number in itertools.count():
            interruption = Interruption(number)
            async with transaction.aatomic():
                await Entry.objects.acreate(name="a")
                task = asyncio.create_task(interruption.run(nested("nested")))
                await asyncio.wait([task], timeout=10)
                await Entry.objects.acreate(name="b")
            found = await names()
            self.assertIn(found, (["a", "b"], ["a", "b", "nested"]), number)
            if not interruption.happened:
                self.assertIn("nested", found)
                return
            await Entry.objects.all().adelete()

    async def test_nested_block_to_wait_for(self):
        await self.cancel_everywhere(self.scenarios.nested_block_to_wait_for)

    async def test_colours(self):
        await self.cancel_everywhere(self.scenarios.colours)

    async def test_functions(self):
        await self.cancel_everywhere(self.scenarios.functions)

    async def test_manual_transaction(self):
        await self.cancel_everywhere(self.scenarios.manual)

    async def test_own_connection(self):
        if is_in_memory():
            self.skipTest("An in-memory database has but one connection.")
        await self.cancel_everywhere(self.scenarios.own_connection)

    async def test_own_connection_in_a_block(self):
        if is_in_memory():
            self.skipTest("An in-memory database has but one connection.")
        await self.cancel_everywhere(self.scenarios.own_connection_in_a_block)


class EveryAwaitTests(EveryAwaitMixin, AsyncTransactionTestCase):
    pass


class EveryAwaitWithPoolTests(EveryAwaitMixin, PoolTestCase):
    # For the block, for new_connection() in it, and for the test.
    pool_options = {"min_size": 0, "max_size": 3, "timeout": 5}
    moments = {name: MOMENTS[name] for name in ("once", "again, too late")}
