"""
How asynchronous methods of Django run their synchronous counterparts.

sync_to_async() has the call shape of asgiref's function of that name. Outside
of blocks it is that function. Inside it first waits on the event loop until no
block nested in the caller's is open, rather than in the thread that the nested
block may need.
"""

import asyncio
from functools import partial, wraps

from asgiref import sync

from django.db import belonging


def sync_to_async(func):
    run_in_thread = sync.sync_to_async(func)

    @wraps(func)
    def inner(*args, **kwargs):
        if belonging.current() is None:
            return run_in_thread(*args, **kwargs)
        return _run_in_turn(partial(func, *args, **kwargs))

    return inner


async def _run_in_turn(func):
    loop = asyncio.get_running_loop()
    deadline = loop.time() + belonging.TURN_TIMEOUT
    attempt = sync.sync_to_async(belonging.for_task(belonging.in_turn(func)))
    while await belonging.its_turn(deadline):
        belonging.claim()
        done, result = await attempt()
        if done:
            return result
    # It may be for another database. If not, it's refused where it's known.
    return await sync.sync_to_async(belonging.for_task(func))()
