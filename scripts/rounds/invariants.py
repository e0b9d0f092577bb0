"""
What must hold after every round, whatever it did.

A State is taken before and after a round. Both times nothing is in use, and
all connections have been closed. So whatever there's more of was lost.
"""

import asyncio
import functools
import gc
import json
import logging
import os
import re
import reprlib
import statistics
import sys
import threading
import time
import traceback
import types
import warnings
from collections import Counter

from rounds.base import Violation

# Seconds within which sessions, threads and descriptors must be gone: servers
# notice the end of a connection a bit later.
PATIENCE = 10

# How many more objects of a type there may be, and how many more blocks: some
# anyway, and some for each operation.
OBJECTS = 60, 0.1
BLOCKS = 2000, 0.5

# How many of the objects that there are more of are shown, and how many levels
# of what refers to them, with how many on each.
HELD_OBJECTS, HOLDERS_DEPTH, HOLDERS = 2, 10, 8
# What refers to these doesn't explain more.
HOLDERS_ENDS = types.ModuleType, types.FunctionType, type
SHORT = reprlib.Repr(maxother=80)

# Classes whose objects are counted: of connections, also the drivers', of what
# the fork adds, and of tasks. asgiref's threads keep loops, but closed ones.
COUNTED = re.compile(
    r"django\.db\.backends\..*\.(DatabaseWrapper|\w+Pool|\w+Connection)"
    r"|django\.db\.(transaction|async_\w+|belonging|bridge|captures|closing|deserted|"
    r"native|own_connections|scopes|sharing|threads|turns)\..*"
    r"|psycopg.*\.(Connection|PGconn)|sqlite3.Connection|MySQLdb.*\.connection"
    r"|_?asyncio\.(.*\.)?Task|greenlet\..*"
)


class Recorder:
    """
    Record what Python says about things that were forgotten: warnings,
    exceptions that nobody handles, and asyncio's log.
    """

    def __init__(self):
        self.messages = []

    def start(self):
        warnings.simplefilter("always", ResourceWarning)
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = self.showwarning
        sys.unraisablehook = self.unraisablehook
        threading.excepthook = self.excepthook
        handler = logging.Handler(logging.ERROR)
        handler.emit = self.emit
        logging.getLogger("asyncio").addHandler(handler)

    def showwarning(self, message, category, filename, lineno, *args):
        if issubclass(category, (ResourceWarning, RuntimeWarning)):
            self.messages.append(f"{filename}:{lineno}: {category.__name__}: {message}")

    def unraisablehook(self, args):
        self.add_exception(args.err_msg or "Exception ignored", args.exc_value)

    def excepthook(self, args):
        self.add_exception(f"Exception in {args.thread}", args.exc_value)

    def emit(self, record):
        exception = record.exc_info[1] if record.exc_info else None
        self.add_exception(record.getMessage(), exception)

    def add_exception(self, message, exception):
        lines = traceback.format_exception(exception) if exception else []
        self.messages.append("".join([message, "\n", *lines]))

    def check(self, expected):
        """Raise Violation, but for messages that regular expressions find."""
        messages = [
            message
            for message in self.messages
            if not any(re.search(regex, message) for regex in expected)
        ]
        if messages:
            raise Violation(
                f"{len(messages)} warnings and errors were not handled: "
                + messages[0].splitlines()[0],
                "\n".join(messages[:10]),
            )


class State:
    """What the process holds."""

    def __init__(self):
        gc.collect()
        self.threads = Counter(
            # Those of a pool are numbered.
            re.sub(r"\d+", "N", thread.name)
            for thread in threading.enumerate()
        )
        self.descriptors = Counter(map(re_numbered, descriptors()))
        classes = Counter(map(type, gc.get_objects()))
        self.objects, self._counted = Counter(), set()
        for cls, number in classes.items():
            name = type_name(cls)
            if COUNTED.fullmatch(name):
                self.objects[name] += number
                self._counted.add(cls)
        self._addresses = {id(obj) for obj in self._counted_objects()}

    def _counted_objects(self):
        return [obj for obj in gc.get_objects() if type(obj) in self._counted]

    def more_than(self, before):
        """Return what there's more of, as text."""
        return [
            f"{number} more {kind}: {name} ({getattr(before, kind)[name]} before)"
            for kind in ("threads", "descriptors", "objects")
            for name, number in (getattr(self, kind) - getattr(before, kind)).items()
        ]

    def holders(self, before):
        """Return what refers to objects that there are more of, as text."""
        lines = []
        objects = self._counted_objects()
        for name in self.objects - before.objects:
            same = [obj for obj in objects if type_name(type(obj)) == name]
            # An address may have been used again.
            new = [obj for obj in same if id(obj) not in before._addresses] or list(
                same
            )
            del new[HELD_OBJECTS:]
            own = {id(objects), id(same), id(new)}
            while new:
                lines += holders(new.pop(), own)
        return lines


