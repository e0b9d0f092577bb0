"""
What requests use, to be asked for by the round.
"""

import asyncio
import sqlite3
from collections import Counter, defaultdict
from contextvars import ContextVar

from django.db.backends.signals import connection_created

# Of the current request.
current = ContextVar("rounds.project.usage", default=None)

# The requests, and the consumers, that haven't ended.
active = set()

# The most connections to one database that a request of each path has had.
most_opened = Counter()


class Failure(Exception):
    """A view fails, on purpose."""


class Unexpected:
    """A filter for what's logged."""

    def filter(self, record):
        if record.exc_info and isinstance(record.exc_info[1], Failure):
            return False
        # asgiref doesn't ask for the result of a thread whose caller was
        # cancelled.
        if record.name == "asyncio" and "Future exception" in record.getMessage():
            return not isinstance(record.exc_info[1], asyncio.CancelledError)
        # What clients are told they did wrong isn't an error of the server.
        return record.name != "django.request" or record.levelname != "WARNING"


class Usage:
    """
    What a request uses. While it's entered, that's the current one.
    """

    def __init__(self, path):
        self.path = path
        # The driver's connections to each database.
        self.opened = defaultdict(list)
        self.most = 0
        # Unless it opens several blocks at the same time.
        self.is_limited = True
        self.ended = asyncio.Event()

    def __enter__(self):
        current.set(self)
        active.add(self)
        return self

    def __exit__(self, *exc_info):
        active.discard(self)
        self.ended.set()
        if self.is_limited:
            most_opened[self.path] = max(most_opened[self.path], self.most)

    def add(self, alias, connection):
        """Note a connection, and how many are open at the same time."""
        still_open = [other for other in self.opened[alias] if is_open(other)]
        self.opened[alias] = [*still_open, connection]
        self.most = max(self.most, len(self.opened[alias]))


def is_open(connection):
    """Return whether a driver's connection is open."""
    if hasattr(connection, "closed"):
        # That's psycopg, and this is MySQLdb.
        return not connection.closed
    if hasattr(connection, "open"):
        return bool(connection.open)
    try:
        connection.total_changes
    except sqlite3.ProgrammingError:
        return False
    return True


def count_opened(connection, **kwargs):
    if (usage := current.get()) is not None:
        usage.add(connection.alias, connection.connection)


def connect():
    connection_created.connect(count_opened)
