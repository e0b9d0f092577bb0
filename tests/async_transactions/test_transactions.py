"""
Promise 6: aatomic() does what atomic() does.

Each assertion of Django's tests/transactions about the synchronous API is made
here about the asynchronous one.
"""

import asyncio
from contextlib import asynccontextmanager
from itertools import product

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
from django.test import TestCase, skipUnlessDBFeature
from django.utils.connection import ConnectionDoesNotExist

from .base import (
    AsyncTransactionTestCase,
    Rollback,
    acreate,
    is_in_memory,
    until,
    wait_until,
)
from .models import Entry, Part

FORBIDDEN = "This is forbidden when an 'atomic' block is active."

# How a session ends itself.
KILL = {
    "mysql": "KILL CONNECTION_ID()",
    "postgresql": "SELECT pg_terminate_backend(pg_backend_pid())",
}


def select_missing_column():
    with connection.cursor() as cursor:
        cursor.execute("SELECT no_such_column FROM async_transactions_entry")


@asynccontextmanager
async def manual_transaction():
    await transaction.aset_autocommit(False)
    try:
        yield
    finally:
        # What follows a block begins a transaction as well.
        await transaction.arollback()
        await transaction.aset_autocommit(True)


class AssertStored:
    async def assertStored(self, *entries):
        stored = [entry async for entry in Entry.objects.order_by("name")]
        self.assertEqual(stored, list(entries))


class AtomicTests(AssertStored):
    """The basic tests, run in several surroundings."""

    async def test_decorator(self):
        for name, decorator in (
            ("bare", transaction.aatomic),
            ("called", transaction.aatomic()),
            ("using", transaction.aatomic("default")),
        ):
            with self.subTest(name):

                @decorator
                async def create(name, fail):
                    entry = await acreate(name)
                    if fail:
                        raise Rollback("Oops")
                    return entry

                entry = await create("committed", fail=False)
                await self.assertStored(entry)
                with self.assertRaisesMessage(Rollback, "Oops"):
                    await create("rolled back", fail=True)
                await self.assertStored(entry)
                await entry.adelete()

    async def test_commit(self):
        async with transaction.aatomic():
            entry = await acreate("a")
        await self.assertStored(entry)

    async def test_rollback(self):
        with self.assertRaisesMessage(Rollback, "Oops"):
            async with transaction.aatomic():
                await acreate("a")
                raise Rollback("Oops")
        await self.assertStored()

    async def check_two_blocks(self, get_outer, get_inner, merged=False):
        """Commit or roll back an outer and an inner block."""
        for outer_fails, inner_fails in product([False, True], repeat=2):
            with self.subTest(outer_fails=outer_fails, inner_fails=inner_fails):
                expected = []
                try:
                    async with get_outer():
                        expected.append(await acreate("a"))
                        try:
                            async with get_inner():
                                expected.append(await acreate("b"))
                                if inner_fails:
                                    raise Rollback("inner")
                        except Rollback as exc:
                            self.assertEqual(exc.args, ("inner",))
                            self.assertIs(inner_fails, True)
                            del expected[0 if merged else 1 :]
                        if outer_fails:
                            raise Rollback("outer")
                except Rollback as exc:
                    self.assertEqual(exc.args, ("outer",))
                    self.assertIs(outer_fails, True)
                    expected.clear()
                await self.assertStored(*expected)
                await Entry.objects.all().adelete()

    async def test_nested(self):
        await self.check_two_blocks(transaction.aatomic, transaction.aatomic)

    async def test_merged(self):
        """Writes in the outer block are rolled back, too."""
        await self.check_two_blocks(
            transaction.aatomic,
            lambda: transaction.aatomic(savepoint=False),
            merged=True,
        )

    async def test_reuse(self):
        block = transaction.aatomic()
        await self.check_two_blocks(lambda: block, lambda: block)

    async def test_nested_in_the_other_colour(self):
        """A synchronous block inside of two asynchronous ones."""

        def sync(fail):
            with transaction.atomic():
                Entry.objects.create(name="c")
                if fail:
                    raise Rollback

        for fail in (False, True):
            with self.subTest(fail=fail):
                async with transaction.aatomic():
                    await acreate("a")
                    try:
                        async with transaction.aatomic():
                            await acreate("b")
                            await sync_to_async(sync)(fail)
                    except Rollback:
                        pass
                names = Entry.objects.order_by("name").values_list("name", flat=True)
                self.assertEqual(
                    [name async for name in names], ["a"] if fail else ["a", "b", "c"]
                )
                await Entry.objects.all().adelete()

    async def test_force_rollback(self):
        async with transaction.aatomic():
            await acreate("a")
            self.assertIs(await transaction.aget_rollback(), False)
            await transaction.aset_rollback(True)
        await self.assertStored()

    async def test_prevent_rollback(self):
        async with transaction.aatomic():
            entry = await acreate("a")
            sid = await transaction.asavepoint_create()
            await acreate("b")
            with self.assertRaises(DatabaseError):
                async with transaction.aatomic(savepoint=False):
                    await sync_to_async(select_missing_column)()
            # The block needn't be rolled back after a recovery by hand.
            self.assertIs(await transaction.aget_rollback(), True)
            await transaction.aset_rollback(False)
            await transaction.asavepoint_rollback(sid)
        await self.assertStored(entry)

    async def test_failure_on_exit(self):
        """A savepoint that can't be released."""
        if not connection.features.can_release_savepoints:
            self.skipTest("Savepoints aren't released.")
        async with transaction.aatomic():
            with self.assertRaises(DatabaseError):
                async with transaction.aatomic():
                    await acreate("a")
                    self.assertEqual(await Entry.objects.acount(), 1)
                    connection.savepoint_ids.append("12")
            with self.assertRaises(TransactionManagementError):
                await Entry.objects.acount()
            self.assertIs(connection.needs_rollback, True)
            if connection.savepoint_ids:
                connection.savepoint_ids.pop()
        await self.assertStored()


