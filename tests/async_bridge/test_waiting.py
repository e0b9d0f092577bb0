"""
Promises 7, 11, 14 and 17: a connection to PostgreSQL waits on the event loop
when it's used in the bridge, and in the thread otherwise.
"""

import asyncio
import gc
import logging
import os
import socket
import tempfile
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from asgiref.sync import async_to_sync

from django.db import DatabaseError, bridge, connection
from django.test import TransactionTestCase

try:
    import greenlet
    import psycopg

    from django.db.backends.postgresql.waiting import WaitingConnection
except ImportError:
    greenlet = psycopg = None

try:
    import uvloop
except ImportError:
    uvloop = None

SLEEP = "SELECT pg_sleep(%s)"


class Heartbeat:
    """Measure for how long an event loop is blocked."""

    async def __aenter__(self):
        self.longest = 0
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0)
        return self

    async def _beat(self):
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, time.monotonic() - before)

    async def __aexit__(self, *exc_info):
        # Let it notice the last pause.
        await asyncio.sleep(0.002)
        self._task.cancel()


@contextmanager
def no_blocking_waits():
    """Fail if psycopg waits in this thread, in any way that it has."""
    ident = threading.get_ident()

    def guard(func):
        def inner(*args, **kwargs):
            if threading.get_ident() == ident:
                raise AssertionError("It blocked the event loop.")
            return func(*args, **kwargs)

        return inner

    with ExitStack() as stack:
        for owner, name in (
            (psycopg.Connection, "wait"),
            (psycopg.waiting, "wait"),
            (psycopg.waiting, "wait_conn"),
        ):
            patched = guard(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, patched))
        yield


async def waits_on_server(pid):
    """Wait until the server works for a session."""
    while await asyncio.to_thread(state_of, pid) != "active":
        await asyncio.sleep(0.01)


def state_of(pid):
    """Return the state of a session of the server, or None if it's gone."""
    with psycopg.connect(**parameters(), autocommit=True) as conn:
        row = conn.execute(
            "SELECT state FROM pg_stat_activity WHERE pid = %s", [pid]
        ).fetchone()
    return row and row[0]


def parameters():
    params = connection.get_connection_params()
    params.pop("cursor_factory")
    return params


@unittest.skipUnless(connection.vendor == "postgresql", "PostgreSQL is required.")
@unittest.skipUnless(greenlet and psycopg, "psycopg 3 and greenlet are required.")
class WaitingTestCase(TransactionTestCase):
    available_apps = []

    def run_in_bridge(self, func, *args, **kwargs):
        """Call a function that may not block in the bridge."""

        async def main():
            with no_blocking_waits():
                return await bridge.run(func, *args)

        return self.run_on_loop(main(), **kwargs)

    def run_on_loop(self, coroutine, **kwargs):
        return asyncio.run(asyncio.wait_for(coroutine, 60), **kwargs)

    def connect(self, **kwargs):
        conn = WaitingConnection.connect(**{**parameters(), **kwargs})
        self.addCleanup(conn.close)
        return conn

    async def aconnect(self, **kwargs):
        return await bridge.run(self.connect, **kwargs)

    def assertSessionBecomes(self, pid, *states):
        deadline = time.monotonic() + 10
        while (state := state_of(pid)) not in states:
            self.assertLess(time.monotonic(), deadline, state)
            time.sleep(0.01)


