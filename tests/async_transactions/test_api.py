"""
Promise 6: the asynchronous counterparts of transaction's functions.
"""

import asyncio
import inspect

from asgiref.sync import sync_to_async

from django.db import IntegrityError, connection, transaction
from django.db.async_calls import run_sync
from django.db.transaction import TransactionManagementError

from .base import (
    AsyncTransactionTestCase,
    Rollback,
    create,
    is_in_memory,
    names,
    until,
)
from .models import Entry

COUNTERPARTS = [
    "clean_savepoints",
    "commit",
    "get_autocommit",
    "get_rollback",
    "mark_for_rollback_on_error",
    "on_commit",
    "rollback",
    "savepoint_commit",
    "savepoint_create",
    "savepoint_rollback",
    "set_autocommit",
    "set_rollback",
]


class EndTestCase(AsyncTransactionTestCase):
    async def assertEndRefused(self, msg):
        """Nothing that would end a transaction is accepted."""
        for call in (
            transaction.acommit(),
            transaction.arollback(),
            transaction.aset_autocommit(True),
            transaction.aset_autocommit(False),
        ):
            with self.assertRaisesMessage(TransactionManagementError, msg):
                await call


class FunctionTests(EndTestCase):
    def test_signatures(self):
        for name in COUNTERPARTS:
            with self.subTest(name):
                self.assertEqual(
                    inspect.signature(getattr(transaction, f"a{name}")),
                    inspect.signature(getattr(transaction, name)),
                )

    async def test_autocommit(self):
        self.assertIs(await transaction.aget_autocommit(), True)
        async with transaction.aatomic():
            if connection.vendor != "sqlite":
                self.assertIs(await transaction.aget_autocommit(), False)
            msg = "This is forbidden when an 'atomic' block is active."
            await self.assertEndRefused(msg)
            await Entry.objects.acreate(name="usable")
        self.assertIs(await transaction.aget_autocommit(), True)
        await self.assertAsyncNames("usable")

    async def test_savepoints(self):
        async with transaction.aatomic():
            await Entry.objects.acreate(name="first")
            sid = await transaction.asavepoint_create()
            await Entry.objects.acreate(name="rolled back")
            await transaction.asavepoint_rollback(sid)
            await transaction.asavepoint_commit(sid)
            sid = await transaction.asavepoint_create()
            await Entry.objects.acreate(name="second")
            await transaction.asavepoint_commit(sid)
            await transaction.aclean_savepoints()
            self.assertEqual(transaction.get_connection().savepoint_state, 0)
        await self.assertAsyncNames("first", "second")

    async def test_recovery_by_hand(self):
        """The documented way to go on after an error."""
        await Entry.objects.acreate(name="a")
        async with transaction.aatomic():
            sid = await transaction.asavepoint_create()
            with self.assertRaises(IntegrityError):
                await Entry.objects.acreate(name="a")
            self.assertIs(await transaction.aget_rollback(), True)
            await transaction.aset_rollback(False)
            await transaction.asavepoint_rollback(sid)
            await Entry.objects.acreate(name="b")
        await self.assertAsyncNames("a", "b")

    async def test_rollback_flag(self):
        msg = "The rollback flag doesn't work outside of an 'atomic' block."
        with self.assertRaisesMessage(TransactionManagementError, msg):
            await transaction.aget_rollback()
        with self.assertRaisesMessage(TransactionManagementError, msg):
            await transaction.aset_rollback(True)
        async with transaction.aatomic():
            await Entry.objects.acreate(name="a")
            await transaction.aset_rollback(True)
        await self.assertAsyncNames()


