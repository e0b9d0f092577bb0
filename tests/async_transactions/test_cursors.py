"""
Promises 1, 4, 5, 7, 8 and 12: cursors for asynchronous code.
"""

import asyncio
import threading
import time
import unittest
from contextlib import aclosing
from unittest import mock

from asgiref.sync import async_to_sync, sync_to_async

from django.db import (
    DatabaseError,
    Error,
    IntegrityError,
    InterfaceError,
    async_cursors,
    connection,
    connections,
    new_connection,
    run_sync,
    transaction,
)
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

from . import server
from .base import (
    SLOW,
    AsyncTransactionTestCase,
    Rollback,
    acreate,
    create,
    is_in_memory,
    until,
)
from .interruptions import Interruption
from .models import Entry
from .pool import PoolTestCase, close_connections

TABLE = Entry._meta.db_table
SELECT = f"SELECT name FROM {TABLE} ORDER BY name"
INSERT = f"INSERT INTO {TABLE} (name, count) VALUES (%s, 0)"
COPY_IN = f"COPY {TABLE} (name, count) FROM STDIN"
COPY_OUT = f"COPY ({SELECT}) TO STDOUT"
# The server sends nothing until it has a buffer full.
SLOW_COPY = """
    COPY (
        SELECT CASE WHEN n < 10 THEN repeat('x', 10000) ELSE pg_sleep(20)::text END
        FROM generate_series(1, 10) n
    ) TO STDOUT
"""

is_native = "default" in connections.native_aliases


def create_many(number):
    """Return the names, in order."""
    names = [f"{i:04}" for i in range(number)]
    Entry.objects.bulk_create(Entry(name=name) for name in names)
    return names


async def session_id(cursor):
    await cursor.execute(server.SESSION_ID[connection.vendor])
    return (await cursor.fetchone())[0]


async def insert(name):
    async with connection.acursor() as cursor:
        await cursor.execute(INSERT, [name])


async def wait_with_cursor():
    async with connection.acursor() as cursor:
        await cursor.execute("SELECT 1")
        await asyncio.Event().wait()


def abandon(coroutine):
    """Run a coroutine that waits, and destroy it after its loop was closed."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)
    try:
        loop.run_until_complete(asyncio.wait([task], timeout=0.5))
    finally:
        loop.close()
    task._log_destroy_pending = False
    coroutine.close()
    close_connections()


def is_closed(cursor):
    """Return whether the driver's cursor refuses to be used."""
    driver_cursor = cursor._cursor.cursor
    if connection.vendor == "postgresql":
        return driver_cursor.closed
    try:
        driver_cursor.execute("SELECT 1")
    except connection.Database.Error as exc:
        return "closed" in str(exc)
    return False


class MethodTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        self.names = create_many(250)

    async def test_execute_and_fetch(self):
        async with connection.acursor() as cursor:
            await cursor.execute(SELECT)
            self.assertEqual(cursor.description[0][0], "name")
            self.assertEqual(await cursor.fetchone(), ("0000",))
            self.assertEqual(list(await cursor.fetchmany(2)), [("0001",), ("0002",)])
            self.assertEqual(
                list(await cursor.fetchall()), [(name,) for name in self.names[3:]]
            )
            self.assertIsNone(await cursor.fetchone())

    async def test_write(self):
        async with connection.acursor() as cursor:
            await cursor.execute(INSERT, ["one"])
            self.assertEqual(cursor.rowcount, 1)
            await cursor.executemany(INSERT, [["two"], ["three"]])
            self.assertEqual(cursor.rowcount, 2)
        await self.assertAsyncNames(*self.names, "one", "two", "three")

    async def test_result(self):
        """What the driver returns for itself is the asynchronous cursor."""
        async with connection.acursor() as cursor:
            result = await cursor.execute(SELECT)
        # mysqlclient's returns the number of rows.
        self.assertEqual(result, 250 if connection.vendor == "mysql" else cursor)

    async def test_iteration(self):
        async with connection.acursor() as cursor:
            await cursor.execute(SELECT)
            names = [name async for (name,) in cursor]
        self.assertEqual(names, self.names)

    async def test_iteration_in_chunks(self):
        call = async_cursors.AsyncCursor._call
        with mock.patch.object(
            async_cursors.AsyncCursor, "_call", autospec=True, side_effect=call
        ) as spy:
            async with connection.acursor() as cursor:
                await cursor.execute(SELECT)
                async for row in cursor:
                    pass
        # Three with rows, and one that tells the end.
        self.assertEqual(
            [call.args[1] for call in spy.mock_calls].count("fetchmany"), 4
        )

    async def test_rows_after_iteration(self):
        """Nothing is lost of a chunk that the loop was left in."""
        async with connection.acursor() as cursor:
            for fetch, expected in [
                (lambda: cursor.fetchone(), ("0001",)),
                (lambda: cursor.fetchmany(2), [("0001",), ("0002",)]),
                (lambda: cursor.fetchmany(200), [(n,) for n in self.names[1:201]]),
                (lambda: cursor.fetchall(), [(name,) for name in self.names[1:]]),
            ]:
                await cursor.execute(SELECT)
                async for row in cursor:
                    break
                self.assertEqual(await fetch(), expected)

    async def test_rows_of_the_statement_before(self):
        async with connection.acursor() as cursor:
            await cursor.execute(SELECT)
            async for row in cursor:
                break
            await cursor.execute("SELECT 1")
            self.assertEqual([row async for row in cursor], [(1,)])

    async def test_default_size(self):
        async with connection.acursor() as cursor:
            await cursor.execute(SELECT)
            rows = await cursor.fetchmany()
            self.assertEqual(len(rows), cursor.arraysize)

    @unittest.skipUnless(connection.vendor == "postgresql", "PostgreSQL tests")
    async def test_callproc(self):
        async with connection.acursor() as cursor:
            await cursor.callproc("upper", ["a"])
            self.assertEqual(await cursor.fetchone(), ("A",))

    @unittest.skipUnless(connection.vendor == "postgresql", "PostgreSQL tests")
    async def test_method_of_the_driver(self):
        async with connection.acursor() as cursor:
            await cursor.execute(SELECT)
            await cursor.scroll(5)
            self.assertEqual(await cursor.fetchone(), ("0005",))

    async def test_unknown_attribute(self):
        async with connection.acursor() as cursor:
            with self.assertRaises(AttributeError):
                cursor.unknown

    async def test_not_open(self):
        cursor = connection.acursor()
        with self.assertRaisesMessage(InterfaceError, "The cursor isn't open."):
            await cursor.execute("SELECT 1")
        with self.assertRaisesMessage(InterfaceError, "The cursor isn't open."):
            cursor.description

    async def test_opened_again(self):
        async with connection.acursor() as cursor:
            with self.assertRaisesMessage(InterfaceError, "only once"):
                async with cursor:
                    pass
            await cursor.execute("SELECT 1")

    async def test_closed(self):
        """The error is that of a synchronous cursor."""

        def use_closed():
            with connection.cursor() as cursor:
                pass
            with self.assertRaises(Error) as cm:
                cursor.execute("SELECT 1")
            return cm.exception

        async with connection.acursor() as cursor:
            await cursor.execute(SELECT)
            async for row in cursor:
                break
        exc = await sync_to_async(use_closed)()
        with self.assertRaisesMessage(type(exc), str(exc)):
            await cursor.execute("SELECT 1")
        # mysqlclient has no error of its own for it.
        with self.assertRaises(TypeError if connection.vendor == "mysql" else Error):
            await cursor.fetchall()
        await cursor.close()

    async def test_connection_closed(self):
        if is_in_memory():
            self.skipTest("The connection is never closed.")
        async with connection.acursor() as cursor:
            await run_sync(lambda: cursor._cursor.db.close())
            with self.assertRaisesMessage(InterfaceError, "has been closed"):
                await cursor.execute("SELECT 1")

    async def test_thread(self):
        """
        All is done in one thread: that of synchronous code in thread mode, and
        that of the event loop in native mode.
        """
        idents = []

        def note(execute, *args):
            idents.append(threading.get_ident())
            return execute(*args)

        async with connection.acursor() as cursor:
            with cursor._cursor.db.execute_wrapper(note):
                await cursor.execute("SELECT 1")
                await acreate("other")
                await cursor.execute("SELECT 1")
        if is_native:
            expected = threading.get_ident()
        else:
            expected = await sync_to_async(threading.get_ident)()
        self.assertEqual(idents, 3 * [expected])


class ChunkedCursorTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        self.names = create_many(250)

    async def check_rows(self):
        async with connection.achunked_cursor() as cursor:
            await cursor.execute(SELECT)
            self.assertEqual(await cursor.fetchone(), ("0000",))
            if connection.vendor != "sqlite":
                # There it would be among the rows.
                await acreate("other")
            self.assertEqual([name async for (name,) in cursor], self.names[1:])

    async def test_rows(self):
        await self.check_rows()

    async def test_rows_in_block(self):
        async with transaction.aatomic():
            await self.check_rows()

    @unittest.skipUnless(connection.vendor == "postgresql", "PostgreSQL tests")
    async def test_server_side(self):
        sql = "SELECT count(*) FROM pg_cursors"

        async def check():
            async with connection.acursor() as other:
                async with connection.achunked_cursor() as cursor:
                    await cursor.execute(SELECT)
                    await other.execute(sql)
                    self.assertEqual(await other.fetchone(), (1,))
                await other.execute(sql)
                self.assertEqual(await other.fetchone(), (0,))

        await check()
        async with transaction.aatomic():
            await check()