class OperationsTests(WaitingTestCase):
    """Everything that psycopg does, it does in the bridge as in a thread."""

    def check(self, func, **kwargs):
        def use():
            with self.connect(**kwargs) as conn:
                return func(conn)

        expected = use()
        self.assertEqual(self.run_in_bridge(use), expected)
        if uvloop is not None:
            found = self.run_in_bridge(use, loop_factory=uvloop.new_event_loop)
            self.assertEqual(found, expected)
        return expected

    def test_execute_and_fetch(self):
        def func(conn):
            with conn.cursor() as cursor:
                cursor.execute("SELECT generate_series(1, %s)", [1000])
                found = [cursor.fetchone(), cursor.fetchmany(10), cursor.fetchall()]
                cursor.execute("SELECT 'a' || %s", ["b"])
                return [*found, list(cursor), cursor.statusmessage]

        self.assertEqual(self.check(func)[3:], [[("ab",)], "SELECT 1"])

    def test_large_values(self):
        """Sending and receiving takes several rounds."""
        value = "x" * 20_000_000

        def func(conn):
            return conn.execute("SELECT %s::text", [value]).fetchone() == (value,)

        self.assertIs(self.check(func), True)

    def test_executemany(self):
        def func(conn):
            with conn.cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE numbers (number int)")
                cursor.executemany(
                    "INSERT INTO numbers VALUES (%s) RETURNING number",
                    [(number,) for number in range(1000)],
                    returning=True,
                )
                found = [cursor.fetchone()]
                while cursor.nextset():
                    found.append(cursor.fetchone())
                return found

        self.assertEqual(len(self.check(func)), 1000)

    def test_cursor_classes(self):
        def func(conn):
            return [
                conn.execute("SELECT %s + 1", [number]).fetchone()
                for number in range(10)
            ]

        for cursor_factory in (psycopg.Cursor, psycopg.ClientCursor):
            for prepare_threshold in (None, 0, 5):
                with self.subTest(
                    cursor_factory=cursor_factory, prepare_threshold=prepare_threshold
                ):
                    self.check(
                        func,
                        cursor_factory=cursor_factory,
                        prepare_threshold=prepare_threshold,
                    )

    def test_server_side_cursor(self):
        def func(conn):
            with conn.cursor("named", scrollable=True) as cursor:
                cursor.itersize = 10
                cursor.execute("SELECT generate_series(1, 100)")
                found = [cursor.fetchone(), cursor.fetchmany(50), list(cursor)]
                cursor.scroll(0, mode="absolute")
                return [*found, cursor.fetchone()]

        self.assertEqual(self.check(func)[-1], (1,))

    def test_stream(self):
        def func(conn):
            cursor = conn.cursor()
            found = list(cursor.stream("SELECT generate_series(1, 100)"))
            for row in cursor.stream("SELECT generate_series(1, 100000)"):
                break
            # psycopg has cancelled it.
            conn.rollback()
            return found, row, conn.execute("SELECT 1").fetchone()

        self.assertEqual(self.check(func)[1:], ((1,), (1,)))

    def test_copy(self):
        def func(conn):
            with conn.cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE numbers (number int)")
                with cursor.copy("COPY numbers FROM STDIN") as copy:
                    for number in range(10000):
                        copy.write_row([number])
                with self.assertRaises(ValueError), conn.transaction():
                    with cursor.copy("COPY numbers FROM STDIN") as copy:
                        copy.write_row([1])
                        raise ValueError
                with cursor.copy("COPY numbers TO STDOUT") as copy:
                    rows = list(copy.rows())
                with cursor.copy("COPY numbers TO STDOUT") as copy:
                    first = copy.read_row()
                    while copy.read():
                        pass
                return len(rows), first, conn.info.transaction_status.name

        self.assertEqual(self.check(func), (10000, ("0",), "INTRANS"))

    def test_notices(self):
        def func(conn):
            notices = []
            conn.add_notice_handler(lambda diag: notices.append(diag.message_primary))
            conn.execute("DO $$ BEGIN RAISE NOTICE 'attention'; END $$")
            return notices

        self.assertEqual(self.check(func), ["attention"])

    def test_notifications(self):
        def func(conn):
            conn.execute("LISTEN channel")
            conn.execute("NOTIFY channel, 'a'")
            conn.execute("NOTIFY channel, 'b'")
            found = [
                notify.payload for notify in conn.notifies(timeout=5, stop_after=2)
            ]
            before = time.monotonic()
            found += conn.notifies(timeout=0.2)
            return found, time.monotonic() - before >= 0.2

        self.assertEqual(self.check(func, autocommit=True), (["a", "b"], True))

    def test_pipeline(self):
        def func(conn):
            conn.execute("CREATE TEMPORARY TABLE numbers (number int)")
            with conn.pipeline() as pipeline:
                cursors = [
                    conn.execute(
                        "INSERT INTO numbers VALUES (%s) RETURNING number", [number]
                    )
                    for number in range(100)
                ]
                pipeline.sync()
                found = [cursor.fetchone() for cursor in cursors]
            with self.assertRaises(psycopg.errors.DivisionByZero), conn.pipeline():
                conn.execute("SELECT 1 / 0")
            conn.rollback()
            return found, conn.execute("SELECT 1").fetchone()

        self.check(func)

    def test_transactions(self):
        def func(conn):
            conn.execute("CREATE TEMPORARY TABLE numbers (number int)")
            conn.commit()
            with conn.transaction():
                conn.execute("INSERT INTO numbers VALUES (1)")
                with self.assertRaises(psycopg.DatabaseError), conn.transaction():
                    conn.execute("INSERT INTO numbers VALUES (2)")
                    conn.execute("SELECT 1 / 0")
            conn.execute("INSERT INTO numbers VALUES (3)")
            conn.rollback()
            conn.autocommit = True
            conn.execute("INSERT INTO numbers VALUES (4)")
            conn.autocommit = False
            conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            conn.read_only = True
            conn.deferrable = True
            level = conn.execute("SHOW transaction_isolation").fetchone()
            with self.assertRaises(psycopg.errors.ReadOnlySqlTransaction):
                conn.execute("CREATE TABLE more (number int)")
            conn.rollback()
            return level, conn.execute("SELECT * FROM numbers").fetchall()

        self.assertEqual(self.check(func), (("serializable",), [(1,), (4,)]))

    def test_error(self):
        def func(conn):
            with self.assertRaises(psycopg.errors.UndefinedTable) as cm:
                conn.execute("SELECT * FROM nothing")
            status = conn.info.transaction_status.name
            conn.rollback()
            return cm.exception.diag.message_primary, status

        self.assertEqual(self.check(func)[1], "INERROR")

    def test_connection_parameters(self):
        def func(conn):
            return (
                conn.autocommit,
                conn.prepare_threshold,
                conn.cursor_factory,
                conn.row_factory,
                conn.adapters.get_loader(3802, psycopg.pq.Format.TEXT).__name__,
                conn.execute("SHOW application_name").fetchone(),
                type(conn),
            )

        found = self.check(
            func,
            autocommit=True,
            prepare_threshold=3,
            cursor_factory=psycopg.ClientCursor,
            row_factory=psycopg.rows.dict_row,
            application_name="tests",
        )
        self.assertEqual(found[1], 3)
        self.assertEqual(found[5], {"application_name": "tests"})

    def test_session_is_terminated(self):
        def func(conn):
            pid = conn.info.backend_pid
            timer = threading.Timer(0.2, self.terminate, [pid])
            timer.start()
            with self.assertRaises(psycopg.OperationalError):
                conn.execute(SLEEP, [30])
            timer.join()
            return conn.closed

        self.assertIs(self.check(func), True)

    def terminate(self, pid):
        with psycopg.connect(**parameters(), autocommit=True) as conn:
            conn.execute("SELECT pg_terminate_backend(%s)", [pid])


