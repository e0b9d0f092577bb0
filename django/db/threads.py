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

A TransactionThread must not wait idly for something that depends on its own
queue. A function which waits there for its turn on the connection (see
django.db.belonging) runs what is queued in the meantime. While a function runs
an event loop there, a second thread, the deputy, takes the work.
"""

import asyncio
import threading
from collections import deque
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial

from asgiref.sync import (
    AsyncToSync,
    SyncToAsync,
    ThreadPoolExecutor,
    ThreadSensitiveContext,
)

from django.db import belonging


class TransactionThread(Executor):
    """
    An executor with a thread that starts with its first function and ends with
    shutdown(), after calling `at_end`.
    """

    def __init__(self, name, at_end):
        self.name = name
        self._at_end = at_end
        self._work = deque()
        # Guards all of this, and is notified of new work.
        self._changed = threading.Condition()
        self._thread = None
        self._deputy = None
        self._open = True
        self._busy = False

    def submit(self, fn, /, *args, **kwargs):
        with self._changed:
            if not self._open:
                raise RuntimeError("The transaction has ended.")
            if self._thread is None:
                # A daemon, so that a block which is never left doesn't keep
                # the interpreter from exiting.
                self._thread = threading.Thread(
                    target=self._run, name=self.name, daemon=True
                )
                self._thread.start()
            elif self._busy and belonging.runs_loop(self._thread.ident):
                if self._deputy is None:
                    self._deputy = TransactionThread(
                        f"{self.name}, deputy", self._at_end
                    )
                return self._deputy.submit(fn, *args, **kwargs)
            future = Future()
            self._work.append(partial(_complete, future, partial(fn, *args, **kwargs)))
            self._changed.notify()
            return future

    def shutdown(self, wait=False, *, cancel_futures=False):
        """End the thread after the functions that are queued."""
        with self._changed:
            self._open = False
            self._changed.notify()
            if self._deputy is not None:
                self._deputy.shutdown()

    def _run(self):
        belonging.working.waiter_class = partial(_Waiter, self)
        while (work := self._next()) is not None:
            work()
            # Don't keep its result alive until there's more work.
            del work
        self._at_end()

    def _next(self):
        """Return what to do next, or None at the end."""
        with self._changed:
            self._busy = False
            while self._open and not self._work:
                self._changed.wait()
            if not self._work:
                return None
            self._busy = True
            return self._work.popleft()


def _complete(future, func):
    if future.set_running_or_notify_cancel():
        try:
            result = func()
        except BaseException as exc:
            future.set_exception(exc)
        else:
            future.set_result(result)


class _Waiter:
    """
    How a TransactionThread waits: while there is work, it does that.

    It isn't granted the turn meanwhile. Since that belongs to the thread, the
    work would run in a turn which is for the function that waits.
    """

    def __init__(self, thread):
        self._work = thread._work
        self._changed = thread._changed
        self._idle = False
        self._granted = False

    def grant(self):
        with self._changed:
            self._granted = self._idle
            self._changed.notify()
            return self._granted

    def wait(self, timeout):
        with self._changed:
            if not self._work:
                self._idle = True
                self._changed.wait_for(lambda: self._granted or self._work, timeout)
                self._idle = False
            if self._granted or not self._work:
                return
            work = self._work.popleft()
        # asgiref keeps the caller's loop and task in there.
        caller = dict(vars(SyncToAsync.threadlocal))
        work()
        vars(SyncToAsync.threadlocal).update(caller)


class _TransactionContext(ThreadSensitiveContext):
    """
    What asgiref finds in the context of code inside an outermost aatomic().

    It's never entered or left by itself. It must not refer to its executor,
    which asgiref keeps as long as this object.
    """

    def __init__(self):
        pass

    @property
    def _exited(self):
        # asgiref asks this in the caller's task, before it copies the context.
        belonging.claim()
        return False


class _Route(Executor):
    """Passes work on to the thread of the transaction its caller is in."""

    def __init__(self, executor, context):
        # What asgiref would have used outside of the block.
        self._executor = executor
        self._context = context

    def submit(self, fn, /, *args, **kwargs):
        fn = belonging.for_task(fn)
        for executor in self._executors():
            # One that has ended raises RuntimeError, as does one that waits
            # in the current thread.
            with suppress(RuntimeError):
                return executor.submit(fn, *args, **kwargs)
        raise RuntimeError("No thread is left for thread-sensitive functions.")

    def _executors(self):
        for block in belonging.chain(belonging.current()):
            if block.thread is not None and not block.ended:
                yield block.thread
        yield from _thread_sensitive_executors(self._executor, self._context)


def _thread_sensitive_executors(executor, context):
    """Give what asgiref's SyncToAsync.__call__() chooses the first of."""
    if executor is not None:
        yield executor
    if context is not None:
        executors = SyncToAsync.context_to_thread_executor
        if context not in executors:
            executors[context] = ThreadPoolExecutor(max_workers=1)
        yield executors[context]
    loop = asyncio.get_running_loop()
    if loop in AsyncToSync.loop_thread_executors:
        yield AsyncToSync.loop_thread_executors[loop]
    yield SyncToAsync.single_thread_executor


def thread_sensitive_executor():
    """
    Return the executor that sync_to_async() would use for thread-sensitive
    functions here.
    """
    executors = _thread_sensitive_executors(
        getattr(AsyncToSync.executors, "current", None),
        SyncToAsync.thread_sensitive_context.get(None),
    )
    return next(executors)


def install():
    """
    Send thread-sensitive work of code that inherits the current context to the
    transaction it's in. Return what uninstall() needs.
    """
    executor = getattr(AsyncToSync.executors, "current", None)
    outer = SyncToAsync.thread_sensitive_context.get(None)
    context = _TransactionContext()
    SyncToAsync.context_to_thread_executor[context] = _Route(executor, outer)
    token = SyncToAsync.thread_sensitive_context.set(context)
    # It has priority over the context.
    AsyncToSync.executors.current = None
    return context, token, executor


def uninstall(installed):
    """Undo install() if the current context still holds what it set."""
    context, token, executor = installed
    if SyncToAsync.thread_sensitive_context.get(None) is not context:
        return
    try:
        SyncToAsync.thread_sensitive_context.reset(token)
    except ValueError:
        # A copy of the context. What's left there passes all work on.
        return
    AsyncToSync.executors.current = executor