class ManualTransactionTests(EndTestCase):
    async def test_commit_and_rollback(self):
        await transaction.aset_autocommit(False)
        try:
            self.assertIs(await transaction.aget_autocommit(), False)
            await Entry.objects.acreate(name="a")
            await transaction.acommit()
            await Entry.objects.acreate(name="b")
            await transaction.arollback()
        finally:
            await transaction.aset_autocommit(True)
        self.assertIs(await transaction.aget_autocommit(), True)
        await self.assertAsyncNames("a")

    async def test_isolation(self):
        if connection.vendor == "sqlite":
            self.skipTest("A transaction keeps others from writing.")
        began = asyncio.Event()
        done = asyncio.Event()

        async def foreign():
            await until(began)
            found = await names()
            await Entry.objects.acreate(name="foreign")
            done.set()
            return found

        task = asyncio.create_task(foreign())
        await asyncio.sleep(0)
        await transaction.aset_autocommit(False)
        await Entry.objects.acreate(name="manual")
        began.set()
        await until(done)
        await transaction.arollback()
        await transaction.aset_autocommit(True)
        self.assertEqual(await task, [])
        await self.assertAsyncNames("foreign")

    async def test_blocks_inside(self):
        called = []
        await transaction.aset_autocommit(False)
        async with transaction.aatomic():
            await Entry.objects.acreate(name="a")
            transaction.on_commit(lambda: called.append("committed"))
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="b")
                    raise Rollback
        self.assertEqual(called, [])
        await transaction.acommit()
        await transaction.aset_autocommit(True)
        self.assertEqual(called, ["committed"])
        await self.assertAsyncNames("a")

    async def test_uncommitted_changes(self):
        """As in synchronous code, on psycopg."""
        if connection.vendor != "postgresql":
            self.skipTest("psycopg refuses that.")
        await transaction.aset_autocommit(False)
        await Entry.objects.acreate(name="a")
        with self.assertRaisesMessage(Exception, "autocommit"):
            await transaction.aset_autocommit(True)
        await Entry.objects.acreate(name="b")
        await transaction.acommit()
        await transaction.aset_autocommit(True)
        await self.assertAsyncNames("a", "b")

    async def test_beside_blocks_of_others(self):
        """acommit() and arollback() have to wait for them."""

        def block(name):
            with transaction.atomic():
                create(name)

        await transaction.aset_autocommit(False)
        if connection.vendor != "sqlite":
            # There, atomic() commits, as in synchronous code.
            await asyncio.gather(
                *[run_sync(block, f"rolled back {number}") for number in range(5)],
                *[transaction.arollback() for _ in range(5)],
            )
            await transaction.arollback()
        await asyncio.gather(
            *[run_sync(block, f"{number}") for number in range(5)],
            *[transaction.acommit() for _ in range(5)],
        )
        await transaction.acommit()
        await transaction.aset_autocommit(True)
        await self.assertAsyncNames("0", "1", "2", "3", "4")

    async def outlive_nested_block(self):
        over = asyncio.Event()

        async def late():
            await until(over)
            msg = "can't use the database 'default' any more, because the block"
            await self.assertEndRefused(msg)

        async with transaction.aatomic():
            task = asyncio.create_task(late())
            await Entry.objects.acreate(name="a")
        over.set()
        await task
        await Entry.objects.acreate(name="b")

    async def test_outliving_a_nested_block(self):
        """Promise 4: who has outlived it doesn't end the transaction."""
        await transaction.aset_autocommit(False)
        try:
            await self.outlive_nested_block()
            self.assertIs(await transaction.aget_autocommit(), False)
            await transaction.acommit()
        finally:
            await transaction.aset_autocommit(True)
        await self.assertAsyncNames("a", "b")

    async def test_outliving_a_nested_block_of_aatomic(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await self.outlive_nested_block()
                raise Rollback
        await self.assertAsyncNames()


class AutocommitOffTests(AsyncTransactionTestCase):
    """AUTOCOMMIT: False, where a block doesn't commit."""

    def setUp(self):
        super().setUp()
        if is_in_memory() or connection.vendor == "sqlite":
            self.skipTest("It can't be changed on SQLite.")
        connection.close()
        settings = connection.settings_dict
        settings["AUTOCOMMIT"] = False
        self.addCleanup(connection.close)
        self.addCleanup(settings.__setitem__, "AUTOCOMMIT", True)
        self.addCleanup(connection.rollback)

    async def test_block_is_committed_with_the_rest(self):
        await Entry.objects.acreate(name="before")
        async with transaction.aatomic():
            await Entry.objects.acreate(name="block")
        await transaction.arollback()
        self.assertEqual(await names(), [])
        await transaction.arollback()
        async with transaction.aatomic():
            await Entry.objects.acreate(name="block")
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    await Entry.objects.acreate(name="nested")
                    raise Rollback
        await transaction.acommit()
        await transaction.arollback()
        self.assertEqual(await names(), ["block"])
        await transaction.arollback()

    async def test_block_that_fails(self):
        await Entry.objects.acreate(name="before")
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await Entry.objects.acreate(name="block")
                raise Rollback
        await transaction.acommit()
        self.assertEqual(await names(), ["before"])
        await transaction.arollback()

    def check_hooks_of_sync_block(self):
        called = []
        with transaction.atomic():
            transaction.on_commit(lambda: called.append("sync"))
        transaction.commit()
        self.assertEqual(called, [])
        transaction.set_autocommit(True)
        self.assertEqual(called, ["sync"])
        transaction.set_autocommit(False)

    async def test_hooks(self):
        """They're called when autocommit is turned on, as in sync code."""
        await sync_to_async(self.check_hooks_of_sync_block)()
        called = []

        async def coroutine_function():
            called.append("coroutine function")

        async with transaction.aatomic():
            transaction.on_commit(lambda: called.append("function"))
            await transaction.aon_commit(coroutine_function)
            with self.assertRaises(Rollback):
                async with transaction.aatomic():
                    transaction.on_commit(lambda: called.append("rolled back"))
                    raise Rollback
        await transaction.acommit()
        self.assertEqual(called, [])
        await transaction.aset_autocommit(True)
        self.assertEqual(called, ["function", "coroutine function"])
        await transaction.aset_autocommit(False)

    async def test_hooks_outside_of_blocks(self):
        msg = "on_commit() cannot be used in manual transaction management"
        with self.assertRaisesMessage(TransactionManagementError, msg):
            await transaction.aon_commit(lambda: None)


class AsyncOnCommitTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        self.called = []

    def do(self, name):
        self.called.append(name)

    async def ado(self, name):
        await asyncio.sleep(0)
        self.called.append(name)

    async def test_functions_of_both_colours_in_order(self):
        async with transaction.aatomic():
            await transaction.aon_commit(lambda: self.do("first"))

            async def second():
                await self.ado("second")

            await transaction.aon_commit(second)
            transaction.on_commit(lambda: self.do("third"))

            async def fourth():
                await self.ado("fourth")

            transaction.on_commit(fourth)
            self.assertEqual(self.called, [])
        self.assertEqual(self.called, ["first", "second", "third", "fourth"])

    async def test_registered_by_a_callback(self):
        async def func():
            await transaction.aon_commit(lambda: self.do("at once"))
            async with transaction.aatomic():
                await transaction.aon_commit(lambda: self.do("inner"))
                self.do("in the block")

        async with transaction.aatomic():
            await transaction.aon_commit(func)
        self.assertEqual(self.called, ["at once", "in the block", "inner"])

    async def test_called_in_the_task_that_is_cancelled(self):
        async def func():
            await self.ado(asyncio.current_task().get_name())

        async def block():
            async with transaction.aatomic():
                await Entry.objects.acreate(name="committed")
                await transaction.aon_commit(func)
                asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)

        task = asyncio.create_task(block(), name="the cancelled task")
        with self.assertRaises(asyncio.CancelledError):
            await task
        self.assertEqual(self.called, ["the cancelled task"])
        await self.assertAsyncNames("committed")