class TurnsTests(WaitingTestCase):
    """Threads and event loops use one connection in turn."""

    def test_transaction(self):
        def insert(conn, number):
            conn.execute("INSERT INTO numbers VALUES (%s)", [number])

        def numbers(conn):
            return [number for (number,) in conn.execute("TABLE numbers").fetchall()]

        async def in_bridge(conn):
            await bridge.run(insert, conn, 2)
            await asyncio.to_thread(insert, conn, 3)

            def service():
                insert(conn, 4)
                async_to_sync(bridge.run)(insert, conn, 5)
                insert(conn, 6)

            await bridge.run(service)

        conn = self.connect()
        conn.execute("CREATE TEMPORARY TABLE numbers (number int)")
        conn.commit()
        insert(conn, 1)
        self.run_on_loop(in_bridge(conn))
        if uvloop is not None:
            main = bridge.run(insert, conn, 7)
            self.run_on_loop(main, loop_factory=uvloop.new_event_loop)
        else:
            insert(conn, 7)
        self.assertEqual(numbers(conn), [1, 2, 3, 4, 5, 6, 7])
        self.run_on_loop(bridge.run(conn.rollback))
        self.assertEqual(numbers(conn), [])

    def test_connected_on_a_loop(self):
        conn = self.run_on_loop(self.aconnect())
        self.assertEqual(conn.execute("SELECT 1").fetchone(), (1,))

    def test_server_side_cursor(self):
        async def main():
            conn = await self.aconnect()
            cursor = await bridge.run(conn.cursor, "named")
            await bridge.run(cursor.execute, "SELECT generate_series(1, 3)")
            found = [
                await bridge.run(cursor.fetchone),
                await asyncio.to_thread(cursor.fetchone),
                await bridge.run(cursor.fetchone),
            ]
            await bridge.run(cursor.close)
            return found

        self.assertEqual(self.run_on_loop(main()), [(1,), (2,), (3,)])

    def test_at_once(self):
        """Tasks that don't take turns are refused, and don't hang."""

        async def main():
            conn = await self.aconnect()
            first = asyncio.create_task(bridge.run(conn.execute, SLEEP, [0.3]))
            await asyncio.sleep(0)
            msg = "This connection is in use by another task or thread."
            with self.assertRaisesMessage(psycopg.InterfaceError, msg):
                await bridge.run(conn.execute, "SELECT 1")
            # A thread may wait.
            await asyncio.to_thread(conn.execute, "SELECT 1")
            self.assertIs(first.done(), True)

        self.run_on_loop(main())


