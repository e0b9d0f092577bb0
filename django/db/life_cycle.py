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

import asyncio
import weakref
from contextlib import asynccontextmanager, suppress

from asgiref.sync import SyncToAsync, ThreadSensitiveContext

from django.db import connections, scopes, threads


@asynccontextmanager
async def request_scope():
    """
    Give a request its thread, and release its connections on every way out.

    Inside of another ThreadSensitiveContext, the thread and its connections
    belong to that.
    """
    outer = scopes.request.get()
    async with ThreadSensitiveContext() as context:
        scope = scopes.Scope()
        scopes.request.set(scope)
        # The contexts of the request's tasks hold it, so it lives for as long
        # as the last one.
        weakref.finalize(scope, _release, context).atexit = False
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
        return [executor.submit(_close_connections)]
    return []


def _close_connections():
    scopes.close_quietly(connections.all(initialized_only=True))
