"""
Promise 3: inside a transaction, executions take turns.
"""

import asyncio
import threading
import time

from asgiref.sync import async_to_sync, sync_to_async

from django.db import belonging, connection, sharing, transaction
from django.db.threads import TransactionThread
from django.db.transaction import TransactionManagementError
from django.db.turns import Turn
from django.test import SimpleTestCase, TransactionTestCase

from .base import (
    AsyncTransactionTestCase,
    Rollback,
    acreate,
    create,
    is_native,
    names,
    until,
)
from .models import Entry


class StatementsOnTheWire:
    """Record whether two statements were ever on the wire at the same time."""

    def __init__(self):
        self.now = 0
        self.most = 0
        self.lock = threading.Lock()

    def __call__(self, execute, *args):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return execute(*args)
        finally:
            with self.lock:
                self.now -= 1


class TurnTestsMixin:
    async def test_siblings_blocks_do_not_interleave(self):
        order = []

        async def block(name):
            async with transaction.aatomic():
                order.append(f"{name} in")
                await Entry.objects.acreate(name=name)
                await asyncio.sleep(0.01)
                order.append(f"{name} out")
                if name == "b":
                    raise Rollback

        async with transaction.aatomic():
            await asyncio.gather(
                *(block(name) for name in "abc"), return_exceptions=True
            )
        for first, second in zip(order[::2], order[1::2], strict=True):
            self.assertEqual(first.split()[0], second.split()[0])
        self.assertEqual(await names(), ["a", "c"])

    async def test_plain_statements_wait_for_a_siblings_block(self):
        """Nothing is rolled back with a sibling's savepoint."""
        inside = asyncio.Event()

        async def block():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="rolled back")
                inside.set()
                await asyncio.sleep(0.05)
                raise Rollback

        async def sibling(write, name):
            await until(inside)
            await write(name)

        async with transaction.aatomic():
            results = await asyncio.gather(
                block(),
                sibling(acreate, "async"),
                sibling(sync_to_async(create, thread_sensitive=False), "insensitive"),
                sibling(lambda name: asyncio.to_thread(create, name), "to_thread"),
                return_exceptions=True,
            )
        self.assertIsInstance(results[0], Rollback)
        self.assertEqual(results[1], None)
        self.assertEqual(await names(), ["async", "insensitive", "to_thread"])

    async def test_executemany_waits_for_a_siblings_block(self):
        """It does so as execute(), with a cursor from before the block."""
        opened = asyncio.Event()
        inside = threading.Event()
        loop = asyncio.get_running_loop()

        def insert():
            with transaction.get_connection().cursor() as cursor:
                loop.call_soon_threadsafe(opened.set)
                inside.wait(10)
                table = Entry._meta.db_table
                sql = f"INSERT INTO {table} (name, count) VALUES (%s, 0)"
                cursor.executemany(sql, [["a"], ["b"]])

        async with transaction.aatomic():
            task = asyncio.create_task(asyncio.to_thread(insert))
            await until(opened)
            turn = transaction.get_connection().turn
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    inside.set()
                    async with asyncio.timeout(10):
                        while not (turn._requests or task.done()):
                            await asyncio.sleep(0.001)
                    raise Rollback
            await task
        self.assertEqual(await names(), ["a", "b"])

    async def test_code_inside_the_nested_block_does_not_wait(self):
        async def deeper():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="deeper")

        async with transaction.aatomic():
            async with transaction.aatomic():
                await asyncio.gather(
                    Entry.objects.acreate(name="gather"),
                    asyncio.to_thread(create, "to_thread"),
                    deeper(),
                )
        self.assertEqual(await names(), ["deeper", "gather", "to_thread"])

    async def test_one_statement_on_the_wire(self):
        wire = StatementsOnTheWire()
        async with transaction.aatomic():
            with transaction.get_connection().execute_wrapper(wire):
                await asyncio.gather(
                    *(asyncio.to_thread(create, f"a {n}") for n in range(5)),
                    *(Entry.objects.acreate(name=f"b {n}") for n in range(5)),
                )
        self.assertEqual(wire.most, 1)
        self.assertEqual(len(await names()), 10)

    async def test_a_long_statement(self):
        """It ends by itself, so that waiting for it isn't in vain."""
        sharing.TURN_TIMEOUT = 0.5
        running = threading.Event()

        def slow(execute, *args):
            running.set()
            time.sleep(1.2)
            return execute(*args)

        def create_slowly():
            with transaction.get_connection().execute_wrapper(slow):
                create("slowly")

        def create_meanwhile():
            running.wait(10)
            create("meanwhile")

        async with transaction.aatomic():
            await asyncio.gather(
                asyncio.to_thread(create_slowly), asyncio.to_thread(create_meanwhile)
            )
        self.assertEqual(await names(), ["meanwhile", "slowly"])

    async def test_a_wait_that_cannot_end(self):
        """The nested block awaits a task that was started before it."""
        sharing.TURN_TIMEOUT = 0.3
        inside = asyncio.Event()

        async def earlier():
            await until(inside)
            await asyncio.to_thread(create, "earlier")

        async with transaction.aatomic():
            task = asyncio.create_task(earlier(), name="the earlier task")
            async with transaction.aatomic():
                inside.set()
                msg = (
                    "waited 0.3 seconds for the block that "
                    f"task '{asyncio.current_task().get_name()}' opened on the "
                    "database 'default' to end."
                )
                with self.assertRaisesMessage(TransactionManagementError, msg):
                    await task
            await Entry.objects.acreate(name="usable")
        self.assertEqual(await names(), ["usable"])

    async def test_a_block_that_cannot_be_entered(self):
        sharing.TURN_TIMEOUT = 0.3
        inside = asyncio.Event()

        async def earlier():
            await until(inside)
            async with transaction.aatomic():
                self.fail("The block was entered.")

        async with transaction.aatomic():
            task = asyncio.create_task(earlier(), name="the earlier task")
            async with transaction.aatomic():
                inside.set()
                msg = "task 'the earlier task' waited 0.3 seconds for the block that"
                with self.assertRaisesMessage(TransactionManagementError, msg):
                    await task
            await Entry.objects.acreate(name="usable")
        self.assertEqual(await names(), ["usable"])

    async def test_waiting_does_not_block_the_loop(self):
        longest = 0

        async def heartbeat():
            nonlocal longest
            loop = asyncio.get_running_loop()
            while True:
                before = loop.time()
                await asyncio.sleep(0.005)
                longest = max(longest, loop.time() - before)

        async def block(name):
            async with transaction.aatomic():
                await asyncio.sleep(0.3)
                await Entry.objects.acreate(name=name)

        async with transaction.aatomic():
            task = asyncio.create_task(heartbeat())
            await asyncio.gather(
                *(block(name) for name in "ab"),
                *(Entry.objects.acreate(name=f"plain {name}") for name in "ab"),
            )
            task.cancel()
        # Each of the waits lasts for 300 ms or longer.
        self.assertLess(longest, 0.25)