class LoopTests(WaitingTestCase):
    """Promise 11: The loop is never blocked."""

    def test_queries(self):
        """20 tasks wait at the same time."""

        async def main():
            async with Heartbeat() as heartbeat:
                conns = await asyncio.gather(*[self.aconnect() for _ in range(20)])
                before = time.monotonic()
                with no_blocking_waits():
                    await asyncio.gather(
                        *[bridge.run(conn.execute, SLEEP, [1]) for conn in conns]
                    )
                duration = time.monotonic() - before
            return heartbeat.longest, duration

        longest, duration = self.run_on_loop(main())
        # Two queries after each other would take 2 s, a blocked loop 1 s.
        self.assertLess(duration, 1.8)
        self.assertLess(longest, 0.8)

    def test_without_waiting(self):
        """What never has to wait gives way to other tasks."""

        def work(conn):
            def generate():
                return 1
                yield

            before = time.monotonic()
            while time.monotonic() < before + 1:
                self.assertEqual(conn.wait(generate()), 1)

        async def main():
            conn = await self.aconnect()
            async with Heartbeat() as heartbeat:
                await bridge.run(work, conn)
            return heartbeat.longest

        self.assertLess(self.run_on_loop(main()), 0.5)

    def test_copy(self):

        def write(conn):
            conn.execute("CREATE TEMPORARY TABLE numbers (number int)")
            with conn.cursor().copy("COPY numbers FROM STDIN") as copy:
                before = time.monotonic()
                while time.monotonic() < before + 1.5:
                    copy.write("1\n" * 20_000)

        async def main():
            conn = await self.aconnect()
            async with Heartbeat() as heartbeat:
                await bridge.run(write, conn)
            return heartbeat.longest

        self.assertLess(self.run_on_loop(main()), 1)

    def test_lookup_of_the_host(self):
        """Names are resolved in other threads."""
        threads = []
        getaddrinfo = socket.getaddrinfo

        def record(*args, **kwargs):
            threads.append(threading.get_ident())
            return getaddrinfo("127.0.0.1", *args[1:], **kwargs)

        def connect():
            with self.assertRaises(psycopg.OperationalError):
                self.connect(host="db.invalid", port=1)

        with mock.patch("socket.getaddrinfo", record):
            self.run_in_bridge(connect)
        self.assertNotEqual(threads, [])
        self.assertNotIn(threading.get_ident(), threads)

    def test_service_file(self):
        """libpq itself resolves the names in a service file."""
        params = parameters()
        idents = []
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "pg_service.conf"
            lines = ["[tests]", f"dbname={params.pop('dbname')}"]
            for name in ("host", "port", "user"):
                if name in params:
                    lines.append(f"{name}={params.pop(name)}")
            path.write_text("\n".join(lines) + "\n")
            connect_gen = WaitingConnection._connect_gen.__func__

            @classmethod
            def record(cls, *args, **kwargs):
                idents.append(threading.get_ident())
                return connect_gen(cls, *args, **kwargs)

            def use():
                conn = WaitingConnection.connect(service="tests", **params)
                self.addCleanup(conn.close)
                return conn.execute("SELECT 1").fetchone()

            with (
                mock.patch.dict(os.environ, {"PGSERVICEFILE": str(path)}),
                mock.patch.object(WaitingConnection, "_connect_gen", record),
            ):
                self.assertEqual(self.run_on_loop(bridge.run(use)), (1,))
        self.assertNotIn(threading.get_ident(), idents)