@skipUnlessDBFeature("uses_savepoints")
class AtomicAloneTests(AtomicTests, AsyncTransactionTestCase):
    pass


@skipUnlessDBFeature("uses_savepoints")
class AtomicInsideAtomicTests(AtomicTests, AsyncTransactionTestCase):
    """In a transaction that synchronous code has begun."""

    def setUp(self):
        super().setUp()
        block = transaction.atomic()
        block.__enter__()
        self.addCleanup(block.__exit__, None, None, None)


@skipUnlessDBFeature("uses_savepoints")
class AtomicInsideTestCaseTests(AtomicTests, TestCase):
    pass


def run_in(surroundings):
    """
    Return a class decorator that runs the tests inherited from AtomicTests in
    what `surroundings` returns.
    """

    def wrap(name):
        async def test(self):
            async with surroundings():
                await getattr(AtomicTests, name)(self)

        return test

    def decorator(cls):
        for name in dir(AtomicTests):
            if name.startswith("test_"):
                setattr(cls, name, wrap(name))
        return cls

    return decorator


@skipUnlessDBFeature("uses_savepoints")
@run_in(transaction.aatomic)
class AtomicInsideAatomicTests(AtomicTests, AsyncTransactionTestCase):
    pass


@skipUnlessDBFeature("uses_savepoints")
@run_in(manual_transaction)
class AtomicWithoutAutocommitTests(AtomicTests, AsyncTransactionTestCase):
    pass


@skipUnlessDBFeature("uses_savepoints")
class AtomicMergeTests(AssertStored, AsyncTransactionTestCase):
    """Blocks without a savepoint belong to the one around them."""

    async def assertCountInspiteOfRollback(self, count):
        # What can't be rolled back yet is still there.
        self.assertIs(await transaction.aget_rollback(), True)
        await transaction.aset_rollback(False)
        self.assertEqual(await Entry.objects.acount(), count)
        await transaction.aset_rollback(True)

    async def test_merged_outer_rollback(self):
        async with transaction.aatomic():
            await acreate("a")
            async with transaction.aatomic(savepoint=False):
                await acreate("b")
                with self.assertRaisesMessage(Rollback, "Oops"):
                    async with transaction.aatomic(savepoint=False):
                        await acreate("c")
                        raise Rollback("Oops")
                await self.assertCountInspiteOfRollback(3)
            await self.assertCountInspiteOfRollback(3)
        await self.assertStored()

    async def test_merged_inner_savepoint_rollback(self):
        async with transaction.aatomic():
            entry = await acreate("a")
            async with transaction.aatomic():
                await acreate("b")
                with self.assertRaisesMessage(Rollback, "Oops"):
                    async with transaction.aatomic(savepoint=False):
                        await acreate("c")
                        raise Rollback("Oops")
                await self.assertCountInspiteOfRollback(3)
            self.assertEqual(await Entry.objects.acount(), 1)
        await self.assertStored(entry)


