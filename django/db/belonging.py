"""
Which block an execution is inside of, and what follows from that.

An execution is an asyncio task, or a thread running synchronous code. A block
is a running atomic() or aatomic(). Each database alias is decided for itself,
by the innermost block for that alias which the execution is inside of:

======== ===== ====================================== =========
block    state the execution                          decision
======== ===== ====================================== =========
none                                                  OWN
aatomic  open  any that is inside                     JOIN
aatomic  ended any that is inside, so it outlived it  REFUSE
atomic   open  in the thread that entered the block   JOIN
atomic   open  brought to another thread by asgiref   JOIN
atomic   open  in another thread, while the one that  JOIN
               entered the block runs an event loop
atomic   open  in another thread otherwise            OWN
atomic   ended any that is inside                     OUTER
======== ===== ====================================== =========

OWN
    Use the connection of the thread, as if there were no block.
JOIN
    Use the connection of the block, when its turn comes (see below).
REFUSE
    Raise TransactionManagementError. Nothing has been sent.
OUTER
    Ask the next block outwards.

The last but one row keeps threads apart that are given a copy of the context
by hand.

Being inside is carried in two ways. A context variable carries what is
inherited: by tasks, by the threads that asyncio.to_thread() uses, and by
asgiref in both directions. Its value is tagged with the thread that asgiref
brought it to, as the values of an asgiref.local.Local are. And a block knows
the task that opened it, because tasks may share one context: a task isn't
inside a block that another task, still running, opened in their context.
Nothing depends on the variable being reset, since a block may be left in
another context than it was entered in.

A connection keeps its open blocks in a stack, connection.blocks. As soon as a
second execution could use it, it also gets a Turn, connection.turn. From then
on every statement, entry into a block and exit from one holds the turn. The
execution has to be inside the block on top of the stack for that:

================================================== ===========================
the top of the stack                               the execution
================================================== ===========================
is its block, and nobody has the turn              runs
is its block, and somebody has the turn            waits
is nested in its block, entered in another thread  waits
is nested in its block, entered in this thread     does the thread's other
                                                   work, if the thread is a
                                                   transaction's own; else is
                                                   refused
================================================== ===========================

A wait ends after TURN_TIMEOUT seconds, in TransactionManagementError. None
happens on an event loop's thread: there, its_turn() is awaited before a
thread is asked to run synchronous code.

An in-memory SQLite database has but one connection. It is lent to a
transaction, and its thread's other work waits until the stack is empty.
"""

import _thread
import asyncio
import sys
import threading
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps

from asgiref.local import _Storage

from django.db.turns import ThreadWaiter, Turn

# Seconds after which waiting for a turn is given up as a deadlock.
TURN_TIMEOUT = 30

OWN = "own"
JOIN = "join"
REFUSE = "refuse"
OUTER = "outer"

# The innermost block of any alias, as the data of an asgiref.local._Storage.
# asgiref sets the storage's thread_id anew wherever it brings a context to
# another thread on purpose, and nobody else does.
inherited = ContextVar("django.db.belonging")

# Attributes of the thread: `waiter_class`, if it can do other work while it
# waits, and `task_name`, while it works for a task.
working = threading.local()

_sharing = threading.Lock()


class Block:
    """
    One entry into an atomic() or an aatomic() block.

    `parent` is the block around it, for any alias. `outer` is the storage that
    the context held before it. `depth` is the number of savepoint ids on the
    connection inside it. `thread_ident` is the thread that entered it, and
    `thread` the TransactionThread it has for itself, if any. After the end of
    a `strict` block, what was started inside it is refused. `failure` is an
    exception to roll back for, raised while a block nested in it was open.
    `manual` is the ManualTransaction whose time it is, if any.
    """

    __slots__ = (
        "alias",
        "atomic",
        "connection",
        "depth",
        "ended",
        "entered",
        "failure",
        "hooks_due",
        "manual",
        "outer",
        "parent",
        "strict",
        "task",
        "thread",
        "thread_ident",
        "title",
        "__weakref__",
    )

    def __init__(self, alias, connection, atomic, task=None, title=None):
        self.alias = alias
        self.connection = connection
        self.atomic = atomic
        self.outer = inherited.get(None)
        self.parent = current()
        self.task = task and weakref.ref(task)
        self.strict = task is not None
        self.title = title
        self.thread = None
        self.thread_ident = None
        self.depth = 0
        self.entered = False
        self.failure = None
        self.hooks_due = False
        self.manual = None
        self.ended = False

    def __str__(self):
        if self.title:
            return self.title
        for thread in threading.enumerate():
            if thread.ident == self.thread_ident:
                return f"thread {thread.name!r}"
        return "a thread that has finished"


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
    if storage is None or storage.data is None:
        return None
    block = storage.data
    task = running_task()
    if task is None:
        return block
    while block is not None and block.task is not None:
        opener = block.task()
        if opener is task:
            # It opened the block. If the block was left in another context,
            # this one still holds it.
            if not block.ended:
                break
        elif (
            opener is None
            or opener.done()
            or opener.get_context() is not task.get_context()
        ):
            break
        # Otherwise another task opened it in the context which they share.
        block = block.outer and block.outer.data
    return block