class ConnectTests(WaitingTestCase):
    def setUp(self):
        # It accepts connections, and says nothing.
        self.server = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.server.close)
        self.silent = {"host": "127.0.0.1", "port": self.server.getsockname()[1]}

    def test_failure(self):
        def connect():
            with self.assertRaises(psycopg.OperationalError) as cm:
                self.connect(dbname="nothing_of_this_name")
            return str(cm.exception)

        self.assertEqual(self.run_in_bridge(connect), connect())

    def test_timeout(self):
        def connect():
            with self.assertRaises(psycopg.errors.ConnectionTimeout):
                self.connect(connect_timeout=2, **self.silent)

        async def main():
            async with Heartbeat() as heartbeat:
                await bridge.run(connect)
            return heartbeat.longest

        self.assertLess(self.run_on_loop(main()), 1)

    def test_cancelled(self):
        async def main():
            task = asyncio.create_task(self.aconnect(**self.silent))
            loop = asyncio.get_running_loop()
            self.server.setblocking(False)
            client, _ = await loop.sock_accept(self.server)
            with client:
                task.cancel()
                await asyncio.wait([task], timeout=5)
                self.assertIs(task.cancelled(), True)
                del task
                gc.collect()
                # The client has closed its socket.
                while await asyncio.wait_for(loop.sock_recv(client, 1000), 5):
                    pass

        self.run_on_loop(main())

    def test_cancelled_in_thread(self):
        """A connection that arrives too late is closed."""
        conns = []

        class Slow(WaitingConnection):
            @staticmethod
            def _is_host_unknown(*args):
                return True

            @classmethod
            def _connect_gen(cls, *args, **kwargs):
                conn = yield from super()._connect_gen(*args, **kwargs)
                conns.append(conn)
                proceed.wait(10)
                return conn

        async def main():
            task = asyncio.create_task(bridge.run(Slow.connect, **parameters()))
            while not conns:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task], timeout=5)
            self.assertIs(task.cancelled(), True)
            proceed.set()
            while not conns[0].closed:
                await asyncio.sleep(0.01)

        proceed = threading.Event()
        self.run_on_loop(main())