@skipUnlessDBFeature("uses_savepoints")
class AtomicErrorsTests(AsyncTransactionTestCase):
    async def test_setting_autocommit_inside(self):
        autocommit = await transaction.aget_autocommit()
        async with transaction.aatomic():
            for value in (autocommit, not autocommit):
                with self.assertRaisesMessage(TransactionManagementError, FORBIDDEN):
                    await transaction.aset_autocommit(value)
        self.assertIs(await transaction.aget_autocommit(), autocommit)

    async def test_transaction_methods_inside(self):
        async with transaction.aatomic():
            with self.assertRaisesMessage(TransactionManagementError, FORBIDDEN):
                await transaction.acommit()
            with self.assertRaisesMessage(TransactionManagementError, FORBIDDEN):
                await transaction.arollback()

    async def test_queries_in_a_broken_transaction(self):
        first = await acreate("first")
        async with transaction.aatomic():
            second = Entry(name="second", pk=first.pk)
            with self.assertRaises(IntegrityError):
                await second.asave(force_insert=True)
            msg = (
                "An error occurred in the current transaction. You can't execute "
                "queries until the end of the 'atomic' block."
            )
            with self.assertRaisesMessage(TransactionManagementError, msg) as cm:
                await second.asave(force_update=True)
        self.assertIsInstance(cm.exception.__cause__, IntegrityError)
        await first.arefresh_from_db()
        self.assertEqual(first.name, "first")

    async def test_queries_after_fixing_a_transaction(self):
        if connection.features.atomic_transactions:
            self.skipTest("The database rolls back a transaction after an error.")
        first = await acreate("first")
        async with transaction.aatomic():
            second = Entry(name="second", pk=first.pk)
            with self.assertRaises(IntegrityError):
                await second.asave(force_insert=True)
            await transaction.aset_rollback(False)
            await second.asave(force_update=True)
        await first.arefresh_from_db()
        self.assertEqual(first.name, "second")

    async def test_queries_after_closing_the_connection(self):
        if is_in_memory():
            self.skipTest("Closing the connection would destroy the database.")
        async with transaction.aatomic():
            await acreate("a")
            await sync_to_async(connection.close)()
            with self.assertRaises(Error):
                await acreate("b")
        self.assertEqual(await Entry.objects.acount(), 0)
        await acreate("usable again")


@skipUnlessDBFeature("uses_savepoints")
class AtomicMySQLTests(AsyncTransactionTestCase):
    async def test_savepoint_lost_in_a_deadlock(self):
        """MySQL rolls back the whole transaction, savepoints included."""
        if connection.vendor != "mysql":
            self.skipTest("Only MySQL does so.")
        first, second = await acreate("first"), await acreate("second")
        locked = asyncio.Event()

        async def lock(entry):
            await Entry.objects.select_for_update().aget(pk=entry.pk)

        async def lock_in_order():
            async with transaction.aatomic():
                await lock(first)
                await until(locked)
                await lock(second)

        def is_waiting():
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT COUNT(*) FROM information_schema.innodb_trx "
                    "WHERE trx_state = 'LOCK WAIT'"
                )
                return cursor.fetchone()[0]

        task = asyncio.create_task(lock_in_order())
        with self.assertRaisesMessage(OperationalError, "Deadlock found"):
            async with transaction.aatomic():
                async with transaction.aatomic():
                    await lock(second)
                    locked.set()
                    # The statement that waits can't tell.
                    await asyncio.to_thread(wait_until, is_waiting)
                    await lock(first)
        await task


