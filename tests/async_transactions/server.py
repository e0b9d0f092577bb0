"""
What the database server knows of its sessions, and what it does to them.

Everything here works in threads that don't run an event loop. A vendor that
has an entry in each of the dictionaries is supported.
"""

import threading
from contextlib import contextmanager
from functools import partial

from django.db import connection, transaction
from django.db.backends.base.base import NO_DB_ALIAS

# The identifier of the session that asks.
SESSION_ID = {
    "postgresql": "SELECT pg_backend_pid()",
    "mysql": "SELECT CONNECTION_ID()",
}

# The identifiers of the other sessions in this database.
SESSIONS = {
    "postgresql": (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    ),
    # What SHOW PROCESSLIST shows.
    "mysql": (
        "SELECT id FROM information_schema.processlist WHERE db = DATABASE() "
        "AND id <> CONNECTION_ID()"
    ),
}

# Those of them in which a statement or a transaction is under way.
BUSY_SESSIONS = {
    # The state of one that is only starting is NULL.
    "postgresql": f"{SESSIONS['postgresql']} AND state IS DISTINCT FROM 'idle'",
    # An idle one is "Killed" after KILL QUERY, until its next statement.
    "mysql": (
        f"{SESSIONS['mysql']} AND (command NOT IN ('Sleep', 'Killed') OR id IN "
        "(SELECT trx_mysql_thread_id FROM information_schema.innodb_trx))"
    ),
}

# A row if a session runs a statement.
STATEMENTS = {
    "postgresql": "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'",
    "mysql": (
        "SELECT 1 FROM information_schema.processlist WHERE id = %s "
        "AND command = 'Query'"
    ),
}

CANCEL_QUERY = {
    "postgresql": "SELECT pg_cancel_backend(%s)",
    "mysql": "KILL QUERY %s",
}

END_SESSION = {
    "postgresql": "SELECT pg_terminate_backend(%s, 5000)",
    "mysql": "KILL %s",
}

# What the driver's exceptions say afterwards.
QUERY_CANCELLED = {
    "postgresql": "canceling statement due to user request",
    "mysql": "Query execution was interrupted",
}
SESSION_ENDED = {
    "postgresql": "terminating connection due to administrator command",
    # "Server has gone away" or "Lost connection", by their numbers.
    "mysql": "(20",
}


def is_supported():
    return connection.vendor in SESSIONS


def run(connection, queries, *params):
    """Run the one of these queries that the vendor understands."""
    with connection.cursor() as cursor:
        cursor.execute(queries[connection.vendor], params)
        return [row for row, *_ in cursor.fetchall()] if cursor.description else []


def session_id():
    """Return the identifier of the session that this code uses."""
    [number] = run(transaction.get_connection(), SESSION_ID)
    return number


def is_running(session):
    """Return whether a session runs a statement."""
    return bool(ask(STATEMENTS, session))


@contextmanager
def observer():
    """
    Give a function that runs one of these queries, in any thread, on a session
    of its own, which isn't from a pool.
    """
    other = connection.copy(NO_DB_ALIAS)
    other.inc_thread_sharing()
    try:
        yield partial(run, other)
    finally:
        other.close()


def ask(queries, *params):
    """Run one of these queries on such a session."""
    with observer() as query:
        return query(queries, *params)


def end_busy_sessions():
    """Don't let a failed test's locks stop the flush of the tables."""
    if is_supported():
        for session in ask(BUSY_SESSIONS):
            ask(END_SESSION, session)


class SessionWatch:
    """
    While it's entered, look from another thread which sessions there are that
    weren't there before.
    """

    def __enter__(self):
        self.seen = set()
        # How many there were at the same time.
        self.most = 0
        self._left = threading.Event()
        began = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=[began])
        self._thread.start()
        began.wait(10)
        return self

    def __exit__(self, exc_type, exc_value, traceback):
        self._left.set()
        self._thread.join(10)

    def _watch(self, began):
        with observer() as query:
            before = set(query(SESSIONS))
            began.set()
            is_last = False
            while not is_last:
                is_last = self._left.wait(0.005)
                found = set(query(SESSIONS)) - before
                self.seen |= found
                self.most = max(self.most, len(found))