class CancellationTests(WaitingTestCase):
    """
    Promise 7: The query is cancelled on the server, and the connection is
    clean or closed.
    """

    def cancel(
        self,
        use,
        times=1,
        closed=False,
        state="idle in transaction (aborted)",
        **kwargs,
    ):
        """Cancel a task while the server works for it."""

        async def main():
            conn = await self.aconnect(**kwargs)
            pid = conn.info.backend_pid
            task = asyncio.create_task(bridge.run(use, conn))
            await waits_on_server(pid)
            # No executor is needed.
            executor = ThreadPoolExecutor(1)
            asyncio.get_running_loop().set_default_executor(executor)
            executor.submit(finished.wait, 20)
            before = time.monotonic()
            for _ in range(times):
                task.cancel()
                await asyncio.sleep(0)
            async with Heartbeat() as heartbeat:
                await asyncio.wait([task], timeout=20)
            finished.set()
            self.assertLess(time.monotonic() - before, 10)
            self.assertLess(heartbeat.longest, 1)
            self.assertIs(task.cancelled(), True)
            return conn, pid

        finished = threading.Event()
        conn, pid = self.run_on_loop(main())
        self.assertIs(conn.closed, closed)
        self.assertIs(conn.lock.locked(), False)
        if closed:
            self.assertSessionBecomes(pid, None)
        else:
            self.assertSessionBecomes(pid, state)
            conn.rollback()
            self.assertEqual(conn.execute("SELECT 1").fetchone(), (1,))

    def sleep(self, conn):
        conn.execute(SLEEP, [30])

    def test_query(self):
        self.cancel(self.sleep)
        self.cancel(self.sleep, autocommit=True, state="idle")

    def test_cancelled_again(self):
        self.cancel(self.sleep, times=3)

    def test_old_libpq(self):
        """Cancelling blocks with libpq < 17."""
        with mock.patch.object(
            psycopg.capabilities, "has_cancel_safe", return_value=False
        ):
            self.cancel(self.sleep)

    def test_unable_to_cancel(self):
        async def refuse(*args, **kwargs):
            raise psycopg.OperationalError("No")

        with (
            mock.patch("psycopg.AsyncConnection.cancel_safe", refuse),
            mock.patch("psycopg.Connection.cancel", side_effect=psycopg.Error("No")),
            self.assertLogs("django.db.backends.postgresql", logging.INFO),
        ):

            async def main():
                conn = await self.aconnect()
                pid = conn.info.backend_pid
                task = asyncio.create_task(bridge.run(conn.execute, SLEEP, [2]))
                await waits_on_server(pid)
                task.cancel()
                await asyncio.wait([task], timeout=1)
                self.assertIs(task.cancelled(), True)
                return conn, pid

            conn, pid = self.run_on_loop(main())
        self.assertIs(conn.closed, True)
        self.assertSessionBecomes(pid, None)

    def test_timeout(self):
        async def main():
            conn = await self.aconnect()
            with self.assertRaises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await bridge.run(self.sleep, conn)
            await bridge.run(conn.rollback)
            return await bridge.run(lambda: conn.execute("SELECT 1").fetchone())

        self.assertEqual(self.run_on_loop(main()), (1,))

    def test_exception_in_the_bridge(self):
        """The code may go on using the connection on its way out."""
        found = []

        def use(conn):
            try:
                self.sleep(conn)
            finally:
                conn.rollback()
                found.append(conn.execute("SELECT 1").fetchone())

        self.cancel(use, state="idle in transaction")
        self.assertEqual(found, [(1,)])

    def test_executemany(self):
        def use(conn):
            conn.cursor().executemany(SLEEP, [[30], [30]])

        self.cancel_somehow(use)

    def test_pipeline(self):
        def use(conn):
            with conn.pipeline():
                conn.execute("SELECT 1")
                self.sleep(conn)
                conn.execute("SELECT 2").fetchone()

        self.cancel_somehow(use)

    def test_server_side_cursor(self):
        def use(conn):
            with conn.cursor("named") as cursor:
                cursor.execute("SELECT pg_sleep(30) FROM generate_series(1, 10)")
                cursor.fetchone()

        self.cancel_somehow(use)

    def test_stream(self):
        def use(conn):
            sql = "SELECT pg_sleep(30) FROM generate_series(1, 10)"
            for _ in conn.cursor().stream(sql):
                pass

        self.cancel_somehow(use)

    def test_copy_out(self):
        def use(conn):
            sql = "COPY (SELECT pg_sleep(30) FROM generate_series(1, 10)) TO STDOUT"
            with conn.cursor().copy(sql) as copy:
                for _ in copy:
                    pass

        self.cancel_somehow(use)

    def test_copy_in(self):
        def use(conn):
            conn.execute("CREATE TEMPORARY TABLE numbers (number int)")
            conn.execute(
                "CREATE FUNCTION pg_temp.slow() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN PERFORM pg_sleep(30); RETURN NEW; END $$"
            )
            conn.execute(
                "CREATE TRIGGER slow BEFORE INSERT ON numbers "
                "FOR EACH ROW EXECUTE FUNCTION pg_temp.slow()"
            )
            with conn.cursor().copy("COPY numbers FROM STDIN") as copy:
                while True:
                    copy.write("1\n" * 100_000)

        self.cancel_somehow(use)

    def cancel_somehow(self, use):
        """Cancel where psycopg may leave the connection either way."""

        async def main():
            conn = await self.aconnect()
            pid = conn.info.backend_pid
            task = asyncio.create_task(bridge.run(use, conn))
            await waits_on_server(pid)
            # It may be active for what came before.
            await asyncio.sleep(0.3)
            task.cancel()
            with self.assertNoLogs("psycopg", logging.WARNING):
                await asyncio.wait([task], timeout=20)
            self.assertIs(task.done(), True)
            self.assertIs(task.cancelled(), True, task)
            return conn, pid

        conn, pid = self.run_on_loop(main())
        self.assertIs(conn.lock.locked(), False)
        self.assertSessionBecomes(pid, None, "idle", "idle in transaction (aborted)")
        if not conn.closed:
            conn.rollback()
            self.assertEqual(conn.execute("SELECT 1").fetchone(), (1,))

    def test_commit(self):
        """COMMIT runs to its end."""
        setup = self.connect(autocommit=True)
        setup.execute("CREATE TABLE waiting_numbers (number int)")
        self.addCleanup(setup.execute, "DROP TABLE waiting_numbers")
        setup.execute(
            "CREATE FUNCTION waiting_slow() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(1); RETURN NEW; END $$"
        )
        self.addCleanup(setup.execute, "DROP FUNCTION waiting_slow CASCADE")
        setup.execute(
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON waiting_numbers "
            "DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION waiting_slow()"
        )
        log = []

        def use(conn):
            conn.execute("INSERT INTO waiting_numbers VALUES (1)")
            log.append("commit")
            try:
                conn.commit()
            finally:
                log.append(conn.info.transaction_status.name)
            log.append("never")

        async def main(end):
            conn = await self.aconnect()
            task = asyncio.create_task(bridge.run(use, conn))
            while not log:
                await asyncio.sleep(0.01)
            await waits_on_server(conn.info.backend_pid)
            if end:
                return
            task.cancel()
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.wait([task])
            self.assertIs(task.cancelled(), True)

        self.run_on_loop(main(end=False))
        self.assertEqual(log, ["commit", "IDLE"])
        log.clear()
        # asyncio.run() cancels the task.
        asyncio.run(main(end=True))
        self.assertEqual(log, ["commit", "IDLE"])
        count = setup.execute("SELECT count(*) FROM waiting_numbers").fetchone()
        self.assertEqual(count, (2,))

    def test_rollback(self):
        """ROLLBACK runs to its end."""
        log = []

        def use(conn):
            conn.execute("SELECT 1")
            asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
            try:
                conn.rollback()
            finally:
                log.append(conn.info.transaction_status.name)
            log.append("never")

        async def main():
            conn = await self.aconnect()
            task = asyncio.create_task(bridge.run(use, conn))
            await asyncio.wait([task])
            self.assertIs(task.cancelled(), True)

        with mock.patch.object(WaitingConnection, "cancel_safe") as cancel_safe:
            self.run_on_loop(main())
        cancel_safe.assert_not_called()
        self.assertEqual(log, ["IDLE"])

    def test_keyboard_interrupt(self):
        """The task is cancelled by asyncio.run()."""

        class Interrupt(SystemExit):
            pass

        def interrupt():
            raise Interrupt

        conn = self.connect()
        pid = conn.info.backend_pid

        async def main():
            task = asyncio.create_task(bridge.run(self.sleep, conn))
            await waits_on_server(pid)
            asyncio.get_running_loop().call_soon(interrupt)
            await task

        with self.assertRaises(Interrupt):
            asyncio.run(main())
        self.assertSessionBecomes(pid, None, "idle in transaction (aborted)")