def set_current(block):
    """Make code which the current context is copied for inside `block`."""
    inherited.set(_Storage(_thread.get_ident(), block))


def claim():
    """
    Correct the context before it's copied for synchronous code: in a context
    that tasks share, another task may have opened or left a block.
    """
    storage = inherited.get(None)
    if storage is not None:
        block = current()
        if block is not storage.data:
            set_current(block)


def chain(block):
    while block is not None:
        yield block
        block = block.parent


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
    Return the decision of the first table. `moved` tells whether asgiref
    brought the execution to its thread, `runs_loop()` whether the thread that
    entered the block runs an event loop: a function, since it's costly.
    """
    if strict:
        return REFUSE if ended else JOIN
    if ended:
        return OUTER
    if same_thread or moved or runs_loop():
        return JOIN
    return OWN


_LOOP_CODE = {
    asyncio.BaseEventLoop.run_forever.__code__,
    asyncio.Runner.run.__code__,
}


def runs_loop(thread_ident):
    """
    Return whether a thread runs an event loop. Since a thread that does can't
    enter atomic(), the loop was started inside of it.
    """
    frame = sys._current_frames().get(thread_ident)
    while frame is not None:
        if frame.f_code in _LOOP_CODE:
            return True
        frame = frame.f_back
    return False


def _find(matches, refuse=True):
    """
    Return the innermost block that `matches` and that the execution joins, or
    None if it uses its own connection. Raise if it's to `refuse`.
    """
    block = current()
    if block is None:
        return None
    here = _thread.get_ident()
    home = inherited.get().thread_id
    for block in chain(block):
        if not matches(block):
            continue
        decision = decide(
            strict=block.strict,
            ended=block.ended,
            same_thread=block.thread_ident == here,
            # Context that was copied by hand still has the tag of the thread
            # which entered the block.
            moved=home == here or home != block.thread_ident,
            runs_loop=lambda: runs_loop(block.thread_ident),
        )
        if decision is REFUSE and refuse:
            raise _outlived(block)
        if decision is not OUTER:
            return block if decision is JOIN else None
    return None


def connection_for(alias):
    """
    Return the connection of the block that the current execution joins, or
    None if it uses its own.

    Raise TransactionManagementError if it outlived the block.
    """
    block = _find(lambda block: block.alias == alias)
    if block is None:
        return None
    connection = block.connection
    here = _thread.get_ident()
    if connection._thread_ident == here:
        return None
    if connection.turn is None and block.thread_ident != here:
        share(connection)
    return connection


def open_block(alias):
    """
    Return the block that a block which the current execution opens would be
    nested in, or None. Who has outlived a block may open one of its own.
    """
    return _find(lambda block: block.alias == alias, refuse=False)


def _joined(connection):
    """Return the block on `connection` that the execution joins, or None."""
    block = _find(
        lambda block: (
            block.connection is connection
            # A transaction about to begin isn't inside of an earlier one.
            and (block.entered or block.thread is not None)
        )
    )
    return block if block is not None and block.entered else None


def admits(connection):
    """
    Return whether the current execution may use a connection that isn't bound
    to its thread. Wait for its turn to do so.

    Raise TransactionManagementError as taking_turn() does.
    """
    if connection.turn is None:
        return _joined(connection) is not None
    with taking_turn(connection):
        return True


# ##### Turns #####


def share(connection, lent=False):
    """Let executions take turns on `connection` until its blocks are left."""
    with _sharing:
        if connection.turn is None:
            connection.turn = Turn()
            connection.execute_wrappers.insert(0, _statement)
        if lent:
            # Bound to no thread, so that its own one is checked as well.
            connection.lent_by = connection._thread_ident
            connection._thread_ident = None


def unshare(connection):
    """Undo share(). Blocks that are still open end."""
    while connection.blocks:
        connection.blocks.pop().ended = True
    with _sharing:
        turn, connection.turn = connection.turn, None
        connection.execute_wrappers.remove(_statement)
        if connection.lent_by is not None:
            connection._thread_ident = connection.lent_by
            connection.lent_by = None
    turn.changed()


def _statement(execute, sql, params, many, context):
    connection, cursor = context["connection"], context["cursor"]
    with taking_turn(connection):
        result = execute(sql, params, many, context)
        if connection.vendor == "sqlite" and _is_in_progress(cursor, sql):
            _keep_turn(connection.turn, cursor)
        return result


def _is_in_progress(cursor, sql):
    """
    Return whether a statement goes on writing while its rows are fetched. On
    SQLite, no other can begin or release a savepoint meanwhile.
    """
    return cursor.cursor.description and sql.lstrip()[:6].upper() in (
        "INSERT",
        "UPDATE",
        "DELETE",
    )


def _keep_turn(turn, cursor):
    """Hold the turn, which has been taken, until `cursor` is closed."""
    turn.take(_thread.get_ident(), lambda: True, 0)
    give = weakref.finalize(cursor, turn.give)
    give.atexit = False
    close = cursor.cursor.close

    def close_and_give():
        close()
        give()

    cursor.close = close_and_give


def _top(connection):
    return connection.blocks[-1] if connection.blocks else None


@contextmanager
def taking_turn(connection, leaving=False):
    """
    Hold the turn on a shared connection, after waiting for it in this thread.
    To be `leaving` a block, it needn't be on top of the stack.

    Raise TransactionManagementError if the execution outlived its block, if
    it's foreign to the transaction that the connection was made for, if the
    turn didn't come, or if waiting for it would occupy the thread that has to
    run the nested block.
    """
    turn = connection.turn
    here = _thread.get_ident()
    block = _joined(connection)
    if block is None and connection.blocks and connection.lent_by is None:
        if connection._thread_ident is None:
            raise _foreign(connection)
        # Threads that share a connection by other means stay unprotected.
        block = connection.blocks[-1]
    waiter_class = getattr(working, "waiter_class", ThreadWaiter)

    def occupies(top):
        return (
            waiter_class is ThreadWaiter
            and top is not None
            and top.thread_ident == here
        )

    def ready():
        top = _top(connection)
        ended = block is not None and block.ended
        return top is block or leaving or ended or occupies(top)

    if not turn.take(here, ready, TURN_TIMEOUT, waiter_class):
        raise waited_in_vain(connection)
    try:
        if block is not None and block.ended:
            raise _outlived(block)
        if turn.depth == 1 and not leaving and _top(connection) is not block:
            raise _waits_for_itself(connection)
        yield
    finally:
        turn.give()


def _out_of_turn():
    """
    Return a block that the current execution is inside of, while another one
    nested in it is open, or None.
    """
    seen = set()
    for block in chain(current()):
        if not block.entered or block.connection in seen:
            continue
        seen.add(block.connection)
        if block.connection.turn and not block.ended:
            if _top(block.connection) is not block:
                return block
    return None


async def its_turn(deadline):
    """
    Wait on the event loop until no block nested in those that the current
    task is inside of is open, or until `deadline`, on the loop's clock. Return
    whether that's so.
    """
    loop = asyncio.get_running_loop()
    while (block := _out_of_turn()) is not None:
        turn = block.connection.turn

        def ready():
            return block.ended or _top(block.connection) is block

        if turn and not await turn.comes(ready, deadline - loop.time()):
            return False
    return True


def in_turn(func):
    """
    Return a function for a thread to call: it returns `(True, func())`, or
    `(False, None)` if another block was entered since its_turn() was awaited.
    """

    def inner():
        if _out_of_turn() is not None:
            return False, None
        return True, func()

    return inner


# ##### Entering and leaving #####


def opens_block(get_connection):
    """Decorate Atomic.__enter__()."""

    def decorator(enter):
        @wraps(enter)
        def __enter__(self):
            connection = get_connection(self.using)
            if connection.turn is None:
                enter(self)
                _push(connection, self)
            else:
                with taking_turn(connection):
                    enter(self)
                    _push(connection, self)

        return __enter__

    return decorator


def _push(connection, atomic):
    # An aatomic() has made its block before it got to a thread.
    block = current()
    if block is None or block.entered or block.atomic is not atomic:
        block = Block(connection.alias, connection, atomic)
        set_current(block)
    block.thread_ident = _thread.get_ident()
    block.depth = len(connection.savepoint_ids)
    block.entered = True
    connection.blocks.append(block)


def closes_block(get_connection):
    """Decorate Atomic.__exit__()."""

    def decorator(exit):
        @wraps(exit)
        def __exit__(self, exc_type, exc_value, traceback):
            block = current()
            if block is None or block.atomic is not self:
                # Left in another context than it was entered in.
                block = None
            elif block.ended:
                restore(block)
                if exc_type is None:
                    raise rolled_back(block)
                return
            connection = get_connection(self.using)
            if connection.turn is None:
                try:
                    exit(self, exc_type, exc_value, traceback)
                finally:
                    _pop(connection, self)
                return
            # What on_commit() registered may run in other threads, and must
            # not find the turn taken. aatomic() calls it by itself.
            due = []
            connection.run_and_clear_commit_hooks = lambda: due.append(True)
            try:
                with taking_turn(connection, leaving=True):
                    _abandon_nested(connection, block, exit)
                    try:
                        exit(self, exc_type, exc_value, traceback)
                    finally:
                        _pop(connection, self)
            finally:
                del connection.run_and_clear_commit_hooks
            if due and block is not None and block.task is not None:
                block.hooks_due = True
            elif due:
                connection.run_and_clear_commit_hooks()

        return __exit__

    return decorator


def _abandon_nested(connection, block, exit):
    """
    Roll back the blocks which are still open inside `block`: what they did so
    far must not be committed without the rest.
    """
    if block not in connection.blocks:
        return
    while (nested := connection.blocks[-1]) is not block:
        nested.ended = True
        exit(nested.atomic, Exception, None, None)
        connection.blocks.pop()


def _pop(connection, atomic):
    if not connection.blocks or connection.blocks[-1].atomic is not atomic:
        # The connection was made anew inside the block.
        return
    block = connection.blocks.pop()
    block.ended = True
    restore(block)
    if connection.turn is None:
        return
    if (top := _top(connection)) is not None and top.failure is not None:
        connection.needs_rollback = True
        connection.rollback_exc = top.failure
    if connection.blocks or connection._thread_ident is None:
        connection.turn.changed()
    else:
        unshare(connection)


def forget_blocks(connection):
    """Drop the blocks that a connection was closed in, when it's opened."""
    while connection.blocks and connection.blocks[-1].atomic is not None:
        connection.blocks.pop().ended = True