class HookTests(AsyncTransactionTestCase):
    """Promise 12: all that a CursorWrapper does is done."""

    async def test_errors(self):
        await acreate("one")
        async with connection.acursor() as cursor:
            with self.assertRaises(IntegrityError) as cm:
                await cursor.execute(INSERT, ["one"])
            self.assertIsInstance(cm.exception.__cause__, connection.Database.Error)
            with self.assertRaises(DatabaseError):
                await cursor.execute("SELEKT 1")
            await cursor.execute(SELECT)
            self.assertEqual(await cursor.fetchone(), ("one",))

    async def test_execute_wrappers(self):
        seen = []

        def note(execute, sql, params, many, context):
            seen.append((sql, params, many, context["connection"].alias))
            return execute(sql, params, many, context)

        async with transaction.aatomic():
            with connection.execute_wrapper(note):
                async with connection.acursor() as cursor:
                    await cursor.execute(INSERT, ["one"])
                    await cursor.executemany(INSERT, [["two"]])
        self.assertEqual(
            seen,
            [
                (INSERT, ["one"], False, "default"),
                (INSERT, [["two"]], True, "default"),
            ],
        )

    async def test_logs(self):
        with CaptureQueriesContext(connection) as outside:
            async with connection.acursor() as cursor:
                await cursor.execute("SELECT 1")
        self.assertEqual([query["sql"] for query in outside], ["SELECT 1"])
        with self.assertNumQueries(4):
            async with transaction.aatomic():
                async with connection.acursor() as cursor:
                    await cursor.execute("SELECT 1")
                    await cursor.executemany(INSERT, [["one"], ["two"]])

    async def test_broken_transaction(self):
        async with transaction.aatomic():
            await transaction.aset_rollback(True)
            async with connection.acursor() as cursor:
                msg = "You can't execute queries until the end of the 'atomic' block."
                with self.assertRaisesMessage(
                    transaction.TransactionManagementError, msg
                ):
                    await cursor.execute("SELECT 1")