class ClosedTests(WaitingTestCase):
    """Promise 7: A loop closed with work pending leaves no open session."""

    def use(self, conn):
        try:
            conn.execute(SLEEP, [30])
        finally:
            try:
                conn.rollback()
            except psycopg.OperationalError as exc:
                self.exceptions.append(exc)

    def setUp(self):
        self.exceptions = []

    def test_coroutine_closed(self):
        conn = self.connect(autocommit=True)
        pid = conn.info.backend_pid

        async def main():
            coroutine = bridge.run(self.use, conn)
            coroutine.send(None)
            await waits_on_server(pid)
            coroutine.close()

        self.run_on_loop(main())
        self.assertEqual(len(self.exceptions), 1)
        self.assertSessionBecomes(pid, None)
        self.assertIs(conn.closed, True)

    def test_not_used_again(self):
        conn = self.connect(autocommit=True)
        pid = conn.info.backend_pid

        async def main():
            coroutine = bridge.run(conn.execute, SLEEP, [30])
            coroutine.send(None)
            await waits_on_server(pid)
            coroutine.close()

        self.run_on_loop(main())
        self.assertSessionBecomes(pid, None)

    def test_loop_closed(self):
        conn = self.connect()
        pid = conn.info.backend_pid
        loop = asyncio.new_event_loop()
        task = loop.create_task(bridge.run(self.use, conn))
        loop.run_until_complete(waits_on_server(pid))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        with self.assertLogs("asyncio", logging.ERROR):
            del task
            gc.collect()
        self.assertEqual(len(self.exceptions), 1)
        self.assertSessionBecomes(pid, None)
        self.assertIs(conn.closed, True)

    def test_between_queries(self):
        conn = self.connect()
        pid = conn.info.backend_pid

        def use():
            try:
                conn.execute("SELECT 1")
                bridge.await_(asyncio.Event().wait())
            finally:
                with self.assertRaisesMessage(psycopg.OperationalError, "was closed"):
                    conn.rollback()

        loop = asyncio.new_event_loop()
        task = loop.create_task(bridge.run(use))
        while conn.info.transaction_status.name != "INTRANS":
            loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        with self.assertLogs("asyncio", logging.ERROR):
            del task
            gc.collect()
        self.assertSessionBecomes(pid, None)

    def test_closed_meanwhile(self):
        """No event loop reports that a socket was closed meanwhile."""

        async def main():
            conn = await self.aconnect(autocommit=True)
            pid = conn.info.backend_pid
            # The waits for one connection have a timer in common.
            for _ in range(2):
                await bridge.run(conn.execute, SLEEP, [0.15])
            task = asyncio.create_task(bridge.run(conn.execute, SLEEP, [2]))
            await waits_on_server(pid)
            conn.close()
            with self.assertRaises(psycopg.OperationalError):
                await asyncio.wait_for(task, 10)
            return pid

        self.assertSessionBecomes(self.run_on_loop(main()), None)


