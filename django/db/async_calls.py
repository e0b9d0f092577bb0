"""
How asynchronous methods of Django run their synchronous counterparts.

sync_to_async() has the call shape of asgiref's function of that name. Outside
of blocks it is that function. Inside it first waits on the event loop until no
block nested in the caller's is open, rather than in the thread that the nested
block may need.

In native mode it calls the function in the bridge (see django.db.native). If
only some of the databases are native, that depends on which one the function
is for. Where that can't be told beforehand, it's called in a thread, where a
native database can be used as well. In the bridge, any other is refused.
"""

import asyncio
from contextlib import suppress
from functools import partial
from inspect import CO_COROUTINE, iscoroutinefunction
from types import FunctionType, MethodType

from asgiref import sync

from django.db import belonging, connections, router, sharing, threads
from django.db.abandoned import Call


def is_asynchronous(func):
    """
    Return whether `func` is a coroutine function, or an object that's called
    like one.
    """
    # inspect takes its time to say the same of these.
    while (kind := type(func)) is MethodType or kind is partial:
        func = func.__func__ if kind is MethodType else func.func
    if kind is FunctionType and not func.__dict__:
        # Neither marked nor wrapped.
        return bool(func.__code__.co_flags & CO_COROUTINE)
    if kind is type:
        return False
    return iscoroutinefunction(func) or iscoroutinefunction(kind.__call__)


# Methods by which query sets and caches read. By the others, they write.
READING_METHODS = {
    "_fetch_all",
    "aggregate",
    "contains",
    "count",
    "earliest",
    "exists",
    "explain",
    "first",
    "get",
    "get_many",
    "has_key",
    "in_bulk",
    "last",
    "latest",
}


def sync_to_async(func, using=None):
    """
    Return a coroutine function that calls `func`, which uses the database
    `using`. If it's a method of the ORM, that doesn't have to be given.
    """
    return partial(_call, func, using)


def _call(func, using, /, *args, **kwargs):
    call = partial(func, *args, **kwargs)
    if not connections.native_aliases:
        return _call_in_thread(call)
    if len(connections.native_aliases) == len(connections.settings):
        return run_natively(call)
    return _run_as_due(call, using)


def _call_in_thread(call):
    belonging.claim()
    if belonging.current() is None:
        return sync.sync_to_async(call.func)(*call.args, **call.keywords)
    return _run_in_turn(call)


def run_natively(func):
    native = connections.native
    native.check(min(connections.native_aliases))
    return native.run(func)


async def run_sync(func, /, *args, **kwargs):
    """
    Call a synchronous function that uses the database, as asynchronous methods
    of the ORM do: in a thread, or if there's a native database, on the event
    loop. Then it can't use the databases that aren't native. Call a function
    that does with asgiref's sync_to_async().
    """
    if is_asynchronous(func):
        raise TypeError("run_sync() can't call a coroutine function. Await it instead.")
    if connections.native_aliases:
        return await run_natively(partial(func, *args, **kwargs))
    return await sync_to_async(func)(*args, **kwargs)


async def _run_as_due(call, using):
    """Call a function where the database that it's for has to be used."""

    def call_if_native():
        alias = using
        if alias is None:
            # Here, because routers may query. What they can't do here, they
            # are asked for again in the thread.
            with suppress(Exception):
                alias = alias_of(call.func, call.args, call.keywords)
        if alias in connections.native_aliases:
            return True, call()
        return False, None

    called, result = await run_natively(call_if_native)
    return result if called else await _call_in_thread(call)


def alias_of(func, args, kwargs):
    """
    Return the database that a function of the ORM is going to choose, or None
    if that isn't known:

    ========================== ======================== =====================
    function                   object that decides      alias
    ========================== ======================== =====================
    list()                     its argument             as its _fetch_all()
    prefetch_related_objects() the first instance       to read
    method of a query set      the query set            its own, or to read
                                                        or write its model
    method of a raw query set  the query set            its own, or to read
    refresh_from_db()          `using`, or the instance its own, or to read
    save(), delete()           `using`, or the instance to write
    method of a related        the instance around it   to write the model,
    manager                                             or that in between
    method of the database     its model                to read or write
    cache
    any other                                           None
    ========================== ======================== =====================
    """
    # They import this module.
    from django.db.models import Model, QuerySet, prefetch_related_objects
    from django.db.models.query import RawQuerySet

    name = getattr(func, "__name__", None)
    owner = getattr(func, "__self__", None)
    if func is list:
        owner, name = args[0], "_fetch_all"
    elif func is prefetch_related_objects:
        instance = next(iter(args[0]))
        return router.db_for_read(type(instance), instance=instance)
    if isinstance(owner, QuerySet):
        if name in READING_METHODS:
            return owner.db
        return owner._db or router.db_for_write(owner.model, **owner._hints)
    if isinstance(owner, RawQuerySet):
        return owner.db
    if isinstance(owner, Model):
        if (using := kwargs.get("using")) is not None:
            return using
        if name == "refresh_from_db":
            queryset = kwargs.get("from_queryset")
            if queryset is None:
                queryset = type(owner)._base_manager.db_manager(
                    hints={"instance": owner}
                )
            return queryset.db
        return router.db_for_write(type(owner), instance=owner)
    if (instance := getattr(owner, "instance", None)) is not None:
        model = getattr(owner, "through", owner.model)
        return router.db_for_write(model, instance=instance)
    if (model := getattr(owner, "cache_model_class", None)) is not None:
        choose = router.db_for_read if name in READING_METHODS else router.db_for_write
        return choose(model)
    return None


async def _run_in_turn(func):
    while await sharing.its_turn():
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