def mark_for_rollback(connection, exc):
    """
    Mark the innermost block that the current execution is inside of for
    rollback, because of an exception in it.
    """
    if getattr(exc, "was_refused", False):
        # Nothing was sent.
        return
    block = None if connection.turn is None else _joined(connection)
    if block is None or block is _top(connection):
        connection.needs_rollback = True
        connection.rollback_exc = exc
    else:
        # The mark on the connection is for the nested block, of another task.
        block.failure = exc


def savepoint_ids(connection):
    """
    Return the set of the savepoints which the current execution is inside of.
    """
    block = None if connection.turn is None else _joined(connection)
    return set(connection.savepoint_ids[: block and block.depth])


def begin(block):
    """Let the current context be inside `block`, which has been entered."""
    block.outer = inherited.get(None)
    set_current(block)


def restore(block):
    """Give the current context what it held before `block`, if it's there."""
    storage = inherited.get(None)
    if storage is None or storage.data is not block:
        return
    outer = block.outer
    if block.task is not None:
        # In a context that tasks share, `outer` may be another task's block.
        around = set(chain(block.parent))
        while (
            outer is not None
            and outer.data is not None
            and outer.data.ended
            and outer.data not in around
        ):
            outer = outer.data.outer
    set_current(outer and outer.data)


