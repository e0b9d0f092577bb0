import asyncio
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest import mock

import psycopg
from asgiref.sync import SyncToAsync

try:
    from psycopg_pool import ConnectionPool
except ImportError:
    ConnectionPool = None

# How a thread asks another one to do something, and how it's blocked by
# waiting: for the database or, with a Condition, which an Event has as well,
# for another thread.
WAYS_OUT = [
    (SyncToAsync, "__call__"),
    (asyncio.BaseEventLoop, "run_in_executor"),
    (ThreadPoolExecutor, "submit"),
    (threading.Thread, "start"),
    (threading.Condition, "wait"),
    (psycopg.waiting, "wait"),
    (psycopg.waiting, "wait_conn"),
]
if ConnectionPool is not None:
    WAYS_OUT.append((ConnectionPool, "run_task"))


@contextmanager
def no_threads():
    """
    Fail at the end if an event loop's thread was blocked, or another thread
    used, by what was done on the current thread.
    """
    here = threading.get_ident()
    first = None

    def guard(owner, name):
        func = getattr(owner, name)

        @wraps(func)
        def inner(*args, **kwargs):
            nonlocal first
            if first is None and threading.get_ident() == here:
                stack = "".join(traceback.format_stack())
                first = f"{owner.__name__}.{name}() was called:\n{stack}"
            return func(*args, **kwargs)

        return mock.patch.object(owner, name, inner)

    with ExitStack() as patches:
        for owner, name in WAYS_OUT:
            patches.enter_context(guard(owner, name))
        yield
    if first is not None:
        raise AssertionError(first)