def type_name(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def holders(obj, seen):
    """Return lines that say what refers to an object, and what to that."""
    lines, objects, depths = [], [obj], [0]
    seen |= {id(objects), id(obj)}
    while objects:
        obj, depth = objects.pop(), depths.pop()
        lines.append(f"{'  ' * depth}{type_name(type(obj))} {SHORT.repr(obj)}")
        if depth == HOLDERS_DEPTH or isinstance(obj, HOLDERS_ENDS):
            continue
        referrers = gc.get_referrers(obj)
        for number in range(min(len(referrers), HOLDERS)):
            obj = referrers[number]
            is_own = isinstance(obj, types.FrameType) and obj.f_globals is globals()
            if id(obj) not in seen and not is_own:
                seen.add(id(obj))
                objects.append(obj)
                depths.append(depth + 1)
        # It would be found with the next ones.
        referrers.clear()
    return lines


def re_numbered(name):
    """Leave out what distinguishes two descriptors of a kind."""
    return re.sub(r"\[\d+\]|/\d+", "[N]", name)


def descriptors():
    """Return what the process has open."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            # It's the one of listdir().
            pass
    return names


def memory():
    """Return how much of the process is in memory, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def close_connections():
    """Close what may be kept open: the connections of threads, and pools."""
    from asgiref.sync import SyncToAsync, sync_to_async

    from django.db import connections

    def close():
        for connection in connections.all(initialized_only=True):
            connection.close()
            # Django keeps the last one, and all that its traceback refers to.
            connection.rollback_exc = None

    close()
    if SyncToAsync.single_thread_executor._threads:
        asyncio.run(sync_to_async(close)())
    check_pools()
    for connection in connections.all(initialized_only=True):
        if hasattr(connection, "close_pool"):
            connection.close_pool()


def check(this, recorder, before, memory_before):
    """Raise Violation if something was lost, or is still held."""
    check_sessions(this)
    eventually(
        lambda: State().more_than(before),
        "The round has left more than there was",
        lambda: State().holders(before),
    )
    this.count_memory(memory_before, memory())
    recorder.check(this.expected_messages)


def remaining(find, patience=PATIENCE):
    """Return what's still to be found after some time."""
    deadline = time.monotonic() + patience
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def eventually(find, message, explain=list):
    """Raise Violation if there's still something to be found at the end."""
    if found := remaining(find):
        lines = [*found, *explain()]
        raise Violation(f"{message}: {found[0]}", "\n".join(map(str, lines)))


def check_pools():
    """Look for connections that weren't returned."""
    from django.db import connections

    for connection in connections.all(initialized_only=True):
        if not connection.settings_dict["OPTIONS"].get("pool"):
            continue

        def missing(pool=connection.pool):
            stats = pool.get_stats()
            lent = stats["pool_size"] - stats["pool_available"]
            waiting = stats.get("requests_waiting", 0)
            return [f"{lent} lent, {waiting} waiting"] if lent or waiting else []

        eventually(missing, f"The pool of {connection.alias!r} isn't full")


# The transactions and locks of other sessions, and those themselves.
IN_TRANSACTION = {
    "postgresql": """
        SELECT pid, state, query FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND backend_type = 'client backend' AND state <> 'idle'""",
    "mysql": """
        SELECT trx_mysql_thread_id, trx_state, trx_query
        FROM information_schema.innodb_trx
        WHERE trx_mysql_thread_id <> connection_id()""",
}

LOCKS = {
    "postgresql": """
        SELECT pid, locktype, mode, granted FROM pg_locks
        WHERE pid <> pg_backend_pid() AND database = (
            SELECT oid FROM pg_database WHERE datname = current_database()
        ) AND pid IN (
            SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'
        )""",
}

SESSIONS = {
    "postgresql": """
        SELECT pid, state, query FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND backend_type = 'client backend'""",
    "mysql": """
        SELECT id, command, state FROM information_schema.processlist
        WHERE db = database() AND id <> connection_id()""",
}


def check_sessions(this):
    """
    Look for transactions and locks that nobody ends any more, and for sessions
    that can't be closed.
    """
    with this.observer() as observer:
        if observer.vendor == "sqlite3":
            # It can't list them, but has one writer at a time.
            observer.rows("BEGIN IMMEDIATE")
            observer.rows("ROLLBACK")
        for queries, message in (
            (IN_TRANSACTION, "A session is in a transaction"),
            (LOCKS, "A session has a lock"),
        ):
            if query := queries.get(observer.vendor):
                eventually(functools.partial(observer.rows, query), message)
        close_connections()
        if query := SESSIONS.get(observer.vendor):
            eventually(
                functools.partial(observer.rows, query), "A session wasn't closed"
            )


class Count:
    """What the process has in memory."""

    def __init__(self):
        gc.collect()
        self.blocks = sys.getallocatedblocks()
        self.memory = memory()
        objects = Counter(type_name(cls) for cls in map(type, gc.get_objects()))
        # As one object, since what's kept here is counted, too.
        self._objects = json.dumps(objects)

    @property
    def objects(self):
        return Counter(json.loads(self._objects))

    def __str__(self):
        return f"{self.blocks} blocks, {self.memory:.1f} MiB"


def check_growth(counts, operations):
    """
    Return how many more blocks there usually are in the second half of the
    counts than in the first half. Raise Violation if that are too many of
    them, or of objects, for the number of operations in a half.
    """
    middle = len(counts) // 2
    earlier, later = counts[:middle], counts[-middle:]
    blocks = usual_blocks(later) - usual_blocks(earlier)
    objects = usual_objects(later) - usual_objects(earlier)
    most = max(objects.values(), default=0)
    if exceeds(BLOCKS, operations, blocks) or exceeds(OBJECTS, operations, most):
        lines = [f"{number} more: {name}" for name, number in objects.most_common(15)]
        raise Violation(
            f"After {operations} more operations, there are {blocks} more blocks, and "
            f"of objects {lines[0]}",
            "\n".join([*lines, *map(str, counts)]),
        )
    return blocks


def exceeds(limit, operations, number):
    anyway, each = limit
    return number > anyway + each * operations


def usual_blocks(counts):
    return statistics.median_low(count.blocks for count in counts)


def usual_objects(counts):
    objects = [count.objects for count in counts]
    return Counter(
        {
            name: statistics.median_low(each[name] for each in objects)
            for name in set().union(*objects)
        }
    )
