"""
How asynchronous methods of Django run their synchronous counterparts.

sync_to_async() has the call shape of asgiref's function of that name. Outside
of blocks it is that function. Inside it first waits on the event loop until no
block nested in the caller's is open, rather than in the thread that the nested
block may need.
"""

import asyncio
from functools import partial, wraps
from inspect import iscoroutinefunction

from asgiref import sync

from django.db import belonging, sharing, threads
from django.db.abandoned import Call


def is_asynchronous(func):
    """
    Return whether `func` is a coroutine function, or an object that's called
    like one.
    """
    return iscoroutinefunction(func) or iscoroutinefunction(type(func).__call__)


def sync_to_async(func):
    run_in_thread = sync.sync_to_async(func)

    @wraps(func)
    def inner(*args, **kwargs):
        belonging.claim()
        if belonging.current() is None:
            return run_in_thread(*args, **kwargs)
        return _run_in_turn(partial(func, *args, **kwargs))

    return inner


async def _run_in_turn(func):
    deadline = asyncio.get_running_loop().time() + sharing.TURN_TIMEOUT
    while await sharing.its_turn(deadline):
        done, result = await _run(sharing.in_turn(func))
        if done:
            return result
    # It may be for another database. If not, it's refused where it's known.
    return await _run(func)


async def _run(func):
    call = Call()

    def run():
        with call.running():
            return func()

    belonging.claim()
    # Inside a block, the connection is bound to no thread.
    run_in_thread = sync.sync_to_async(
        belonging.for_task(run), thread_sensitive=threads.is_available()
    )
    try:
        return await run_in_thread()
    except asyncio.CancelledError:
        call.abandon()
        raise
