"""
Promise 7: a connection's query can be cancelled from another thread.
"""

import threading
import time
import unittest

from django.db import (
    DEFAULT_DB_ALIAS,
    OperationalError,
    connection,
    connections,
    transaction,
)

from . import server
from .base import (
    AsyncTransactionTestCase,
    Rollback,
    create,
    slow_query,
    wait_until,
)

INTERRUPTED = 1317


def execute(sql, params=None):
    with transaction.get_connection().cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


def is_running(text):
    """Return whether another session runs a query that contains `text`."""
    sql = (
        "SELECT 1 FROM information_schema.PROCESSLIST "
        "WHERE info LIKE %s AND id <> CONNECTION_ID()"
    )
    return bool(execute(sql, [f"%{text}%"]))


@unittest.skipUnless(
    connection.vendor in ("postgresql", "mysql", "sqlite"), "Queries can be cancelled"
)
class CancelQueryTests(AsyncTransactionTestCase):
    def setUp(self):
        super().setUp()
        self.own = connections[DEFAULT_DB_ALIAS]

    def cancel_until(self, event):
        """The query may only be about to be sent."""
        while not event.wait(0.05):
            self.own.cancel_query()

    def test_running_query(self):
        """The transaction can be rolled back, and another one begun."""
        ended = threading.Event()
        thread = threading.Thread(target=self.cancel_until, args=[ended])
        began = time.monotonic()
        with self.assertRaises(Rollback):
            with transaction.atomic():
                create("rolled back")
                thread.start()
                try:
                    with self.assertRaises(OperationalError), transaction.atomic():
                        slow_query()
                finally:
                    ended.set()
                    thread.join()
                create("rolled back, too")
                raise Rollback
        self.assertLess(time.monotonic() - began, 10)
        create("committed")
        self.assertNames("committed")

    def test_no_query(self):
        create("before")
        thread = threading.Thread(target=self.own.cancel_query)
        thread.start()
        thread.join()
        create("after")
        self.assertNames("after", "before")


@unittest.skipUnless(connection.vendor == "mysql", "MariaDB and MySQL tests")
class KillQueryTests(AsyncTransactionTestCase):
    """There a query is cancelled from a connection of its own."""

    def cancel(self, text):
        """Cancel this thread's query as soon as the server runs it."""
        own = connections[DEFAULT_DB_ALIAS]
        seen = []

        def wait_and_cancel():
            try:
                seen.append(wait_until(lambda: is_running(text)))
                own.cancel_query()
            finally:
                connection.close()

        thread = threading.Thread(target=wait_and_cancel)
        thread.start()
        self.addCleanup(self.assertEqual, seen, [True])
        self.addCleanup(thread.join)

    def test_running_query(self):
        """Only the query is cancelled: the transaction can be rolled back."""
        with self.assertRaises(OperationalError) as cm:
            with transaction.atomic():
                create("rolled back")
                number = server.session_id()
                self.cancel("SLEEP")
                execute("SELECT SLEEP(20)")
        self.assertEqual(cm.exception.args[0], INTERRUPTED)
        self.assertNames()
        self.assertEqual(server.session_id(), number)

    def test_query_that_returns_nevertheless(self):
        """The driver isn't told that it was cancelled."""
        self.cancel("BENCHMARK")
        begin = time.monotonic()
        self.assertEqual(execute("SELECT BENCHMARK(50000000, MD5('x'))"), ((0,),))
        self.assertLess(time.monotonic() - begin, 10)

    def test_no_query(self):
        """The next one isn't cancelled in its place."""
        create("before")
        for _ in range(10):
            thread = threading.Thread(target=connection.cancel_query)
            thread.start()
            thread.join()
            self.assertEqual(execute("SELECT SLEEP(0.01)"), ((0,),))

    def test_not_connected(self):
        connection.close()
        connection.cancel_query()
        self.assertIsNone(connection.connection)

    def test_session_has_ended(self):
        number = server.session_id()
        self.addCleanup(connection.close)
        with server.observer() as query:
            query(server.END_SESSION, number)
            left = wait_until(lambda: number not in query(server.SESSIONS))
        self.assertIs(left, True)
        connection.cancel_query()

    def test_nothing_is_left_of_it(self):
        def sessions():
            return set(server.run(connection, server.SESSIONS))

        create("before")
        before = sessions()
        connection.cancel_query()
        self.assertIs(wait_until(lambda: sessions() == before), True)
