"""
Which block an execution is inside of, and what follows from that.

An execution is an asyncio task, or a thread running synchronous code. A block
is a running atomic(), aatomic() or new_connection(). Each database alias is
decided for itself, by the innermost block for that alias which the execution
is inside of. The blocks of aatomic() and new_connection() are strict:

======== ===== ====================================== =========
block    state the execution                          decision
======== ===== ====================================== =========
none                                                  OWN
strict   open  any that is inside                     JOIN
strict   ended any that is inside, so it outlived it  REFUSE
atomic() open  in the thread that entered the block   JOIN
atomic() open  brought to another thread by asgiref   JOIN
atomic() open  in another thread, while the one that  JOIN
               entered the block runs an event loop
atomic() open  in another thread otherwise            OWN
atomic() ended any that is inside                     SKIP
======== ===== ====================================== =========

OWN
    Use the connection of the thread, as if there were no block.
JOIN
    Use the connection of the block, when its turn comes. What a turn is, and
    how a block is entered and left, is the matter of django.db.sharing.
REFUSE
    Raise TransactionManagementError. Nothing has been sent.
SKIP
    Ask the next block outwards.

The second OWN is for a thread that was given a copy of the context by hand.

That's for uses. Whoever opens a block after the end is nested in what is still
open, whichever kind of block has ended (see open_block() and outside()).

Being inside is carried in two ways. A context variable carries what is
inherited: by tasks, by the threads that asyncio.to_thread() uses, and by
asgiref in both directions. Its value is tagged with the thread that asgiref
brought it to, as the values of an asgiref.local.Local are. And what a task has
opened is kept for the task itself, because tasks may share one context: a task
isn't inside a block that another task, still running, opened in there. In such
a context the variable is corrected before asgiref copies it for functions that
are thread-sensitive, when it asks for their thread (see claim()). For others,
and by asyncio.to_thread(), it's copied without anything being asked, and the
thread isn't told the task. They may see the block of the other task.

A block may be left in another context than it was entered in. The variable may
then go on holding a block that has ended, so it never counts by itself. Nor
does it if it was brought to a task by a call of sync_to_async() in which the
task was cancelled, and which goes on inside of the block (see current()).
"""

import _thread
import asyncio
import sys
import threading
import weakref
from contextlib import suppress
from contextvars import ContextVar
from functools import wraps

from asgiref.local import _Storage
from asgiref.sync import AsyncToSync, SyncToAsync

OWN = "own"
JOIN = "join"
REFUSE = "refuse"
SKIP = "skip"

# The innermost block of any alias, as the data of an asgiref.local._Storage.
# asgiref sets the storage's thread_id anew wherever it brings a context to
# another thread on purpose, and nobody else does.
inherited = ContextVar("django.db.belonging")

# The innermost block that a task has opened and not left.
_opened = weakref.WeakKeyDictionary()

# Attributes of the thread: `waiter_class`, if it can do other work while it
# waits, and while it works for a task, `task_name` and the `call`, which the
# task may abandon.
working = threading.local()


class Block:
    """
    A block on the connection to one database.

    It's entered when it is on the connection's stack, and ended when it has
    been taken off, or will never get there.

    `parent` is the block around it, for any alias. A `strict` block has an end
    that nothing started inside goes beyond. `task` is the task that opened it,
    if it's asynchronous, and `loop` is the one that runs that.
    """

    # The TransactionThread that it has for itself.
    thread = None
    # The ManualTransaction whose time it is.
    manual = None
    # It's the time between set_autocommit(False) and set_autocommit(True).
    by_hand = False
    # An exception to roll back for, raised while a block nested in it, of
    # another task, was open.
    failure = None
    # What error messages call the execution that opened it.
    title = None
    # It was ended by leaving a block around it.
    abandoned = False
    # It's being ended by an exception.
    leaving = False
    # A query was cancelled inside of it.
    cancelled = False
    # Functions given to on_commit() have to be called.
    hooks_due = False
    # What asgiref keeps for the call of sync_to_async() that opened it.
    call = None

    def __init__(self, alias, connection, atomic, parent, strict=False, task=None):
        self.alias = alias
        self.connection = connection
        self.atomic = atomic
        self.parent = parent
        self.strict = strict
        self.task = task and weakref.ref(task)
        self.loop = task and weakref.ref(task.get_loop())
        # The number of savepoint ids on the connection inside of it.
        self.depth = 0
        # The thread that entered it.
        self.thread_ident = None
        self.entered = False
        self.ended = False
        # The storage that the context held before.
        self.outer = inherited.get(None)
        if strict:
            self.title = execution_name()
        if parent is not None or self.outer is not None:
            self.prune()

    def __str__(self):
        if self.title:
            return self.title
        for thread in threading.enumerate():
            if thread.ident == self.thread_ident:
                return f"thread {thread.name!r}"
        return "a thread that has finished"

    def prune(self):
        """Forget the blocks around it that decide nothing any more."""
        while (
            (parent := self.parent) is not None
            and parent.ended
            and (
                not parent.strict
                # Whoever asks it is refused before.
                or (self.ended and self.strict and self.alias == parent.alias)
            )
        ):
            self.parent = parent.parent
        while (
            (outer := self.outer) is not None
            and outer.data is not None
            and outer.data.ended
            and not outer.data.strict
        ):
            self.outer = outer.data.outer