class OwnTransactionTurnTests(TurnTestsMixin, AsyncTransactionTestCase):
    async def test_raw_sync_code_waits_for_a_siblings_block(self):
        """
        It waits in the transaction's own thread, which serves the nested
        block meanwhile.
        """
        inside = asyncio.Event()

        async def block():
            async with transaction.aatomic():
                inside.set()
                await asyncio.sleep(0.05)
                await Entry.objects.acreate(name="rolled back")
                await sync_to_async(create)("rolled back, too")
                raise Rollback

        async def sibling(name):
            await until(inside)
            await sync_to_async(create)(name)

        async with transaction.aatomic():
            results = await asyncio.gather(
                block(), sibling("a"), sibling("b"), return_exceptions=True
            )
        self.assertIsInstance(results[0], Rollback)
        self.assertEqual(results[1:], [None, None])
        await self.assertAsyncNames("a", "b")


class SyncTransactionTurnTests(TurnTestsMixin, TransactionTestCase):
    """The same below a synchronous block, whose thread the blocks share."""

    available_apps = ["async_transactions"]

    def setUp(self):
        self.addCleanup(setattr, sharing, "TURN_TIMEOUT", sharing.TURN_TIMEOUT)
        sharing.TURN_TIMEOUT = 10
        # As TestCase does it.
        atomic = transaction.atomic()
        atomic.__enter__()
        self.addCleanup(atomic.__exit__, None, None, None)
        self.addCleanup(transaction.set_rollback, True)

    async def test_raw_sync_code_is_refused(self):
        """Waiting would occupy the thread that the nested block needs."""
        inside = asyncio.Event()

        async def sibling():
            await until(inside)
            if is_native():
                # It doesn't need the thread.
                await sync_to_async(create)("sibling")
                return
            with self.assertRaisesMessage(
                TransactionManagementError, "because that block needs the thread"
            ):
                await sync_to_async(create)("refused")

        async def block():
            async with transaction.aatomic():
                inside.set()
                await asyncio.sleep(0.05)
                await Entry.objects.acreate(name="block")

        await asyncio.gather(block(), sibling())
        await Entry.objects.acreate(name="usable")
        expected = (
            ["block", "sibling", "usable"] if is_native() else ["block", "usable"]
        )
        self.assertEqual(await names(), expected)


class TurnsEndTests(AsyncTransactionTestCase):
    def test_sharing_ends_with_the_transaction(self):
        async def main():
            async with transaction.aatomic():
                await asyncio.to_thread(create, "thread")

        with transaction.atomic():
            async_to_sync(main)()
            self.assertIsNotNone(connection.turn)
        self.assertIsNone(connection.turn)
        self.assertNames("thread")


class ThreadTurnTests(SimpleTestCase):
    async def test_turn_comes_before_the_thread_is_idle(self):
        """Between the request and the wait, another thread ends a block."""
        turn = Turn()
        ended = False

        class Waiter:
            def __init__(self):
                self.waiter = belonging.working.waiter_class()
                self.grant = self.waiter.grant

            def wait(self, timeout):
                nonlocal ended
                if not ended:
                    ended = True
                    turn.changed()
                self.waiter.wait(timeout)

        thread = TransactionThread(
            "thread", lambda: None, asyncio.get_running_loop(), None
        )
        self.addCleanup(thread.shutdown)
        taken = thread.submit(turn.take, "holder", lambda: ended, 1, Waiter)
        self.assertIs(await asyncio.wrap_future(taken), True)
        self.assertEqual(turn.depth, 1)
