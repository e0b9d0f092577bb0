"""
The thread that a transaction has for itself, and the way work gets there.

Asynchronous code calls synchronous code through asgiref's sync_to_async(). By
default it runs in the one thread that the caller's sync code shares, where a
transaction that waits for a lock would also stop the task which holds it. So
the outermost aatomic() block of a task has its own TransactionThread, and
takes the place of asgiref's ThreadSensitiveContext while it's open:
thread-sensitive work started inside runs in its thread, one function after the
other. Once the block has ended, such work goes where it would have gone
without the block.

A TransactionThread must not wait idly for what depends on its own queue. A
function that waits there for its turn on the connection (see
django.db.sharing) runs what is queued in the meantime. While a function waits
for an event loop, in async_to_sync() or since it runs one, another thread
takes the work.
"""

import asyncio
import threading
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext

from django.db import belonging
from django.db.abandoned import Call
from django.db.utils import OperationalError

# Functions in which a thread waits for an event loop.
_WAITING_CODE = belonging.LOOP_CODE | {AsyncToSync.__call__.__code__}

# Seconds after which to look whether a thread gets to its work.
RELIEF_INTERVAL = 0.05

# Seconds after which an idle thread looks whether its loop is still open.
LOOP_INTERVAL = 1


class TransactionThread(Executor):
    """
    A thread that starts with its first function and ends with shutdown().

    Each thread it consists of calls `at_end()` at its end. If `loop` is closed
    before shutdown() is called, nobody is left to do that: `deserted()` is
    called in the thread.
    """

    def __init__(self, name, at_end, loop, deserted):
        self.name = name
        self._at_end = at_end
        self._loop = loop
        self._deserted = deserted
        self._work = deque()
        # Guards all of this, and is notified of new work.
        self._changed = threading.Condition()
        self._open = True
        self._count = 0
        self._idle = 0
        # The idents of the threads that are running a function.
        self._busy = set()

    def submit(self, fn, /, *args, **kwargs):
        return self._submit(partial(fn, *args, **kwargs))

    def submit_urgent(self, fn, /, *args, **kwargs):
        """Wait neither for what's queued nor for what's running."""
        return self._submit(partial(fn, *args, **kwargs), urgent=True)

    def _submit(self, func, urgent=False):
        future = _Future()
        work = partial(future.complete, func)
        with self._changed:
            if not self._open:
                raise RuntimeError("The transaction has ended.")
            if not self._count or (urgent and not self._idle):
                self._start()
            if urgent:
                self._work.appendleft(work)
            else:
                self._work.append(work)
            self._changed.notify()
        if not urgent:
            self._relieve()
        return future

    def _start(self):
        # A daemon, so that a block which is never left doesn't keep the
        # interpreter from exiting.
        thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            raise OperationalError(
                f"No thread could be started for the {self.name}: {exc}."
            ) from exc
        self._count += 1

    def _relieve(self):
        """Start another thread if those there are can't get to the work."""
        with self._changed:
            if not self._work or not self._busy or self._idle:
                return
            if all(belonging.is_running(ident, _WAITING_CODE) for ident in self._busy):
                self._start()
                return
        # It may begin to wait at any time.
        asyncio.get_running_loop().call_later(RELIEF_INTERVAL, self._relieve)

    def is_running(self):
        return bool(self._count)

    def shutdown(self, wait=False, *, cancel_futures=False):
        """End the thread after the functions that are queued."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def _run(self):
        belonging.working.waiter_class = partial(_Waiter, self)
        ident = threading.get_ident()
        while (work := self._next(ident)) is not None:
            work()
            # Don't keep its result alive until there's more work.
            del work
        self._at_end()

    def _next(self, ident):
        """Return what to do next, or None at the end."""
        with self._changed:
            self._busy.discard(ident)
            while not self._work:
                if not self._open or self._count > 1:
                    self._count -= 1
                    return None
                if self.wait(LOOP_INTERVAL) or not self._loop.is_closed():
                    continue
                self._open = False
                return self._deserted
            self._busy.add(ident)
            return self._work.popleft()

    def wait(self, timeout, granted=lambda: False):
        """Wait for work. The caller holds the condition."""
        self._idle += 1
        try:
            return self._changed.wait_for(
                lambda: self._work or granted() or not self._open, timeout
            )
        finally:
            self._idle -= 1


class _Future(Future):
    """The result of a function that's abandoned if it can't be cancelled."""

    def __init__(self):
        super().__init__()
        self._call = Call()

    def cancel(self):
        if super().cancel():
            return True
        self._call.abandon()
        return False

    def complete(self, func):
        if self.set_running_or_notify_cancel():
            try:
                with self._call.running():
                    result = func()
            except BaseException as exc:
                self.set_exception(exc)
            else:
                self.set_result(result)


class _Waiter:
    """
    How a TransactionThread waits: while there is work, it does that.

    It isn't granted the turn meanwhile. Since that belongs to the thread, the
    work would run in a turn which is for the function that waits.
    """

    def __init__(self, thread):
        self._thread = thread
        self._idle = False
        self._granted = False

    def grant(self):
        with self._thread._changed:
            self._granted = self._idle
            self._thread._changed.notify_all()
            return self._granted

    def wait(self, timeout):
        thread = self._thread
        with thread._changed:
            if not thread._work:
                self._idle = True
                thread.wait(timeout, lambda: self._granted)
                self._idle = False
            if self._granted or not thread._work:
                return
            work = thread._work.popleft()
        # asgiref keeps the caller's loop and task in there.
        caller = dict(vars(SyncToAsync.threadlocal))
        work()
        vars(SyncToAsync.threadlocal).update(caller)


class _TransactionContext(ThreadSensitiveContext):
    """
    What asgiref finds in the context of code inside an outermost aatomic().

    It's never entered or left by itself.
    """

    def __init__(self, block, route):
        self.block = block
        self.route = route

    @property
    def _exited(self):
        # asgiref asks this in the caller's task, before it copies the context.
        belonging.claim()
        return False


class _Route(Executor):
    """Passes work on to the thread of the transaction its caller is in."""

    def __init__(self, executor, context):
        # What asgiref would have used outside of the block.
        self.executor = executor
        self.context = context

    def submit(self, fn, /, *args, **kwargs):
        return submit(self.executors(), belonging.for_task(fn), *args, **kwargs)

    def executors(self):
        for block in belonging.chain(belonging.current()):
            if block.thread is not None and not block.ended:
                yield block.thread
        yield from _thread_sensitive_executors(self.executor, self.context)


def submit(executors, fn, /, *args, **kwargs):
    """
    Submit to the first executor that takes it. One that has ended raises
    RuntimeError, as does one that waits in the current thread.
    """
    for executor in executors:
        try:
            return executor.submit(fn, *args, **kwargs)
        except RuntimeError as exc:
            refusal = exc
    raise refusal


def _thread_sensitive_executors(executor, context):
    """Give what asgiref's SyncToAsync.__call__() chooses the first of."""
    if executor is not None:
        yield executor
    if context is not None:
        executors = SyncToAsync.context_to_thread_executor
        if context not in executors:
            executors[context] = ThreadPoolExecutor(max_workers=1)
        if isinstance(context, _TransactionContext):
            yield from context.route.executors()
        else:
            yield executors[context]
    loop = asyncio.get_running_loop()
    if loop in AsyncToSync.loop_thread_executors:
        yield AsyncToSync.loop_thread_executors[loop]
    yield SyncToAsync.single_thread_executor