class BelongingTests(AsyncTransactionTestCase):
    """Promises 1, 2 and 4."""

    async def test_inside(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await insert("one")
                await asyncio.gather(insert("two"), insert("three"))
                async with transaction.aatomic():
                    await insert("four")
                await self.assertAsyncNames("four", "one", "three", "two")
                raise Rollback
        await self.assertAsyncNames()

    async def test_entered_inside(self):
        """The connection is decided on when the cursor is opened."""
        cursor = connection.acursor()
        with self.assertRaises(Rollback):
            async with transaction.aatomic(), cursor:
                await cursor.execute(INSERT, ["one"])
                raise Rollback
        await self.assertAsyncNames()

    async def test_opened_outside(self):
        msg = "opened outside of a block can't be used inside"
        async with connection.acursor() as cursor:
            await cursor.execute("SELECT 1")
            async with transaction.aatomic():
                with self.assertRaisesMessage(
                    transaction.TransactionManagementError, msg
                ):
                    await cursor.execute(INSERT, ["one"])
            await cursor.execute(INSERT, ["two"])
        await self.assertAsyncNames("two")

    async def test_after_the_block(self):
        async with transaction.aatomic():
            async with transaction.aatomic():
                cursor = await connection.acursor().__aenter__()
                await cursor.execute(INSERT, ["nested"])
            await cursor.execute(INSERT, ["outer"])
        with self.assertRaisesMessage(InterfaceError, "closed with the block"):
            await cursor.execute(INSERT, ["after"])
        await cursor.close()
        await self.assertAsyncNames("nested", "outer")

    async def check_after_the_block_during_another(self, *statements):
        async with transaction.aatomic():
            cursor = await connection.achunked_cursor().__aenter__()
            for sql in statements:
                await cursor.execute(sql)
        self.assertIs(is_closed(cursor), True)
        async with transaction.aatomic():
            await acreate(f"before {statements}")
            await cursor.close()
            await acreate(f"after {statements}")

    async def test_after_the_block_during_another(self):
        """Closing it doesn't interfere with a block that has its session."""
        await self.check_after_the_block_during_another("SELECT 1")
        await self.check_after_the_block_during_another()
        self.assertEqual(await Entry.objects.acount(), 4)

    async def test_outlived(self):
        ended = asyncio.Event()
        opened = asyncio.Event()

        async def outlive():
            async with connection.acursor() as cursor:
                opened.set()
                await until(ended)
                with self.assertRaisesMessage(
                    transaction.TransactionManagementError, "has ended"
                ):
                    await cursor.execute(INSERT, ["one"])

        async with transaction.aatomic():
            task = asyncio.create_task(outlive())
            await until(opened)
        ended.set()
        await task
        await self.assertAsyncNames()

    async def test_foreign(self):
        entered = asyncio.Event()
        cursors = []

        async def foreign():
            await until(entered)
            with self.assertRaisesMessage(
                transaction.TransactionManagementError, "belongs to a transaction"
            ):
                await cursors[0].execute(INSERT, ["foreign"])

        task = asyncio.create_task(foreign())
        async with transaction.aatomic():
            async with connection.acursor() as cursor:
                cursors.append(cursor)
                await cursor.execute(INSERT, ["one"])
                entered.set()
                await task
        await self.assertAsyncNames("one")

    async def test_isolation(self):
        if is_in_memory():
            self.skipTest("There's but one connection.")
        entered = asyncio.Event()

        async def foreign():
            await until(entered)
            async with connection.acursor() as cursor:
                await cursor.execute(SELECT)
                return list(await cursor.fetchall())

        task = asyncio.create_task(foreign())
        async with transaction.aatomic():
            await insert("one")
            entered.set()
            self.assertEqual(await task, [])

    @unittest.skipUnless(server.is_supported(), "Sessions have ids.")
    async def test_new_connection(self):
        async with transaction.aatomic():
            outer = transaction.get_connection()
            async with connection.acursor() as cursor:
                number = await session_id(cursor)
            async with new_connection(), connection.acursor() as cursor:
                self.assertNotEqual(await session_id(cursor), number)
            async with new_connection(), outer.acursor() as cursor:
                self.assertEqual(await session_id(cursor), number)

    async def test_own_connection(self):
        """One that django.db.connections doesn't know is used itself."""
        own = connections.create_connection("default")
        own.inc_thread_sharing()
        self.addCleanup(own.close)
        async with own.acursor() as cursor:
            await cursor.execute("SELECT 1")
            self.assertIs(cursor._cursor.db, own)

    @unittest.skipUnless(server.is_supported(), "Sessions have ids.")
    async def test_session(self):
        """Promise 8: it's the same as long as the cursor is open."""
        async with connection.acursor() as cursor:
            number = await session_id(cursor)
            await asyncio.gather(*[acreate(f"{i}") for i in range(5)])
            self.assertEqual(await session_id(cursor), number)


class TestCaseTests(TestCase):
    """Promise 16: what cursors write is rolled back with the test."""

    async def check(self):
        self.assertIs(await Entry.objects.aexists(), False)
        await insert("one")
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                await insert("two")
                raise Rollback
        async with connection.acursor() as cursor:
            await cursor.execute(SELECT)
            self.assertEqual(await cursor.fetchone(), ("one",))
            self.assertIsNone(await cursor.fetchone())
        self.assertEqual(await Entry.objects.acount(), 1)

    async def test_first(self):
        await self.check()

    async def test_second(self):
        await self.check()


class ClosingTests(AsyncTransactionTestCase):
    """Promise 5: it doesn't matter who closes a cursor."""

    async def rows(self):
        async with connection.achunked_cursor() as cursor:
            self.cursor = cursor
            await cursor.execute(SELECT)
            async for row in cursor:
                yield row

    def setUp(self):
        super().setUp()
        create_many(3)

    async def test_other_task(self):
        rows = self.rows()
        await anext(rows)
        await asyncio.create_task(rows.aclose())
        self.assertIs(is_closed(self.cursor), True)

    async def test_task_inside(self):
        async with transaction.aatomic():
            rows = self.rows()
            await anext(rows)
            await asyncio.create_task(rows.aclose())
            self.assertIs(is_closed(self.cursor), True)
            await insert("one")
        await self.assertAsyncNames("0000", "0001", "0002", "one")

    async def test_foreign_task(self):
        opened = asyncio.Event()
        rows = self.rows()

        async def foreign():
            await until(opened)
            await rows.aclose()

        task = asyncio.create_task(foreign())
        async with transaction.aatomic():
            await anext(rows)
            opened.set()
            await task
            self.assertIs(is_closed(self.cursor), True)
            await insert("one")
        await self.assertAsyncNames("0000", "0001", "0002", "one")

    async def test_early_exit(self):
        async with aclosing(self.rows()) as rows:
            async for row in rows:
                break
        self.assertIs(is_closed(self.cursor), True)


class CancellationTests(AsyncTransactionTestCase):
    """Promise 7."""

    async def execute_slowly(self):
        async with connection.acursor() as self.cursor:
            async with asyncio.timeout(0.5):
                await self.cursor.execute(SLOW[connection.vendor])
                # SQLite begins to work for the first row.
                await self.cursor.fetchall()

    async def test_query(self):
        start = time.monotonic()
        with self.assertRaises(TimeoutError):
            await self.execute_slowly()
        self.assertLess(time.monotonic() - start, 8)
        self.assertIs(is_closed(self.cursor), True)
        # The connection goes on working.
        await insert("one")
        await self.assertAsyncNames("one")

    async def test_query_in_block(self):
        start = time.monotonic()
        with self.assertRaises(TimeoutError):
            async with transaction.aatomic():
                await insert("one")
                await self.execute_slowly()
        self.assertLess(time.monotonic() - start, 8)
        await self.assertAsyncNames()

    async def test_cancelled_again(self):
        """Cancelled while it's closed after a cancellation."""
        task = asyncio.create_task(self.execute_slowly())
        await asyncio.sleep(0.2)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        with self.assertRaises(asyncio.CancelledError):
            await task
        self.assertIs(is_closed(self.cursor), True)
        await insert("one")
        await self.assertAsyncNames("one")

    async def test_next_query(self):
        """It isn't cancelled in the place of the one that was abandoned."""
        for i in range(20):
            task = asyncio.create_task(insert(f"{i}"))
            for _ in range(i):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            async with connection.acursor() as cursor:
                await cursor.execute("SELECT 1")
                self.assertEqual(await cursor.fetchone(), (1,))

    async def test_while_waiting_for_a_lent_connection(self):
        """The query of the transaction that has it isn't cancelled instead."""
        if not is_in_memory():
            self.skipTest("No connection is lent.")
        opened, entered = asyncio.Event(), asyncio.Event()
        sql = SLOW["sqlite"].replace("1000000000", "3000000")

        async def wait_for_it():
            async with connection.acursor() as cursor:
                opened.set()
                await until(entered)
                await cursor.execute("SELECT 1")

        task = asyncio.create_task(wait_for_it())
        await until(opened)
        async with transaction.aatomic(), connection.acursor() as cursor:
            entered.set()
            await asyncio.sleep(0.2)
            task.cancel()
            await cursor.execute(sql)
            self.assertEqual(await cursor.fetchone(), (3000000,))
        with self.assertRaises(asyncio.CancelledError):
            await task

    async def check_every_await(self, in_block, late):
        count = 0
        while True:
            cursors = []
            interruption = Interruption(count, late=late)

            async def work():
                async with connection.acursor() as cursor:
                    cursors.append(cursor)
                    await cursor.execute(INSERT, ["one"])
                async with connection.achunked_cursor() as cursor:
                    cursors.append(cursor)
                    await cursor.execute(SELECT)
                    async for row in cursor:
                        pass
                raise Rollback

            async def main():
                if in_block:
                    async with transaction.aatomic():
                        await work()
                else:
                    await work()

            task = asyncio.create_task(interruption.run(main()))
            with self.assertRaises((asyncio.CancelledError, Rollback)):
                await asyncio.wait_for(task, 20)
            for cursor in cursors:
                self.assertIs(is_closed(cursor), True)
            if in_block:
                await self.assertAsyncNames()
            else:
                await Entry.objects.all().adelete()
            if not interruption.happened:
                break
            count += 1
        self.assertGreater(count, 1)

    async def test_every_await(self):
        await self.check_every_await(in_block=False, late=False)
        await self.check_every_await(in_block=False, late=True)

    async def test_every_await_in_block(self):
        await self.check_every_await(in_block=True, late=False)
        await self.check_every_await(in_block=True, late=True)

    def test_closed_loop(self):
        abandon(wait_with_cursor())


@unittest.skipUnless(is_native, "ASYNC_NATIVE tests")
class LeaseTests(AsyncTransactionTestCase):
    """Promises 8 and 9, in native mode."""

    async def test_transaction(self):
        """A transaction doesn't take a connection that a cursor is open on."""
        async with connection.acursor() as cursor:
            number = await session_id(cursor)
            async with transaction.aatomic(), connection.acursor() as inner:
                self.assertNotEqual(await session_id(inner), number)
            self.assertEqual(await session_id(cursor), number)

    async def test_transaction_afterwards(self):
        async with connection.acursor() as cursor:
            number = await session_id(cursor)
        async with transaction.aatomic(), connection.acursor() as inner:
            self.assertEqual(await session_id(inner), number)


@unittest.skipUnless(is_native, "ASYNC_NATIVE tests")
class PooledLeaseTests(PoolTestCase):
    """Promise 8, with a pool: who needs a connection holds it."""

    def test_closed_loop(self):
        abandon(wait_with_cursor())
        self.assertEqual(self.checked_out(), 0)

    async def test_session(self):
        async with connection.acursor() as cursor:
            number = await session_id(cursor)
            self.assertEqual(self.checked_out(), 1)
            await acreate("one")
            self.assertEqual(await session_id(cursor), number)
            self.assertEqual(self.checked_out(), 1)
        self.assertEqual(self.checked_out(), 0)

    async def test_two_cursors(self):
        async with connection.acursor() as cursor:
            async with connection.acursor() as other:
                self.assertEqual(await session_id(other), await session_id(cursor))
            self.assertEqual(self.checked_out(), 1)
            await session_id(cursor)
        self.assertEqual(self.checked_out(), 0)

    async def test_full(self):
        released = asyncio.Event()
        held = []

        async def hold():
            async with connection.acursor() as cursor:
                held.append(await session_id(cursor))
                await until(released)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hold())
            tasks.create_task(hold())
            while len(held) < 2:
                await asyncio.sleep(0.01)
            waiting = tasks.create_task(acreate("one"))
            while self.checked_out() < 3:
                await asyncio.sleep(0.01)
            self.assertIs(waiting.done(), False)
            released.set()
        self.assertNotEqual(*held)
        self.assertEqual(self.checked_out(), 0)

    async def test_closed_by_other_task(self):
        cursor = await connection.acursor().__aenter__()
        await cursor.execute("SELECT 1")
        await asyncio.create_task(cursor.close())
        self.assertEqual(self.checked_out(), 0)
        with self.assertRaises(InterfaceError):
            await cursor.execute("SELECT 1")

    async def test_closed_by_other_task_during_operation(self):
        """The connection stays with who still uses it."""
        cursor = await connection.acursor().__aenter__()
        number = await session_id(cursor)
        sessions = []

        def operate():
            with connection.cursor() as inner:
                for sql in ("SELECT pg_sleep(0.5)", "SELECT pg_backend_pid()"):
                    inner.execute(sql)
                sessions.append(inner.fetchone()[0])

        task = asyncio.create_task(self.close_soon(cursor))
        await run_sync(operate)
        await task
        self.assertEqual(sessions, [number])
        self.assertEqual(self.checked_out(), 0)

    async def close_soon(self, cursor):
        await asyncio.sleep(0.1)
        await cursor.close()

    async def test_cancelled(self):
        for i in range(20):
            task = asyncio.create_task(insert(f"{i}"))
            for _ in range(i):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            # The pool may be about to add a connection which nobody waits for.
            async with asyncio.timeout(5):
                while self.checked_out():
                    await asyncio.sleep(0.01)


