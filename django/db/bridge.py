"""
Run synchronous code on an event loop's own thread, and let it wait there.

run() calls a synchronous function in a greenlet: in the bridge. Such code runs
as a part of the task that awaits run(), with its contextvars, and on the
thread of its event loop, which it blocks for as long as it computes. When it
has to wait, it calls await_(): the greenlet is left, the task awaits the
object in its place, as if it had been written there, and the greenlet is
continued with the result or the exception. So the same code works in threads,
where it blocks, and in the bridge, where it doesn't.

What holds:

* Every greenlet is finished before run() is. A cancellation is raised by
  await_(), and the code may wait again on its way out. If the coroutine is
  closed instead, because its loop is gone or nobody refers to it any more,
  await_() raises GeneratorExit, and from then on BridgeClosed: whoever could
  wait isn't there any more.
* An awaitable that can't be awaited is closed before an exception is raised.
* async_to_sync() in the bridge awaits the coroutine in the same task. In the
  coroutine, which is asynchronous code, current() is None.
* Code in shielded() isn't interrupted by a cancellation. It's raised after.

In asyncio's debug mode, code that blocks the event loop for long is warned of
(see django.db.bridge_debug).

Nothing in here knows of databases. greenlet is imported by the first run().
"""

import asyncio
import sys
import weakref
from contextlib import suppress
from functools import partial, wraps
from threading import Lock, get_ident

from asgiref.sync import AsyncToSync

from django.core.exceptions import ImproperlyConfigured

# The module, once run() was called.
greenlet = None

_importing = Lock()

# Context variables of which async_to_sync() doesn't bring back the values to
# its caller, once run() was called.
confined_variables = []


class BridgeClosed(RuntimeError):
    """The code can't wait any more, as the coroutine around it was closed."""


class Bridge:
    """
    One call of run().

    Frames of the code in the bridge refer to it. So it doesn't refer to the
    greenlet nor, strongly, to the task: those cycles are never collected.
    """

    # The greenlet that runs the task, and what it's asked to await.
    parent = None
    awaitable = None
    # How many shielded() blocks are open, and what came meanwhile.
    shields = 0
    cancelled = None
    closed = False
    # For the use of the callers: a function that's called before the code goes
    # over to a coroutine, and what the code has leased.
    before_coroutine = None
    leases = None

    def __init__(self):
        task = _running_task()
        # A function that returns it, or None if it's no task's.
        self.task = _no_task if task is None else weakref.ref(task)
        self.thread_ident = get_ident()

    def take_awaitable(self):
        awaitable, self.awaitable = self.awaitable, None
        return awaitable


def _running_task():
    loop = asyncio._get_running_loop()
    return None if loop is None else asyncio.current_task(loop)


def _no_task():
    return None


def current():
    """Return the Bridge that the calling code runs in, or None."""
    if greenlet is None:
        return None
    bridge = getattr(greenlet.getcurrent(), "django_bridge", None)
    if bridge is None:
        return None
    # An eager task begins in the greenlet that creates it. As every statement
    # asks this several times, _running_task() isn't called for it.
    loop = asyncio._get_running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    return bridge if task is bridge.task() else None


async def run(func, /, *args, **kwargs):
    """Call a synchronous function in the bridge and return its result."""
    if greenlet is None:
        _import_greenlet()
    child = greenlet.greenlet(partial(func, *args, **kwargs))
    child.django_bridge = bridge = Bridge()
    bridge.parent = child.parent
    # Only now: later, the code may be in another one, that of a Context.run().
    child.gr_context = bridge.parent.gr_context
    switch, throw = child.switch, child.throw
    loop = asyncio._get_running_loop()
    if loop is not None and loop.get_debug():
        from django.db.bridge_debug import watched

        switch = watched(switch, child, loop)
        throw = watched(throw, child, loop)
    result = switch()
    while not child.dead:
        try:
            result = await bridge.take_awaitable()
        except BaseException as exc:
            if isinstance(exc, GeneratorExit):
                bridge.closed = True
                if bridge.thread_ident != get_ident():
                    # By the garbage collector. greenlet unwinds it later, in
                    # its own thread.
                    raise
            _follow(child, bridge)
            result = throw(type(exc), exc, exc.__traceback__)
        else:
            _follow(child, bridge)
            result = switch(result)
    if isinstance(result, greenlet.GreenletExit):
        # It's returned by greenlets that raise it.
        raise result
    return result


def _follow(child, bridge):
    parent = greenlet.getcurrent()
    if parent is not bridge.parent:
        # It was started elsewhere: in the greenlet that created an eager task.
        child.parent = bridge.parent = parent


def await_(awaitable):
    """
    Wait for an awaitable, in the bridge, and return its result.

    Raise RuntimeError outside of it, and BridgeClosed if nothing can be
    awaited any more.
    """
    bridge = current()
    if bridge is None:
        _close(awaitable)
        raise RuntimeError(
            "Synchronous code can wait for an awaitable only where it's called by "
            "django.db.bridge.run() and in the same task."
        )
    if bridge.closed:
        _close(awaitable)
        raise BridgeClosed(
            "Synchronous code can't wait any more, because the coroutine that it's "
            "a part of was closed."
        )
    if bridge.shields:
        awaitable = _to_the_end(awaitable, bridge)
    bridge.awaitable = awaitable
    # It may lead to the task.
    del awaitable
    return bridge.parent.switch()