def chain(block):
    while block is not None:
        yield block
        block = block.parent


# ##### The execution #####


def running_task():
    loop = asyncio._get_running_loop()
    return None if loop is None else asyncio.current_task(loop)


def execution_name():
    """Return what error messages call the current execution."""
    task = running_task()
    name = task.get_name() if task else getattr(working, "task_name", None)
    if name:
        return f"task {name!r}"
    return f"thread {threading.current_thread().name!r}"


def for_task(func):
    """Let `func`, called in a thread, work in the current task's name."""
    task = running_task()
    name = task and task.get_name()

    @wraps(func)
    def inner(*args, **kwargs):
        outer_name = getattr(working, "task_name", None)
        working.task_name = name
        try:
            return func(*args, **kwargs)
        finally:
            working.task_name = outer_name

    return inner


def current():
    """
    Return the innermost block that the current execution is inside of, for
    any alias and whether or not it has ended, or None.
    """
    storage = inherited.get(None)
    block = None if storage is None else storage.data
    loop = asyncio._get_running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    while block is not None and block.call is not None and _is_abandoned(block):
        block = block.outer and block.outer.data
    if task is None:
        while block is not None and block.ended and _is_back(block):
            restore(block)
            storage = inherited.get(None)
            block = None if storage is None else storage.data
        return block
    opened = _opened.get(task)
    if opened is not None and (opened.abandoned or not opened.ended):
        # Synchronous code may have entered another one inside.
        return block if opened in chain(block) else opened
    while block is not None:
        opener = block.task and block.task()
        if block.task is None:
            if block.call is None or not _is_abandoned(block):
                break
        elif opener is task:
            # It was left in another context.
            if not block.ended:
                break
        elif (
            opener is None
            or opener.done()
            or opener.get_context() is not task.get_context()
        ):
            break
        block = block.outer and block.outer.data
    return block


def _is_abandoned(block):
    """
    Return whether `block` was opened by a call of asgiref's sync_to_async()
    that goes on in another thread, while the current execution, which wasn't
    started inside, has been given its context: a task was cancelled that
    awaited it.
    """
    ident = block.thread_ident
    if block.ended or ident == _thread.get_ident():
        return False
    if inherited.get().thread_id == ident:
        # The thread has handed its context on by itself.
        return False
    storage = AsyncToSync.executors._storage._data.get(None)
    executor = storage and storage.data.get("current")
    while executor is not None:
        if executor._work_thread.ident == ident:
            # Started inside, by async_to_sync(), which may have returned.
            return False
        executor = executor._old_executor
    frame = sys._current_frames().get(ident)
    while frame is not None and frame.f_code not in WAITING_CODE:
        if frame.f_code is SyncToAsync.thread_handler.__code__:
            if frame.f_locals.get("task_context") is block.call:
                return True
        frame = frame.f_back
    return False


def current_call():
    """Return what asgiref keeps for the call of sync_to_async() around."""
    # Not what it keeps for the thread, that's of the last call.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is SyncToAsync.thread_handler.__code__:
            return frame.f_locals.get("task_context")
        frame = frame.f_back
    return None


def _is_back(block):
    """
    Return whether async_to_sync() brought the context of a task that opened
    `block` to this thread, which wasn't started inside.
    """
    here = _thread.get_ident()
    return (
        block.task is not None
        # In a thread that was started inside, it brings back what was there.
        and ((loop := block.loop()) is None or loop.is_closed())
        and inherited.get().thread_id == here
        and getattr(working, "task_name", None) is None
        and asyncio._get_running_loop() is None
        and not is_running(here, {SyncToAsync.thread_handler.__code__})
    )


def set_current(block):
    """Make code that the current context is copied for inside `block`."""
    inherited.set(block and _Storage(_thread.get_ident(), block))


