"""
What ends with an ASGI request.

Synchronous code of a request, that of asynchronous ORM methods included, runs
in a thread which asgiref starts for the request. Its connections can't be of
use to anyone afterwards, so they're closed in any case (CONN_MAX_AGE would
leave one behind with each request, as ticket #33497 tells). So are those which
were kept for the request's transactions (see django.db.scopes).

Tasks that go on after their request get another such thread. Its connections
are closed when the last of them has finished.
"""

import _thread
import asyncio
import weakref
from contextlib import asynccontextmanager, suppress

from asgiref.sync import SyncToAsync, ThreadSensitiveContext

from django.db import scopes, threads


@asynccontextmanager
async def request_scope():
    """
    Give a request its thread, and release its connections on every way out.

    Inside of another ThreadSensitiveContext, the thread and its connections
    belong to that. What transactions have left is still closed here.
    """
    outer = scopes.request.get()
    async with ThreadSensitiveContext() as context:
        scope = scopes.Scope()
        scopes.request.set(scope)
        # The contexts of the request's tasks hold it, so it lives for as long
        # as the last one.
        weakref.finalize(scope, _release_later, context).atexit = False
        try:
            yield
        finally:
            scopes.request.set(outer)
            futures = [*scope.close(), *_release(context)]
            cancelled = await threads.outlast(map(asyncio.wrap_future, futures))
            if cancelled is not None:
                raise cancelled


def _release(context):
    """
    Have the connections of a context's thread closed. Return the Futures.
    """
    executor = SyncToAsync.context_to_thread_executor.get(context)
    if executor is None:
        return []
    # It may have been shut down.
    with suppress(RuntimeError):
        return [executor.submit(scopes.close_those_of_the_thread)]
    return []


def _release_later(context):
    """
    Do so in another thread. The garbage collector may call this anywhere, also
    while this thread holds locks that submit() needs.
    """
    if context in SyncToAsync.context_to_thread_executor:
        _thread.start_new_thread(_release, (context,))