class BackendTests(WaitingTestCase):
    """Django's backend, with ASYNC_NATIVE."""

    def test_default(self):
        """Without the setting, nothing is different."""
        stock = connection.copy()
        stock.settings_dict["ASYNC_NATIVE"] = False
        stock.settings_dict["OPTIONS"].pop("pool", None)
        self.addCleanup(stock.close)
        stock.connect()
        self.assertIs(type(stock.connection), psycopg.Connection)

    def check(self, use, **options):
        def in_bridge():
            native = connection.copy()
            native.settings_dict["ASYNC_NATIVE"] = True
            native.settings_dict["OPTIONS"] = {
                **native.settings_dict["OPTIONS"],
                **options,
            }
            native.settings_dict["OPTIONS"].pop("pool", None)
            try:
                native.connect()
                self.assertIsInstance(native.connection, WaitingConnection)
                return use(native)
            finally:
                native.close()

        expected = in_bridge()
        self.assertEqual(self.run_in_bridge(in_bridge), expected)
        return expected

    def test_cursor(self):
        def use(native):
            with native.cursor() as cursor:
                cursor.execute("SELECT %s::int", [1])
                with self.assertRaises(DatabaseError):
                    cursor.execute("SELECT nothing")
                cursor.execute("SELECT %s::int + 1", [1])
                return cursor.fetchall()

        self.assertEqual(self.check(use), [(2,)])

    def test_options(self):
        def use(native):
            native.set_autocommit(False)
            with native.cursor() as cursor:
                for number in range(3):
                    cursor.execute("SELECT %s::int", [number])
                cursor.execute("SHOW transaction_isolation")
                level = cursor.fetchone()
                cursor.execute("SELECT current_user")
                role = cursor.fetchone()
            native.rollback()
            return level, role, native.is_usable()

        for options in (
            {},
            {"server_side_binding": True},
            {"prepare_threshold": 0},
            {"isolation_level": psycopg.IsolationLevel.REPEATABLE_READ},
            {"assume_role": "pg_read_all_data"},
        ):
            with self.subTest(options=options):
                level, role, usable = self.check(use, **options)
                self.assertEqual(
                    level[0] == "repeatable read", "isolation_level" in options
                )
                self.assertEqual(
                    role[0] == "pg_read_all_data", "assume_role" in options
                )
                self.assertIs(usable, True)

    def test_chunked_cursor(self):
        def use(native):
            with native.chunked_cursor() as cursor:
                cursor.execute("SELECT generate_series(1, %s)", [100])
                return [cursor.fetchmany(30), cursor.fetchmany(30)]

        for server_side_binding in (True, False):
            with self.subTest(server_side_binding=server_side_binding):
                self.check(use, server_side_binding=server_side_binding)

    def test_transaction(self):
        def use(native):
            native.set_autocommit(False)
            with native.cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE numbers (number int)")
                native.commit()
                cursor.execute("INSERT INTO numbers VALUES (1)")
                sid = native.savepoint()
                cursor.execute("INSERT INTO numbers VALUES (2)")
                native.savepoint_rollback(sid)
                native.commit()
                cursor.execute("INSERT INTO numbers VALUES (3)")
                native.rollback()
                native.set_autocommit(True)
                cursor.execute("TABLE numbers")
                return cursor.fetchall()

        self.assertEqual(self.check(use), [(1,)])
