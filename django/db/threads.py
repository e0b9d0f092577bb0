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

The thread itself is a Worker, which the next transaction of the scope may use
(see django.db.scopes).
"""

import asyncio
import threading
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext

from django.db import belonging
from django.db.abandoned import Call
from django.db.utils import OperationalError

# Seconds after which to look whether a thread gets to its work.
RELIEF_INTERVAL = 0.05

# Seconds after which an idle thread looks whether its loop is still open.
LOOP_INTERVAL = 1


class Worker(threading.Thread):
    """
    A thread that calls what it's given, as long as that returns true.

    After each it calls `clean_up()`, which mustn't raise, or what waits in the
    queue would never be called.

    It's a daemon, so that a block which is never left doesn't keep the
    interpreter from exiting.
    """

    def __init__(self, clean_up):
        super().__init__(daemon=True)
        self._clean_up = clean_up
        self._queue = SimpleQueue()
        # While it runs nothing.
        self.idle_name = f"idle {self.name}"

    def give(self, func):
        self._queue.put(func)

    def run(self):
        goes_on = True
        while goes_on:
            goes_on = self._queue.get()()
            self._clean_up()
            self.name = self.idle_name


class TransactionThread(Executor):
    """
    A thread that starts with its first function and ends with shutdown().

    Each thread it consists of calls `clean_up()` at its end. If `loop` is
    closed before shutdown() is called, nobody is left to do that: `deserted()`
    is called in the thread. `worker` is the first one, if there is one to use.
    """

    def __init__(self, name, clean_up, loop, deserted, worker=None):
        self.name = name
        self._clean_up = clean_up
        self._worker = worker
        self._loop = loop
        self._deserted = deserted
        self._open = True

    # What follows is made for the first function. In native mode, few
    # transactions have any.

    # Guards all of it, and is notified of new work.
    _changed = None
    _work = ()
    _count = 0
    _idle = 0
    # The idents of its threads.
    idents = frozenset()
    # How many functions that wait have another one on top of them.
    _covered = 0
    # The worker that somebody else uses from now on.
    _kept = None

    def _prepare(self):
        if self._changed is None:
            # Another thread may do so at once. What it has made stays.
            keep = vars(self).setdefault
            keep("_work", deque())
            keep("idents", set())
            # Of those that are running a function.
            keep("_busy", set())
            # The event loops that are going to look whether there's work left.
            keep("_watching", set())
            keep("_changed", threading.Condition())

    def submit(self, fn, /, *args, **kwargs):
        return self._submit(partial(fn, *args, **kwargs))

    def submit_urgent(self, fn, /, *args, **kwargs):
        """Wait neither for what's queued nor for what's running."""
        return self._submit(partial(fn, *args, **kwargs), urgent=True)

    def _submit(self, func, urgent=False):
        future = _Future()
        work = partial(future.complete, func, self._finish)
        self._prepare()
        with self._changed:
            if not self._open:
                raise RuntimeError("The transaction has ended.")
            if not self._count:
                self._start()
            elif urgent and len(self._busy) >= self._count:
                # Else it has to wait for what's running.
                with suppress(OperationalError):
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
        worker, self._worker = self._worker, None
        if worker is None:
            worker = Worker(self._clean_up)
            try:
                worker.start()
            except RuntimeError as exc:
                raise OperationalError(
                    f"No thread could be started for the {self.name}: {exc}."
                ) from exc
        worker.give(self._run)
        self._count += 1

    def _relieve(self, loop=None):
        """
        Start another thread if those there are can't get to the work. Look
        again as long as there is any: who is about to take the next function
        may wait in that one for another.
        """
        with self._changed:
            self._watching.discard(loop)
            if not self._work:
                return
            if (
                not self._idle
                and len(self._busy) >= self._count
                and all(
                    belonging.is_running(id, belonging.WAITING_CODE)
                    for id in self._busy
                )
            ):
                with suppress(OperationalError):
                    self._start()
            loop = asyncio.get_running_loop()
            if loop in self._watching:
                return
            self._watching.add(loop)
        loop.call_later(RELIEF_INTERVAL, self._relieve, loop)

    def _finish(self):
        """Note that a thread is about to be free."""
        with self._changed:
            if not self._covered:
                self._busy.discard(threading.get_ident())

    def is_running(self):
        return bool(self._count)

    def is_busy(self):
        if not self._count:
            return False
        with self._changed:
            return bool(self._busy or self._work)

    def shutdown(self, wait=False, *, cancel_futures=False):
        """End the thread after the functions that are queued."""
        # Before looking there: it may be made meanwhile.
        self._open = False
        # It refers to the transaction, and that to its thread.
        self._deserted = None
        if self._changed is not None:
            with self._changed:
                self._changed.notify_all()

    def spare_worker(self):
        """
        Return the current thread, if after shutdown() it has nothing left to
        do once its function returns, and no other thread runs any. Else None.
        """
        if not self._count:
            return None
        with self._changed:
            if self._open or self._work or self._covered:
                return None
            if self._busy != {threading.get_ident()}:
                return None
            return threading.current_thread()

    def keep(self, worker):
        """Let a spare worker go on after its function has returned."""
        self._kept = worker

    def _run(self):
        belonging.working.waiter_class = partial(_Waiter, self)
        worker = threading.current_thread()
        worker.name = self.name
        self.idents.add(worker.ident)
        while (work := self._next(worker.ident)) is not None:
            work()
            # Don't keep its result alive until there's more work.
            del work
        # What refers to the transaction, and to its scope.
        del belonging.working.waiter_class
        return self._kept is worker

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

    def complete(self, func, finish):
        """Call `func`, and `finish()` before anybody knows the result."""
        if self.set_running_or_notify_cancel():
            try:
                with self._call.running():
                    result = func()
            except BaseException as exc:
                finish()
                self.set_exception(exc)
            else:
                finish()
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
        # Whether it could have been granted the turn before it was idle. Then
        # it asks anew: nobody is going to offer it again.
        self._missed = False

    def grant(self):
        with self._thread._changed:
            self._granted = self._idle
            self._missed = not self._idle
            self._thread._changed.notify_all()
            return self._granted

    def wait(self, timeout):
        thread = self._thread
        with thread._changed:
            if not thread._work and not self._missed:
                self._idle = True
                thread.wait(timeout, lambda: self._granted)
                self._idle = False
            if self._granted or not thread._work:
                return
            work = thread._work.popleft()
            thread._covered += 1
        # asgiref keeps the caller's loop and task in there.
        caller = dict(vars(SyncToAsync.threadlocal))
        work()
        vars(SyncToAsync.threadlocal).update(caller)
        with thread._changed:
            thread._covered -= 1


class _TransactionContext(ThreadSensitiveContext):
    """
    What asgiref finds in the context of code inside an outermost aatomic().

    It's never entered or left by itself.
    """

    # A task that shares the context had a block of its own meanwhile.
    is_shared = False

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
    functions here, the first that takes them. If the first can't get to them,
    give one with a thread of its own.
    """
    if is_available():
        yield from _current_executors()
    else:
        yield ThreadPoolExecutor(max_workers=1)


