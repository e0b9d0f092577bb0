"""
What all kinds of rounds have in common.

A round is run by worker.py in a process of its own, in this order: settings()
and set_up(), warm_up(), run(), check() and what invariants.py checks. What
it does is decided by `self.random` alone, so that its seed replays it.

A kind's module has the kind's name. It's imported before there are settings,
so that its methods import models.
"""

import asyncio
import contextlib
import os
import random
import sys
import threading
import time
import traceback

# Seconds that an event loop may be held up in native mode by anything but the
# processor. A lock that is waited for takes much longer.
STALL_LIMIT = 0.5

# What a round may leave to Python's allocator, in MiB. The rounds of memory.py
# look closer.
MEMORY_LIMIT = 64

# Seconds between two looks at an event loop.
STALL_INTERVAL = 0.05


class Violation(Exception):
    """
    Something that was promised didn't happen.

    `reproduction` is all that's needed to understand how: the program that was
    run, or the steps that led there.
    """

    def __init__(self, message, reproduction=""):
        super().__init__(message)
        self.message = message
        self.reproduction = reproduction


class Round:
    """A kind of round."""

    # That of the module, and in the command line.
    name = None
    # Where it can be run.
    databases = {"postgres", "sqlite", "mariadb"}
    modes = {"thread", "native"}
    # Regular expressions that find what asyncio may log, or threads may
    # raise, because the round provokes it.
    expected_messages = ()

    def __init__(self, seed, seconds, database, mode):
        self.random = random.Random(seed)
        self.seed = seed
        self.seconds = seconds
        self.database = database
        self.mode = mode
        # The longest stall of an event loop, in seconds.
        self.stall = 0
        # How much a process has grown, in MiB.
        self.grown = 0

    def settings(self, database):
        """
        Return Django's settings. `database` is the entry of DATABASES that
        gauntlet.py offers.
        """
        return {
            "DATABASES": {"default": database},
            "INSTALLED_APPS": ["rounds"],
            "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
            "SECRET_KEY": "gauntlet",
            "USE_TZ": True,
        }

    def set_up(self):
        """Create the tables. The database is empty."""
        from rounds.models import Account, Entry, Transfer

        from django.db import connection

        with connection.schema_editor() as editor:
            for model in (Account, Entry, Transfer):
                editor.create_model(model)

    def warm_up(self):
        """
        Have created what's created once: the check after the round compares
        with the state after this.
        """
        from asgiref.sync import async_to_sync, sync_to_async
        from rounds.models import Entry

        from django.db import connections, transaction

        async def block():
            for alias in connections:
                entries = Entry.objects.using(alias)
                async with transaction.aatomic(using=alias):
                    await entries.acount()
                await sync_to_async(entries.count)()

        asyncio.run(block())
        async_to_sync(block)()

    def run(self):
        """Return counts for the summary, or raise Violation."""
        raise NotImplementedError

    def check(self):
        """Raise Violation if the round's own invariants don't hold."""

    def deadline(self):
        """Return the time.monotonic() at which a run that begins now ends."""
        return time.monotonic() + self.seconds

    def observer(self):
        """
        Return an Observer, a connection to the database that Django doesn't
        know.
        """
        from django.conf import settings

        return Observer(settings.DATABASES["default"])

    def count_memory(self, before, after):
        """Raise Violation if a process has grown by too many MiB."""
        grown = after - before
        self.grown = max(self.grown, grown)
        if grown > MEMORY_LIMIT:
            raise Violation(f"A process has grown by {grown:.0f} MiB.")

    def run_async(self, main, loop_factory=None):
        """
        Run a coroutine in a new event loop, and return its result. Raise
        Violation if it leaves tasks behind, or if the loop is stalled.
        """
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            loop = runner.get_loop()
            with watch_for_stalls(loop, self.mode == "native") as stalls:
                result = runner.run(main)
            self.stall = max(self.stall, stalls.longest)
            tasks = [task for task in asyncio.all_tasks(loop) if not task.done()]
            if tasks:
                raise Violation(
                    f"{len(tasks)} tasks were left behind.",
                    "\n".join(map(repr, tasks)),
                )
        if stalls.stack is not None:
            raise Violation(
                f"The event loop was stalled for {stalls.longest:.2f} s.", stalls.stack
            )
        return result


class Observer:
    """A connection of the database's driver, in autocommit mode."""

    def __init__(self, database):
        self.vendor = database["ENGINE"].rpartition(".")[2]
        connect = getattr(self, f"connect_{self.vendor}")
        self.connection = connect(database)

    def connect_postgresql(self, database):
        import psycopg

        return psycopg.connect(
            dbname=database["NAME"],
            user=database["USER"] or None,
            password=database["PASSWORD"] or None,
            host=database["HOST"] or None,
            port=database["PORT"] or None,
            autocommit=True,
        )

    def connect_mysql(self, database):
        import MySQLdb

        names = {"NAME": "database", "USER": "user", "PASSWORD": "password"}
        names["HOST"] = "unix_socket" if database["HOST"].startswith("/") else "host"
        names["PORT"] = "port"
        arguments = {names[key]: database[key] for key in names if database[key]}
        return MySQLdb.connect(**arguments, autocommit=True)

    def connect_sqlite3(self, database):
        import sqlite3

        return sqlite3.connect(database["NAME"], isolation_level=None, timeout=30)

    def rows(self, sql, *params):
        """Return the rows of a query, whose placeholders are %s."""
        if self.vendor == "sqlite3":
            sql = sql.replace("%s", "?")
        with contextlib.closing(self.connection.cursor()) as cursor:
            cursor.execute(sql, params)
            return list(cursor.fetchall()) if cursor.description else []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.connection.close()
        # Or else it would be counted with Django's.
        self.connection = None


class Stalls:
    def __init__(self):
        # In seconds.
        self.longest = 0
        # Where the loop's thread was when it was stalled for too long.
        self.stack = None


@contextlib.contextmanager
def watch_for_stalls(loop, limited):
    """
    Have a thread look at an event loop that runs in this one. Stacks are only
    recorded if stalls are `limited`.

    The time in which the loop's thread was running, or waiting for a
    processor, isn't counted where the system tells it (Linux does): a busy
    machine doesn't block the loop.
    """
    stalls, ended = Stalls(), threading.Event()
    ident, native_id = threading.get_ident(), threading.get_native_id()

    def watch():
        while not ended.wait(STALL_INTERVAL):
            answered = threading.Event()
            start, busy = time.monotonic(), busy_time(native_id)
            try:
                loop.call_soon_threadsafe(answered.set)
            except RuntimeError:
                # The loop is closed.
                return
            while not answered.wait(STALL_INTERVAL) and not ended.is_set():
                stall = time.monotonic() - start - (busy_time(native_id) - busy)
                if stall > stalls.longest:
                    stalls.longest = stall
                if limited and stall > STALL_LIMIT and stalls.stack is None:
                    frame = sys._current_frames()[ident]
                    stalls.stack = "".join(traceback.format_stack(frame))

    thread = threading.Thread(target=watch, name="watch_for_stalls")
    thread.start()
    try:
        yield stalls
    finally:
        ended.set()
        thread.join()


def busy_time(native_id):
    """Return the seconds that a thread has run, or has been ready to."""
    try:
        with open(f"/proc/{os.getpid()}/task/{native_id}/schedstat") as file:
            running, ready, _ = map(int, file.read().split())
    except OSError:
        return 0
    return (running + ready) / 1e9