@skipUnlessDBFeature("supports_transactions")
class AtomicMiscTests(AssertStored, AsyncTransactionTestCase):
    async def test_decorating_an_object_with_an_asynchronous_call(self):
        class Callable:
            async def __call__(self, name, fail=False):
                await acreate(name)
                if fail:
                    raise Rollback
                return name

        func = transaction.aatomic(Callable())
        self.assertEqual(await func("a"), "a")
        with self.assertRaises(Rollback):
            await func("b", fail=True)
        await self.assertAsyncNames("a")

    async def test_savepoints_are_not_leaked(self):
        """A savepoint is released after it was rolled back to."""
        if not connection.features.can_release_savepoints:
            self.skipTest("Savepoints aren't released.")
        with self.assertRaises(Error):
            async with transaction.aatomic():
                with self.assertRaisesMessage(Rollback, "Oops"):
                    async with transaction.aatomic():
                        sid = connection.savepoint_ids[-1]
                        raise Rollback("Oops")
                await transaction.asavepoint_rollback(sid)
        await acreate("usable")

    async def test_mark_for_rollback_on_error_in_a_transaction(self):
        async with transaction.aatomic(savepoint=False):
            with self.assertRaisesMessage(Rollback, "Oops"):
                async with transaction.amark_for_rollback_on_error():
                    self.assertIs(await transaction.aget_rollback(), False)
                    raise Rollback("Oops")
            self.assertIs(await transaction.aget_rollback(), True)
            msg = "You can't execute queries until the end of the 'atomic' block."
            with self.assertRaisesMessage(TransactionManagementError, msg) as cm:
                await acreate("refused")
            self.assertIsInstance(cm.exception.__cause__, Rollback)
        await acreate("usable")
        await self.assertAsyncNames("usable")

    async def test_mark_for_rollback_on_error_in_autocommit(self):
        self.assertIs(await transaction.aget_autocommit(), True)
        with self.assertRaisesMessage(Rollback, "Oops"):
            async with transaction.amark_for_rollback_on_error():
                self.assertIs(connection.needs_rollback, False)
                raise Rollback("Oops")
        self.assertIs(connection.needs_rollback, False)
        await acreate("usable")

    async def test_savepoint_create_is_not_deprecated(self):
        """The deprecated savepoint() got no counterpart."""
        self.assertIs(hasattr(transaction, "asavepoint"), False)
        async with transaction.aatomic():
            # The test runner makes an error of the warning.
            sid = await transaction.asavepoint_create()
            self.assertIs(await sync_to_async(connection.is_usable)(), True)
            await transaction.asavepoint_commit(sid)


@skipUnlessDBFeature("supports_transactions")
class NonAutocommitTests(AsyncTransactionTestCase):
    async def test_query_after_an_error_and_a_rollback(self):
        async with manual_transaction():
            first = await acreate("first")
            second = Entry(name="second", pk=first.pk)
            with self.assertRaises(IntegrityError):
                await second.asave(force_insert=True)
            await transaction.arollback()
            self.assertIsNone(await Entry.objects.alast())

    async def test_query(self):
        async with manual_transaction():
            await acreate("a")
            self.assertEqual(await Entry.objects.acount(), 1)
        await self.assertAsyncNames()


class Durable(AssertStored):
    msg = "A durable atomic block cannot be nested within another atomic block."

    async def test_commit(self):
        async with transaction.aatomic(durable=True):
            entry = await acreate("a")
        self.assertEqual(await Entry.objects.aget(), entry)

    async def test_nested_outer_durable(self):
        async with transaction.aatomic(durable=True):
            first = await acreate("a")
            async with transaction.aatomic():
                second = await acreate("b")
        await self.assertStored(first, second)

    async def test_nested_both_durable(self):
        async with transaction.aatomic(durable=True):
            entry = await acreate("a")
            with self.assertRaisesMessage(RuntimeError, self.msg):
                async with transaction.aatomic(durable=True):
                    self.fail("The block was entered.")
        await self.assertStored(entry)

    async def test_nested_inner_durable(self):
        async with transaction.aatomic():
            entry = await acreate("a")
            with self.assertRaisesMessage(RuntimeError, self.msg):
                async with transaction.aatomic(durable=True):
                    self.fail("The block was entered.")
        await self.assertStored(entry)

    async def test_sequence_of_durables(self):
        for name in ("a", "b"):
            async with transaction.aatomic(durable=True):
                entry = await acreate(name)
            self.assertEqual(await Entry.objects.aget(name=name), entry)

    async def test_decorator(self):
        @transaction.aatomic(durable=True)
        async def create(name):
            return await acreate(name)

        entry = await create("a")
        with self.assertRaisesMessage(RuntimeError, self.msg):
            async with transaction.aatomic():
                await create("b")
        await self.assertStored(entry)