def claim():
    """
    Correct the context before it's copied for synchronous code: in a context
    that tasks share, another task may have opened or left a block.
    """
    storage = inherited.get(None)
    block = current()
    if block is not (storage and storage.data):
        set_current(block)


def call_for(block, func):
    """
    Call a function that enters or leaves a block. Until it returns, the
    current execution is inside `block`, and of nothing that's nested in it.
    """
    task = running_task()
    opened, storage = task and _opened.get(task), inherited.get(None)
    before = storage and storage.data
    # It may be left by another task while this one waits.
    is_left_here = before and not before.ended and _shares_context(before, task)
    if task is not None:
        _opened[task] = block
    # Who was brought to this thread is inside, and nobody else.
    home = storage.thread_id if storage else _thread.get_ident()
    inherited.set(block and _Storage(home, block))
    try:
        return func()
    finally:
        inherited.set(storage)
        if is_left_here and before.ended:
            restore(before)
        if opened is not None:
            _opened[task] = opened
        elif task is not None:
            _opened.pop(task, None)


def _shares_context(block, task):
    """Return whether `task` runs in the context of the one that opened it."""
    opener = block.task and block.task()
    return bool(opener and task) and opener.get_context() is task.get_context()


def begin(block):
    """Let the current task be inside `block`, which has been entered."""
    if block.task is not None:
        _opened[block.task()] = block
    block.outer = inherited.get(None)
    set_current(block)


def end(block):
    """Let the task that opened `block`, which has been left, be outside."""
    task = block.task and block.task()
    if task is not None and _opened.get(task) is block:
        parent = block.parent
        if parent is not None and parent.task and parent.task() is task:
            _opened[task] = parent
        else:
            del _opened[task]
    run_where_opened(block, restore, block)
    block.prune()


def run_where_opened(block, func, *args):
    """
    Call a function in the current context, and in that of the task which
    opened `block`: asgiref may hand it on to the thread that runs the loop.
    """
    func(*args)
    task = block.task and block.task()
    if task is not None and task is not running_task():
        # If it's in use by another task or thread, that's outside anyway.
        with suppress(RuntimeError):
            task.get_context().run(func, *args)


def restore(block):
    """Give the current context what it held before `block`, if it's there."""
    storage = inherited.get(None)
    if storage is None or storage.data is not block:
        return
    outer = block.outer
    if block.task is not None:
        # In a context that tasks share, it may be the block of another task.
        around = set(chain(block.parent))
        while (
            outer is not None
            and outer.data is not None
            and outer.data.ended
            and outer.data not in around
        ):
            outer = outer.data.outer
    if outer is None or outer.thread_id == _thread.get_ident() or outer.data.ended:
        # As it was, if it has ended for _is_back().
        inherited.set(outer)
    else:
        set_current(outer.data)


class Entries:
    """
    What one context manager, perhaps shared by executions, has entered and not
    left, the last at the end.
    """

    def __init__(self):
        self._entries = []

    def push(self, entry):
        self._entries.append((_execution(), entry))

    def pop(self):
        """
        Remove and return the last entry of the current execution. If it has
        none, it leaves what another one has entered.
        """
        execution = _execution()
        for index in reversed(range(len(self._entries))):
            if self._entries[index][0] == execution:
                return self._entries.pop(index)[1]
        return self._entries.pop()[1]


def _execution():
    return running_task() or _thread.get_ident()


# ##### The decision #####


def decide(*, strict, ended, same_thread, moved, runs_loop):
    """
    Return the decision of the table. `moved` tells whether asgiref brought the
    execution to its thread, `runs_loop()` whether the thread that entered the
    block runs an event loop: a function, since it's costly.
    """
    if strict:
        return REFUSE if ended else JOIN
    if ended:
        return SKIP
    if same_thread or moved or runs_loop():
        return JOIN
    return OWN


def is_moved(home, here, origin):
    """
    Return whether asgiref brought a context with the tag `home` to the thread
    `here`. Copied by hand, it still has the tag of the thread `origin`.
    """
    return home == here or home != origin


LOOP_CODE = {
    asyncio.BaseEventLoop.run_forever.__code__,
    asyncio.Runner.run.__code__,
}

# Threads that run one of these wait for asynchronous code. The bridge puts
# another function in the place of the last one, which calls it.
ASYNC_TO_SYNC_CODE = AsyncToSync.__call__.__code__
WAITING_CODE = LOOP_CODE | {ASYNC_TO_SYNC_CODE}


def is_running(thread_ident, codes):
    """Return whether a thread runs one of several functions."""
    frame = sys._current_frames().get(thread_ident)
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def runs_loop(thread_ident):
    # Unless DJANGO_ALLOW_ASYNC_UNSAFE is set, such a thread can't enter
    # atomic(), so the loop was started inside of it.
    return is_running(thread_ident, LOOP_CODE)