@unittest.skipUnless(connection.vendor == "postgresql", "PostgreSQL tests")
class CopyTests(AsyncTransactionTestCase):
    async def copy_in(self, cursor, *names):
        async with cursor.copy(COPY_IN) as copy:
            for name in names:
                await copy.write_row([name, 0])

    async def test_write(self):
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy(COPY_IN) as copy:
                await copy.write_row(["one", 0])
                await copy.write("two\t0\n")
            self.assertEqual(cursor.rowcount, 2)
        await self.assertAsyncNames("one", "two")

    async def test_set_types_to_write(self):
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy(f"{COPY_IN} (FORMAT BINARY)") as copy:
                copy.set_types(["text", "int4"])
                await copy.write_row(["one", 0])
        await self.assertAsyncNames("one")

    async def test_read(self):
        names = await sync_to_async(create_many)(250)
        data = [f"{name}\n".encode() for name in names]
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy(COPY_OUT) as copy:
                self.assertEqual([bytes(block) async for block in copy], data)
                self.assertEqual(bytes(await copy.read()), b"")
            async with cursor.copy(COPY_OUT) as copy:
                self.assertEqual([row async for row in copy.rows()][249], ("0249",))
            self.assertEqual(cursor.rowcount, 250)
            async with cursor.copy(COPY_OUT) as copy:
                copy.set_types(["text"])
                self.assertEqual(bytes(await copy.read()), data[0])
                self.assertEqual(await copy.read_row(), ("0001",))

    async def test_early_exit(self):
        """The transaction goes on."""
        await sync_to_async(create_many)(250)
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy(COPY_OUT) as copy:
                async for row in copy.rows():
                    break
            await cursor.execute(INSERT, ["one"])
        self.assertEqual(await Entry.objects.acount(), 251)

    async def test_params(self):
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy("COPY (SELECT %s) TO STDOUT", [42]) as copy:
                self.assertEqual(await copy.read_row(), ("42",))

    async def test_exception(self):
        with self.assertRaises(Rollback):
            async with transaction.aatomic(), connection.acursor() as cursor:
                async with cursor.copy(COPY_IN) as copy:
                    await copy.write_row(["one", 0])
                    raise Rollback
        await self.assertAsyncNames()

    async def test_errors(self):
        with self.assertRaises(DatabaseError) as cm:
            async with transaction.aatomic(), connection.acursor() as cursor:
                async with cursor.copy("COPY unknown TO STDOUT"):
                    self.fail("It was entered.")
        self.assertIsInstance(cm.exception.__cause__, connection.Database.Error)
        with self.assertRaises(IntegrityError):
            async with transaction.aatomic(), connection.acursor() as cursor:
                await self.copy_in(cursor, "one", "one")
        await self.assertAsyncNames()

    async def test_ended(self):
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy(COPY_IN) as copy:
                pass
            with self.assertRaisesMessage(InterfaceError, "The COPY has ended."):
                await copy.write_row(["one", 0])

    async def test_hooks(self):
        seen = []

        def note(execute, sql, params, many, context):
            seen.append(sql)
            return execute(sql, params, many, context)

        async with transaction.aatomic():
            with connection.execute_wrapper(note), self.assertNumQueries(1):
                async with connection.acursor() as cursor:
                    await self.copy_in(cursor, "one")
        self.assertEqual(seen, [COPY_IN])

    async def test_turn(self):
        """Promise 3: tasks inside wait until it has ended."""
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy(COPY_IN) as copy:
                await copy.write_row(["one", 0])
                task = asyncio.create_task(acreate("two"))
                await asyncio.sleep(0.2)
                self.assertIs(task.done(), False)
                await copy.write_row(["three", 0])
            await task
        await self.assertAsyncNames("one", "three", "two")

    @unittest.skipIf(is_native, "Thread mode tests")
    async def test_own_thread(self):
        """The thread that it needs is never made wait for it."""
        async with new_connection(), connection.acursor() as cursor:
            async with cursor.copy(COPY_IN) as copy:
                start = time.monotonic()
                with self.assertRaisesMessage(
                    transaction.TransactionManagementError, "while a copy() is going on"
                ):
                    await acreate("two")
                self.assertLess(time.monotonic() - start, 5)
                await copy.write_row(["one", 0])
        await self.assertAsyncNames("one")

    @unittest.skipIf(is_native, "Thread mode tests")
    async def test_outside_of_blocks(self):
        async with connection.acursor() as cursor:
            with self.assertRaisesMessage(
                transaction.TransactionManagementError, "copy() requires a block"
            ):
                async with cursor.copy(COPY_IN):
                    pass

    @unittest.skipUnless(is_native, "ASYNC_NATIVE tests")
    async def test_outside_of_blocks_natively(self):
        async with connection.acursor() as cursor:
            async with cursor.copy(COPY_IN) as copy:
                await copy.write_row(["one", 0])
                task = asyncio.create_task(acreate("two"))
                await asyncio.sleep(0.1)
                self.assertIs(task.done(), False)
            await task
        await self.assertAsyncNames("one", "two")

    async def test_own_statement(self):
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy(COPY_IN) as copy:
                with self.assertRaisesMessage(InterfaceError, "until its COPY has"):
                    await cursor.execute("SELECT 1")
                await copy.write_row(["one", 0])
            await cursor.execute(INSERT, ["two"])
        await self.assertAsyncNames("one", "two")

    @unittest.skipUnless(is_native, "ASYNC_NATIVE tests")
    async def test_statement_of_the_same_task(self):
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy(COPY_IN) as copy:
                with self.assertRaisesMessage(InterfaceError, "in use by another task"):
                    await Entry.objects.acount()
                await copy.write_row(["one", 0])
        await self.assertAsyncNames("one")

    async def test_foreign(self):
        """Promise 1: its calls don't need turns, but belong to the block."""
        begun = asyncio.Event()
        copies = []

        async def foreign():
            await until(begun)
            with self.assertRaisesMessage(
                transaction.TransactionManagementError, "belongs to a transaction"
            ):
                await copies[0].write_row(["foreign", 0])

        task = asyncio.create_task(foreign())
        async with transaction.aatomic(), connection.acursor() as cursor:
            async with cursor.copy(COPY_IN) as copy:
                copies.append(copy)
                begun.set()
                await task
                await copy.write_row(["one", 0])
        await self.assertAsyncNames("one")

    async def copy_slowly(self, cursor):
        async with asyncio.timeout(0.5), cursor.copy(SLOW_COPY) as copy:
            while await copy.read():
                pass

    async def test_cancelled(self):
        start = time.monotonic()
        with self.assertRaises(TimeoutError):
            async with transaction.aatomic(), connection.acursor() as cursor:
                await self.copy_slowly(cursor)
        self.assertLess(time.monotonic() - start, 12)
        await insert("one")
        await self.assertAsyncNames("one")

    async def test_cancelled_at_its_beginning(self):
        start = time.monotonic()
        with self.assertRaises(TimeoutError):
            async with transaction.aatomic(), connection.acursor() as cursor:
                async with asyncio.timeout(0.5):
                    async with cursor.copy("COPY (SELECT pg_sleep(20)) TO STDOUT"):
                        self.fail("It was entered.")
        self.assertLess(time.monotonic() - start, 12)
        await insert("one")
        await self.assertAsyncNames("one")

    async def test_swallowed_cancellation(self):
        with self.assertRaisesMessage(
            transaction.TransactionManagementError, "was cancelled inside the block"
        ):
            async with transaction.aatomic(), connection.acursor() as cursor:
                await insert("one")
                with self.assertRaises(TimeoutError):
                    await self.copy_slowly(cursor)
        await self.assertAsyncNames()

    async def test_ended_by_other_task(self):
        """Promise 5."""

        async def blocks():
            async with connection.acursor() as cursor, cursor.copy(COPY_OUT) as copy:
                async for block in copy:
                    yield block

        await sync_to_async(create_many)(3)
        async with transaction.aatomic():
            iterator = blocks()
            await anext(iterator)
            await asyncio.create_task(iterator.aclose())
            await acreate("one")

    def test_sync_block(self):
        """Promise 2: in a synchronous block, and after it's left."""

        async def copy():
            async with connection.acursor() as cursor:
                await self.copy_in(cursor, "one")

        with self.assertRaises(Rollback), transaction.atomic():
            async_to_sync(copy)()
            self.assertNames("one")
            raise Rollback
        self.assertNames()
        with transaction.atomic():
            async_to_sync(copy)()
        self.assertNames("one")

    def test_closed_loop(self):
        """Neither the turn nor the driver's lock is held afterwards."""

        async def wait_with_copy():
            async with transaction.aatomic(), connection.acursor() as cursor:
                async with cursor.copy(COPY_IN):
                    await asyncio.Event().wait()

        abandon(wait_with_copy())
        create("one")
        self.assertNames("one")

    @unittest.skipUnless(is_native, "ASYNC_NATIVE tests")
    def test_closed_loop_outside_of_blocks(self):
        async def wait_with_copy():
            async with connection.acursor() as cursor, cursor.copy(COPY_IN):
                await asyncio.Event().wait()

        abandon(wait_with_copy())
        start = time.monotonic()
        async_to_sync(insert)("one")
        self.assertLess(time.monotonic() - start, 5)
        self.assertNames("one")

    async def test_block_left_by_other_task(self):
        """Promise 4: to leave the block by an exception ends it."""
        begun = asyncio.Event()
        results = []

        async def copy_slowly():
            try:
                async with connection.acursor() as cursor:
                    async with cursor.copy(COPY_IN) as copy:
                        begun.set()
                        while True:
                            await copy.write_row(["one", 0])
                            await asyncio.sleep(0.01)
            except BaseException as exc:
                results.append(exc)

        start = time.monotonic()
        with self.assertRaises(Rollback):
            async with transaction.aatomic():
                task = asyncio.create_task(copy_slowly())
                await until(begun)
                asyncio.get_running_loop().call_later(1, task.cancel)
                raise Rollback
        self.assertLess(time.monotonic() - start, 12)
        await task
        self.assertEqual(len(results), 1)
        await self.assertAsyncNames()


@unittest.skipIf(connection.vendor == "postgresql", "Only psycopg has copy().")
class NoCopyTests(AsyncTransactionTestCase):
    async def test_attribute(self):
        async with connection.acursor() as cursor:
            with self.assertRaisesMessage(AttributeError, "copy"):
                cursor.copy("COPY")
