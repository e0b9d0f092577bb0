"""
What a SimpleTestCase refuses, for the connections of asynchronous code.

It replaces methods of the thread's connection to each database that it isn't
allowed to use. But blocks, and tasks in native mode, have connections of their
own, which may have been opened before.
"""

from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest import mock

from django.db import connections
from django.utils.asyncio import async_unsafe


@contextmanager
def refused(allowed):
    """
    Let connections that are bound to no thread refuse what the thread's do.
    """
    with ExitStack() as stack:
        for alias in connections:
            if alias not in allowed:
                connection = connections[alias]
                features = connection.features
                for name, _ in features.disallowed_simple_test_case_connection_methods:
                    stack.enter_context(_refused(connection, name))
        yield


def _refused(connection, name):
    failure = getattr(connection, name)
    method = getattr(type(connection), name)

    # Asynchronous code outside of the bridge is told what it's told anywhere.
    @async_unsafe
    @wraps(method)
    def inner(self, *args, **kwargs):
        if (
            self._thread_ident is None
            and self.alias == connection.alias
            # Not any more, if somebody has taken the method from the class.
            and getattr(connection, name) is failure
        ):
            failure()
        return method(self, *args, **kwargs)

    return mock.patch.object(type(connection), name, inner)
