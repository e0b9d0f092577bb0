"""
Closing connections from asynchronous code that runs for long.

An event loop of a worker or a consumer has no request at whose end connections
are closed. These are the counterparts of close_old_connections() and of
connections.close_all(). Both reach the connections of the current scope (see
django.db.scopes) that nobody uses, and those of the thread that synchronous
code runs in. What a block uses is left alone.
"""

import asyncio

from asgiref.sync import sync_to_async

from django.db import close_old_connections, connections, scopes


async def aclose_old_connections(**kwargs):
    """
    Close the connections that can't be used any more, because of an error or
    since they're older than CONN_MAX_AGE.
    """
    scope = scopes.current()
    for lease in scope.take_all():
        check = lease.connection.close_if_unusable_or_obsolete
        await asyncio.wrap_future(lease.call(check))
        if not scope.keep(lease):
            lease.close()
    await _call_natively("close_if_unusable_or_obsolete")
    await sync_to_async(close_old_connections)()


async def aclose_all():
    """Close the connections that aren't in use."""
    for lease in scopes.current().take_all():
        await asyncio.wrap_future(lease.close())
    await _call_natively("close")
    await sync_to_async(connections.close_all)()


async def _call_natively(name):
    if connections.native_aliases:
        native = connections.native
        await native.run(lambda: native.call_idle(name))