def _close(awaitable):
    if asyncio.iscoroutine(awaitable):
        awaitable.close()


class Event:
    """
    What code in the bridge waits for, and any thread sets, as threading.Event.

    Frames of the code refer to it. So it doesn't refer to what leads to the
    task, which would never be freed if the event loop is closed.
    """

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._is_set = False
        self._future = None

    def set(self):
        """Set it and return True, or False if the event loop was closed."""
        self._is_set = True
        if asyncio._get_running_loop() is self._loop:
            # It needn't be woken up.
            self._wake()
            return True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            return False
        return True

    def _wake(self):
        future = self._future and self._future()
        if future is not None and not future.done():
            future.set_result(None)

    def wait(self, timeout):
        """Return whether it was set within `timeout` seconds."""
        await_(self._wait(timeout))
        return self._is_set

    async def _wait(self, timeout):
        future = self._loop.create_future()
        self._future = weakref.ref(future)
        if self._is_set:
            return
        timer = self._loop.call_later(timeout, self._wake)
        try:
            await future
        finally:
            timer.cancel()


class TurnWaiter:
    """How code in the bridge waits for its turn (see django.db.turns)."""

    def __init__(self):
        self._event = Event()

    def grant(self):
        # If the loop was closed, nobody listens.
        return self._event.set()

    def wait(self, timeout):
        self._event.wait(timeout)


class shielded:
    """
    Let the code inside wait undisturbed by a cancellation of the task. The
    CancelledError is raised at the end.

    For what must not be left half done, and is sure to come to an end. An
    exception raised inside is then the context of the CancelledError, and a
    result is lost: what was acquired has to be released by the caller.

    It has no effect outside of the bridge.
    """

    # Every operation does this, so it isn't a generator.
    __slots__ = ("_bridge",)

    def __enter__(self):
        self._bridge = current()
        if self._bridge is not None:
            self._bridge.shields += 1

    def __exit__(self, *exc_info):
        bridge = self._bridge
        if bridge is None:
            return
        bridge.shields -= 1
        if not bridge.shields and bridge.cancelled is not None:
            cancelled, bridge.cancelled = bridge.cancelled, None
            if not bridge.closed:
                raise cancelled


async def _to_the_end(awaitable, bridge):
    """Await to the end. Keep a CancelledError that comes meanwhile."""
    if not asyncio.iscoroutine(awaitable):
        awaitable = _coroutine(awaitable)
    outer = asyncio.current_task()
    # In the same context. Another task, so that timeouts inside still work.
    task = asyncio.Task(awaitable, context=outer.get_context(), name=outer.get_name())
    # asyncio.run() cancels all tasks that it finds on its way out.
    asyncio._unregister_task(task)
    try:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as exc:
                # The traceback leads to the task.
                bridge.cancelled = exc.with_traceback(None)
        return task.result()
    finally:
        if not task.done():
            # The coroutine is being closed, perhaps with the loop.
            with suppress(RuntimeError):
                task.cancel()
        # It holds an exception, whose traceback holds this.
        del task


async def _coroutine(awaitable):
    return await awaitable


# ##### greenlet and asgiref #####


def check():
    """Raise ImproperlyConfigured if run() can't be used."""
    if greenlet is None:
        _import_greenlet()


def _import_greenlet():
    global greenlet
    try:
        import greenlet as module
    except ImportError as exc:
        raise ImproperlyConfigured(
            "Running synchronous code on the event loop requires greenlet. Install "
            "it with 'python -m pip install greenlet'."
        ) from exc
    with _importing:
        if greenlet is None:
            _adapt_async_to_sync()
            greenlet = module


def _adapt_async_to_sync():
    """
    Let async_to_sync() await the coroutine when it's called in the bridge,
    instead of refusing to do so because of the running event loop.

    asgiref has no hook for that. Its functions may have been made, as
    decorators, long before.
    """
    call = AsyncToSync.__call__

    @wraps(call)
    def __call__(self, *args, **kwargs):
        __traceback_hide__ = True  # noqa: F841
        bridge = current()
        if self.force_new_loop or bridge is None:
            values = [(variable, variable.get()) for variable in confined_variables]
            try:
                return call(self, *args, **kwargs)
            finally:
                for variable, value in values:
                    variable.set(value)
        if bridge.before_coroutine is not None:
            bridge.before_coroutine()
        awaitable = self.awaitable(*args, **kwargs)
        if (exc := sys.exception()) is not None:
            awaitable = _handling(exc, awaitable)
        return await_(awaitable)

    AsyncToSync.__call__ = __call__


async def _handling(exc, awaitable):
    """Await while an exception is being handled, as async_to_sync() does."""
    __traceback_hide__ = True  # noqa: F841
    try:
        raise exc
    except BaseException:
        return await awaitable