def _current_executors():
    return _thread_sensitive_executors(
        getattr(AsyncToSync.executors, "current", None),
        SyncToAsync.thread_sensitive_context.get(None),
    )


def executors_outside():
    """Give those that a transaction around the caller doesn't have."""
    for executor in thread_sensitive_executors():
        if not isinstance(executor, TransactionThread):
            yield executor


def is_available():
    """
    Return whether the thread for thread-sensitive functions can get to them.
    It can't while it runs an event loop that waits for them.
    """
    executor = next(_current_executors())
    if isinstance(executor, CurrentThreadExecutor):
        threads = [executor._work_thread]
    elif isinstance(executor, ThreadPoolExecutor):
        # While submit() holds the lock, it has started a thread which isn't
        # among the others yet, and may already be running the loop.
        with executor._shutdown_lock:
            threads = list(executor._threads)
    else:
        threads = ()
    return not any(belonging.runs_loop(thread.ident) for thread in threads)


def may_be_cancelled(block):
    """Return whether synchronous code ran in a thread of the transaction."""
    return any(
        outer.thread is not None and outer.thread.is_running()
        for outer in belonging.chain(block)
    )


def install(block):
    """
    Send thread-sensitive work of code that inherits the current context to the
    transaction it's in. Return what uninstall() needs.
    """
    current = getattr(AsyncToSync.executors, "current", None)
    executor = current
    outer = SyncToAsync.thread_sensitive_context.get(None)
    while isinstance(outer, _TransactionContext) and outer.block.ended:
        executor = executor or outer.route.executor
        outer = outer.route.context
    route = _Route(executor, outer)
    context = _TransactionContext(block, route)
    if isinstance(outer, _TransactionContext):
        task, other = belonging.running_task(), outer.block.task()
        if other not in (None, task) and other.get_context() is task.get_context():
            outer.is_shared = context.is_shared = True
    SyncToAsync.context_to_thread_executor[context] = route
    token = SyncToAsync.thread_sensitive_context.set(context)
    # It has priority over the context.
    AsyncToSync.executors.current = None
    return context, token, current


def uninstall(installed):
    """Undo install() if the current context still holds what it set."""
    context, token, current = installed
    if SyncToAsync.thread_sensitive_context.get(None) is not context:
        return
    if context.is_shared:
        # The other block may be open. This one's passes all work on.
        return
    # In another context it's left there, and does so, too.
    with suppress(ValueError):
        SyncToAsync.thread_sensitive_context.reset(token)
        AsyncToSync.executors.current = current


async def run_to_the_end(executors, func, block, urgent=False):
    """
    Call `func` in the first executor that takes it, as code inside `block`.
    Return its result, and the CancelledError that came meanwhile or None.
    """

    def call():
        belonging.set_current(block)
        return func()

    if urgent:
        executors = map(_Urgent, executors)
    # A future rather than a task, which asyncio.run() would cancel on its way
    # out together with the caller.
    future = asyncio.wrap_future(
        submit(executors, copy_context().run, belonging.for_task(call))
    )
    cancelled = await outlast([future])
    try:
        return future.result(), cancelled
    except Exception as exc:
        if cancelled is None:
            raise
        # Or whoever cancelled the task would never know that it ended for it.
        raise cancelled from exc


async def outlast(futures):
    """
    Wait for futures, even if the task is cancelled. Return the CancelledError
    that came meanwhile, or None.
    """
    futures = list(futures)
    cancelled = None
    while not all(future.done() for future in futures):
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError as exc:
            cancelled = exc
    return cancelled


class _Urgent:
    def __init__(self, executor):
        self.submit = getattr(executor, "submit_urgent", executor.submit)