def retire(connection, block):
    """
    Bind a connection made for `block`, which has ended, to the current thread,
    and keep it from being opened once it's closed.
    """

    def connect():
        raise _outlived(block)

    connection.connect = connect
    connection._thread_ident = _thread.get_ident()


# ##### Refusals #####


def error(message):
    # It imports this module.
    from django.db.transaction import TransactionManagementError

    exc = TransactionManagementError(message)
    exc.was_refused = True
    return exc


def _outlived(block):
    return error(
        f"{execution_name()} can't use the database '{block.alias}' any more, "
        f"because the aatomic() block that it was started in, opened by {block}, "
        "has ended. Await it inside the block, leave what has to follow the "
        "commit to on_commit(), or open a block of its own or new_connection()."
    )


def rolled_back(block):
    return error(
        f"The block that {block} opened on the database '{block.alias}' was rolled "
        "back, because a block around it ended first. Await what opens a block "
        "before leaving the block around it."
    )


def _foreign(connection):
    return error(
        f"{execution_name()} can't use this connection to the database "
        f"'{connection.alias}', because it belongs to a transaction opened by "
        f"{connection.blocks[0]}. Use django.db.connections instead of passing "
        "connections around."
    )


def waited_in_vain(connection):
    return error(
        f"{execution_name()} waited {TURN_TIMEOUT} seconds for the block that "
        f"{_top(connection)} opened on the database '{connection.alias}' to end. "
        "If that block waits for it in turn, neither can go on: start it inside "
        "the block, or await it before the block."
    )


def _waits_for_itself(connection):
    return error(
        f"{execution_name()} can't use the database '{connection.alias}' while the "
        f"block that {_top(connection)} opened is open, because that block needs "
        "the thread it would wait in. Await it before or after the block, or call "
        "asynchronous methods, which wait on the event loop."
    )
