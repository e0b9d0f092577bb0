"""
Run the body of each test in the bridge, and count its waits for PostgreSQL.

The settings that run_upstream.py writes for postgres-native call install().
From then on a test's method is called as run_sync() calls a function, on an
event loop of its own; setUp() and all else around it is called as ever. The
context variables that it sets stay set, as they do without.

Some bodies can't be run there, and are called as ever: see OUTSIDE.

A wait that blocks the thread of a running event loop makes the test fail, and
its stack is shown. Each process counts in a file of its own, one line for each
body, since those that run tests in parallel are killed in the end.
"""

import asyncio
import contextvars
import dataclasses
import functools
import os
import pathlib
import traceback
import unittest

# Names of tests, or how they begin, and why that is.
OUTSIDE = {
    "admin_scripts.tests.ManageRunserver.test_no_database": (
        "It makes a connection to a database that isn't native."
    ),
    "async.tests.ViewTests.test_http_method_not_allowed": "It calls asyncio.run().",
    "async.tests.ViewTests.test_options_handler": "It calls asyncio.run().",
    "deprecation.test_middleware_mixin.MiddlewareMixinTests.test_sync_to_async_uses": (
        "It expects sync_to_async() to use the thread that runs the event loop."
    ),
    "test_runner.tests.SetupDatabasesTests.": (
        "They make connections to databases that aren't native."
    ),
    "test_utils.test_transactiontestcase.TestSerializedRollbackInhibitsPostMigrate.": (
        "It calls _fixture_teardown() itself, which isn't for tests to do, and needs "
        "the connection that the test database was created with."
    ),
}


class BlockedLoopError(AssertionError):
    """A test's body waited for PostgreSQL without the event loop."""


@dataclasses.dataclass
class Waits:
    """How many bodies were run, and how often they waited, in which way."""

    bodies: int = 0
    awaited: int = 0
    blocking: int = 0

    def __str__(self):
        return (
            f"{self.bodies} bodies in the bridge, {self.awaited} waits awaited, "
            f"{self.blocking} that blocked the event loop"
        )

    def are_good(self):
        return self.awaited > 0 and self.blocking == 0

    def write(self, directory):
        with pathlib.Path(directory, str(os.getpid())).open("a") as file:
            file.write(f"{self.bodies} {self.awaited} {self.blocking}\n")

    @classmethod
    def read(cls, directory):
        """Return the sum of what all processes wrote."""
        rows = [
            map(int, line.split())
            for path in pathlib.Path(directory).iterdir()
            for line in path.read_text().splitlines()
        ]
        return cls(*map(sum, zip(*rows)))


# Those of the body that's being run.
waits = Waits()


def install(directory):
    """Do so in this process and those it forks. They write to `directory`."""
    original = unittest.TestCase._callTestMethod

    @functools.wraps(original)
    def _callTestMethod(self, method):
        # The body of another test may be what runs it.
        is_inside = asyncio._get_running_loop() is not None
        if is_inside or self.id().startswith(tuple(OUTSIDE)):
            original(self, method)
            return
        count_waits()
        waits.bodies, waits.awaited, waits.blocking = 1, 0, 0
        try:
            run_on_loop(functools.partial(original, self, method))
        finally:
            waits.write(directory)
        if waits.blocking:
            raise BlockedLoopError(f"It did so {waits.blocking} times, see above.")

    unittest.TestCase._callTestMethod = _callTestMethod


def run_on_loop(func):
    """Call a function in the bridge on an event loop of its own."""
    # They can't be imported before the settings are complete.
    from django.db import native, scopes

    context = contextvars.copy_context()
    try:
        with asyncio.Runner() as runner:
            runner.run(native.run(func), context=context)
    finally:
        for variable, value in context.items():
            if variable.get(None) is not value:
                variable.set(value)
        # Test cases that it ran have put back the methods they had replaced,
        # but as attributes of the connection.
        for connection in scopes.idle_connections():
            features = connection.features
            for name, _ in features.disallowed_simple_test_case_connection_methods:
                vars(connection).pop(name, None)


@functools.cache
def count_waits():
    """Count whenever psycopg waits, in each way that it has."""
    import psycopg

    from django.db.backends.postgresql import waiting

    psycopg.waiting.wait = blocking(psycopg.waiting.wait)
    psycopg.waiting.wait_conn = blocking(psycopg.waiting.wait_conn)
    psycopg.waiting.wait_conn_async = awaited(psycopg.waiting.wait_conn_async)
    waiting._wait_for_socket = awaited(waiting._wait_for_socket)


def awaited(wait):
    @functools.wraps(wait)
    async def inner(*args, **kwargs):
        waits.awaited += 1
        return await wait(*args, **kwargs)

    return inner


def blocking(wait):
    @functools.wraps(wait)
    def inner(*args, **kwargs):
        if asyncio._get_running_loop() is not None:
            waits.blocking += 1
            traceback.print_stack()
        return wait(*args, **kwargs)

    return inner