def _find(matches, refuse=True):
    """
    Return the innermost block that `matches` and that the execution joins, or
    None if it uses its own connection. Raise if it's to `refuse`.
    """
    block = current()
    if block is None:
        return None
    here = _thread.get_ident()
    storage = inherited.get(None)
    home = here if storage is None else storage.thread_id
    for block in chain(block):
        if not matches(block):
            continue
        if block.strict and not block.ended:
            # What's usual in asynchronous code, and would be decided below.
            return block
        decision = decide(
            strict=block.strict,
            ended=block.ended,
            same_thread=block.thread_ident == here,
            moved=is_moved(home, here, block.thread_ident),
            runs_loop=lambda: runs_loop(block.thread_ident),
        )
        if decision is REFUSE:
            if refuse:
                raise outlived(block.alias, block)
        elif decision is not SKIP:
            return block if decision is JOIN else None
    return None


def block_for(alias):
    """
    Return the block whose connection the current execution uses, or None if
    it uses its own.

    Raise TransactionManagementError if it outlived the block.
    """
    return _find(lambda block: block.alias == alias)


def open_block(alias):
    """
    Return the block that a block which the current execution opens would be
    nested in, or None. Who has outlived one may open another one, nested in
    the innermost block that's still open.
    """
    return _find(lambda block: block.alias == alias, refuse=False)


def outside(alias, block):
    """
    Return `block`, or if that's inside of others for `alias` which have been
    outlived, the innermost one outside of these. There, it's possible to open
    another one.
    """
    around = block
    while block is not None:
        if block.alias == alias:
            if not block.ended:
                break
            if block.strict:
                around = block.parent
        block = block.parent
    return around


def joined(connection):
    """
    Return the innermost block on `connection` that the execution joins, or
    None.

    Raise TransactionManagementError if it outlived the block.
    """
    return _find(lambda block: block.connection is connection and block.entered)


# ##### Refusals #####


def error(message):
    # It imports this module.
    from django.db.transaction import TransactionManagementError

    exc = TransactionManagementError(message)
    # Nothing was sent, so there's nothing to roll back for.
    exc.was_refused = True
    return exc


def outlived(alias, opener):
    return error(
        f"{execution_name()} can't use the database '{alias}' any more, because the "
        f"block that it was started in, opened by {opener}, has ended. Await it "
        "inside the block, leave what has to follow the commit to on_commit(), or "
        "open a block of its own or new_connection()."
    )


def rolled_back(block):
    return error(
        f"The block that {block} opened on the database '{block.alias}' was rolled "
        "back, because a block around it ended first. Await what opens a block "
        "before leaving the block around it."
    )


def swallowed(block):
    return error(
        f"A query on the database '{block.alias}' was cancelled inside the block that "
        f"{block} opened, which is rolled back therefore. Let the CancelledError or "
        "the TimeoutError leave the block, or a block nested in it, instead of "
        "swallowing it inside."
    )


def call_abandoned(alias):
    return error(
        f"{execution_name()} can't use the database '{alias}' any more, because the "
        "task that called it was cancelled."
    )


def foreign(connection):
    return error(
        f"{execution_name()} can't use this connection to the database "
        f"'{connection.alias}', because it belongs to a transaction opened by "
        f"{connection.blocks[0]}. Use django.db.connections instead of passing "
        "connections around."
    )


def waited_in_vain(connection, timeout, block=None):
    """Tell of a wait for a nested block, or for others inside `block`."""
    top = connection.blocks[-1] if connection.blocks else None
    if top is block:
        top = None
    obstacle = (
        f"the block that {top} opened on" if top else "another one to be done with"
    )
    return error(
        f"{execution_name()} waited {timeout} seconds for {obstacle} the database "
        f"'{connection.alias}'"
        + (" to end" if top else "")
        + ". If that waits for it in turn, neither can go on: start it inside the "
        "block, or await it before the block."
    )


def waits_for_copy(connection):
    return error(
        f"{execution_name()} can't use the database '{connection.alias}' while a "
        "copy() is going on there, which needs the thread it would wait in. Await it "
        "before or after that."
    )


def waits_for_itself(connection):
    return error(
        f"{execution_name()} can't use the database '{connection.alias}' while the "
        f"block that {connection.blocks[-1]} opened is open, because that block "
        "needs the thread it would wait in. Await it before or after the block, or "
        "call asynchronous methods, which wait on the event loop."
    )