def thread_sensitive_executors():
    """
    Give the executors that sync_to_async() would use for thread-sensitive
    functions here, the first that takes them.
    """
    return _thread_sensitive_executors(
        getattr(AsyncToSync.executors, "current", None),
        SyncToAsync.thread_sensitive_context.get(None),
    )


def is_available():
    """
    Return whether the thread for thread-sensitive functions isn't the very
    thread that waits for them, since it runs the current event loop.
    """
    executor = next(thread_sensitive_executors())
    threads = getattr(executor, "_threads", ())
    return threading.current_thread() not in threads


def install(block):
    """
    Send thread-sensitive work of code that inherits the current context to the
    transaction it's in. Return what uninstall() needs.
    """
    executor = getattr(AsyncToSync.executors, "current", None)
    outer = SyncToAsync.thread_sensitive_context.get(None)
    while isinstance(outer, _TransactionContext) and outer.block.ended:
        executor = executor or outer.route.executor
        outer = outer.route.context
    route = _Route(executor, outer)
    context = _TransactionContext(block, route)
    SyncToAsync.context_to_thread_executor[context] = route
    token = SyncToAsync.thread_sensitive_context.set(context)
    # It has priority over the context.
    AsyncToSync.executors.current = None
    return context, token, executor


def uninstall(installed):
    """Undo install() if the current context still holds what it set."""
    context, token, executor = installed
    if SyncToAsync.thread_sensitive_context.get(None) is not context:
        return
    # In another context it's left there, and passes all work on.
    with suppress(ValueError):
        SyncToAsync.thread_sensitive_context.reset(token)
        AsyncToSync.executors.current = executor