class DurableTransactionTests(Durable, AsyncTransactionTestCase):
    pass


class DurableTests(Durable, TestCase):
    """The transaction of a TestCase doesn't count."""


class ReuseTests(AssertStored, AsyncTransactionTestCase):
    """One instance is entered again while it's open."""

    async def test_recursion(self):
        @transaction.aatomic
        async def create(depth, failing):
            await acreate(f"{depth}")
            if depth < 4:
                try:
                    await create(depth + 1, failing)
                except Rollback:
                    self.assertEqual(depth + 1, failing)
            if depth == failing:
                raise Rollback

        await create(1, failing=3)
        await self.assertAsyncNames("1", "2")

    async def test_several_tasks_in_turn_and_nested(self):
        block = transaction.aatomic()

        async def create(number):
            async with block:
                await acreate(f"outer {number}")
                try:
                    async with block:
                        await acreate(f"inner {number}")
                        await asyncio.sleep(0)
                        if number % 2:
                            raise Rollback
                except Rollback:
                    pass

        await asyncio.gather(*map(create, range(4)))
        await self.assertAsyncNames(
            "inner 0", "inner 2", *(f"outer {number}" for number in range(4))
        )

    async def test_after_an_error_on_entering(self):
        block = transaction.aatomic("unknown")
        for _ in range(2):
            with self.assertRaises(ConnectionDoesNotExist):
                async with block:
                    self.fail("The block was entered.")


class ErrorsOnLeavingTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        self.called = []

    async def test_commit_fails(self):
        """The database refuses the COMMIT, not a statement before it."""
        if not connection.features.can_defer_constraint_checks:
            self.skipTest("Constraints are checked at once.")
        with self.assertRaises(IntegrityError):
            async with transaction.aatomic():
                await acreate("lost")
                await Part.objects.acreate(entry_id=0)
                await transaction.aon_commit(lambda: self.called.append("lost"))
                reached = True
        self.assertIs(reached, True)
        self.assertEqual(self.called, [])
        async with transaction.aatomic():
            await acreate("next")
        await self.assertAsyncNames("next")

    def lose_session(self):
        """End the session without Django's knowledge."""
        if is_in_memory():
            self.skipTest("Closing the connection would destroy the database.")
        if (kill := KILL.get(connection.vendor)) is None:
            connection.connection.close()
        else:
            with self.assertRaises(connection.Database.OperationalError):
                connection.connection.cursor().execute(kill)

    async def test_commit_fails_without_a_session(self):
        with self.assertRaises(Error):
            async with transaction.aatomic():
                await acreate("lost")
                await transaction.aon_commit(lambda: self.called.append("lost"))
                await sync_to_async(self.lose_session)()
        self.assertEqual(self.called, [])
        await acreate("next")
        await self.assertAsyncNames("next")

    async def test_rollback_fails_without_a_session(self):
        """The exception which the block is left by is raised."""
        with self.assertRaisesMessage(Rollback, "Oops"):
            async with transaction.aatomic():
                await acreate("lost")
                await sync_to_async(self.lose_session)()
                raise Rollback("Oops")
        await acreate("next")
        await self.assertAsyncNames("next")

    async def test_rollback_to_a_savepoint_fails(self):
        """It's left to the block around it."""
        async with transaction.aatomic():
            await acreate("lost")
            with self.assertRaisesMessage(Rollback, "Oops"):
                async with transaction.aatomic():
                    connection.savepoint_ids[-1] = "unknown"
                    raise Rollback("Oops")
            self.assertIs(await transaction.aget_rollback(), True)
        await self.assertAsyncNames()


class ConnectionClosedTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        if is_in_memory():
            self.skipTest("Closing the connection would destroy the database.")

    async def test_in_a_nested_block(self):
        async with transaction.aatomic():
            await acreate("a")
            with self.assertRaises(Error):
                async with transaction.aatomic():
                    await acreate("b")
                    await sync_to_async(connection.close)()
                    await acreate("c")
        async with transaction.aatomic():
            await acreate("next")
        await self.assertAsyncNames("next")
