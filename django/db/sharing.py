"""
How executions inside the same blocks share one connection.

A connection keeps its open blocks in a stack, connection.blocks. As soon as a
second execution could use it, it also gets a Turn, connection.turn. From then
on every execute(), executemany() and fetch, every entry into a block and every
exit from one holds the turn. The execution has to be inside the block on top
of the stack for that (see django.db.belonging):

================================================== ===========================
the top of the stack                               the execution
================================================== ===========================
is its block, and nobody has the turn              runs
is its block, and somebody has the turn            waits
is nested in its block, entered in another thread  waits
is nested in its block, entered in this thread     waits, and meanwhile runs
                                                   what is queued, if it's in
                                                   a TransactionThread;
                                                   else is refused
================================================== ===========================

If nobody gets on for TURN_TIMEOUT seconds, those who wait are refused with a
TransactionManagementError (see django.db.turns). No wait blocks an event loop:
its_turn() is awaited before a thread is asked to run synchronous code, and
code in the bridge (see django.db.bridge) is suspended.

A connection made for a block is bound to no thread, and retired at the end. A
database with a single connection, an in-memory SQLite database, lends it to a
transaction: its thread's other work waits until the stack is empty.
"""

import _thread
import asyncio
import re
import threading
import weakref
from contextlib import suppress
from functools import partial, wraps

from asgiref.sync import SyncToAsync

from django.db import belonging, bridge
from django.db.turns import ThreadWaiter, Turn
from django.db.utils import DEFAULT_DB_ALIAS
from django.utils.regex_helper import _lazy_re_compile

# Seconds after which waiting for a turn is given up as a deadlock.
TURN_TIMEOUT = 30

# What a statement for SQLite that begins with WITH contains if it writes.
MAY_WRITE = _lazy_re_compile(r"\b(INSERT|REPLACE|UPDATE|DELETE)\b", re.IGNORECASE)

_sharing = threading.Lock()

# What asgiref keeps for a thread in which sync_to_async() has run a function.
_of_asgiref = SyncToAsync.threadlocal


def connection_for(alias, block):
    """
    Return the connection of the block that the current execution joins, or
    None if it uses its own. `block` is the one in its context.

    Raise TransactionManagementError if it outlived the block.
    """
    here = _thread.get_ident()
    if (
        block.alias == alias
        and not (block.strict or block.ended)
        and block.connection._thread_ident == here
        and asyncio._get_running_loop() is None
    ):
        # What's usual in synchronous code, and would be found below.
        return None
    block = belonging.block_for(alias)
    if block is None:
        return None
    connection = block.connection
    if connection._thread_ident == here and asyncio._get_running_loop() is None:
        # It's the thread's own, unless another one was assigned there.
        return None
    if connection.turn is None and block.thread_ident != here and not block.ended:
        share(connection)
    return connection


def admits(connection):
    """
    Return whether the current execution may use a connection that isn't bound
    to its thread. Wait for its turn to do so.

    Raise TransactionManagementError as taking_turn() does.
    """
    turn, bridged = connection.turn, bridge.current()
    if turn is None:
        return belonging.joined(connection) is not None
    if bridged is not None and turn.is_held_by(bridged.task):
        return True
    if connection.serves_scope and bridged is None:
        # It's shared by tasks of native mode, and not with other threads,
        # unless they work inside a block of theirs.
        if belonging.joined(connection) is None:
            return False
    with taking_turn(connection):
        return True


def share(connection, lent=False):
    """Let executions take turns on `connection`."""
    with _sharing:
        if connection.turn is None:
            connection.turn = Turn()
        if lent:
            # Bound to no thread, so that its own one is checked as well.
            connection.lent_by = connection._thread_ident
            connection._thread_ident = None


def unshare(connection):
    """Undo share(). Blocks that are still open are abandoned."""
    with _sharing:
        while connection.blocks:
            block = connection.blocks.pop()
            block.ended = block.abandoned = True
        turn, connection.turn = connection.turn, None
        if connection.lent_by is not None:
            connection._thread_ident = connection.lent_by
            connection.lent_by = None
    if turn is not None:
        turn.changed()


def is_awaited(connection):
    """
    Return whether there are blocks open on a connection of this thread, which
    waits in async_to_sync(). A function that it runs meanwhile, for
    asynchronous code, doesn't close the connection along with others.
    """
    return bool(connection.blocks) and belonging.is_running(
        _thread.get_ident(), {belonging.ASYNC_TO_SYNC_CODE}
    )


def retire(connection, block):
    """
    Refuse what a connection made for `block`, which has ended, is still asked
    for. Bind it to the current thread, which may close it.
    """

    # Not the block: it refers to the connection.
    alias, opener = block.alias, str(block)

    def refuse(*args):
        raise belonging.outlived(alias, opener)

    unshare(connection)
    # Tracebacks lead to contexts. What asgiref keeps for the block as long as
    # one of these holds it would never be freed.
    connection.rollback_exc = block.failure = None
    connection.connect = refuse
    connection.execute_wrappers = [refuse]
    connection._thread_ident = _thread.get_ident()


# ##### Turns #####


class taking_turn:
    """
    Hold the turn on a shared connection, after waiting for it in this thread.
    To be `leaving` a block, it needn't be on top of the stack. If it's done
    for a `block`, the current execution needn't be inside of it.

    Raise TransactionManagementError if the execution outlived its block, if
    it's foreign to the transaction that the connection was made for, if the
    turn didn't come, or if waiting for it would occupy the thread that has to
    run the nested block.
    """

    # Every statement does this a few times, so it isn't a generator.
    __slots__ = ("_connection", "_leaving", "_block", "_turn")

    def __init__(self, connection, leaving=False, block=None):
        self._connection = connection
        self._leaving = leaving
        self._block = block

    def __enter__(self):
        self._turn = _take_turn(self._connection, self._leaving, self._block)

    def __exit__(self, *exc_info):
        if self._turn is not None:
            self._turn.give()


def _take_turn(connection, leaving, block):
    """Return the turn that was taken, or None if the blocks have ended."""
    turn = connection.turn
    if (bridged := bridge.current()) is not None:
        # Suspended code must not refer to its task.
        holder, waiter_class, call = bridged.task, bridge.TurnWaiter, None
        if turn is not None and turn.take_again(holder):
            # What's checked below holds for as long as the task has the turn.
            return turn
    else:
        holder = _thread.get_ident()
        waiter_class = getattr(belonging.working, "waiter_class", ThreadWaiter)
        call = getattr(belonging.working, "call", None)
    if block is None and (connection.blocks or not connection.serves_scope):
        block = belonging.joined(connection)
    if turn is None:
        # The blocks have just ended.
        return None
    if (
        block is None
        and connection.blocks
        and connection.lent_by is None
        and not connection.serves_scope
    ):
        if connection._thread_ident is None:
            raise belonging.foreign(connection)
        # Threads that share a connection by other means stay unprotected.
        block = connection.blocks[-1]
    occupied = holder if waiter_class is ThreadWaiter else None
    ready = partial(_is_ready, connection, turn, block, leaving, occupied)

    if turn.needs_thread and waiter_class is ThreadWaiter and not leaving:
        raise belonging.waits_for_copy(connection)

    # Whoever leaves doesn't wait for a statement that may never end, such as
    # one on a half-open socket.
    if not turn.take(holder, ready, TURN_TIMEOUT, waiter_class, not leaving):
        raise belonging.waited_in_vain(connection, TURN_TIMEOUT, block)
    if connection.turn is not turn:
        # Threads that share the connection by other means: its blocks have
        # ended, and others may have been entered.
        turn.give()
        return _take_turn(connection, leaving, None)
    try:
        if block is not None and block.ended:
            raise belonging.outlived(block.alias, block)
        if turn.depth == 1:
            if turn.cancelled is not None:
                count, ended = turn.cancelled
                # It's this turn if cancelling began since it was taken, and
                # ends when it's given back.
                if count != turn.count:
                    _wait_for_cancellation(ended)
                    turn.cancelled = None
            if not leaving:
                _check(connection, block, call)
                if call is not None and block is not None:
                    call.turns[block] = turn.count
        if waiter_class is not bridge.TurnWaiter:
            turn.threads.add(holder)
    except BaseException:
        turn.give()
        raise
    return turn


def _is_ready(connection, turn, block, leaving, occupied):
    """
    Return whether waiting for a turn may end. `occupied` is the thread that it
    occupies, or None.
    """
    top = _top(connection)
    return (
        top is block
        or leaving
        or (block is not None and block.ended)
        or connection.turn is not turn
        or (occupied is not None and top is not None and top.thread_ident == occupied)
    )


def connects_in_turn(connect):
    """
    Decorate the method that connects: tasks which share a connection wait for
    the one that opens it.
    """

    @wraps(connect)
    def inner(connection):
        if connection._thread_ident is not None:
            return connect(connection)
        if vars(connection).pop("has_inherited", False):
            # So that its class forgets what it has set on a session.
            connection.close()
        if not connection.serves_scope or connection.turn is None:
            return _connect_or_close(connect, connection)
        with taking_turn(connection):
            if connection.connection is None:
                _connect_or_close(connect, connection)
                if bridge.current() is not None:
                    # It imports this module.
                    from django.db import native

                    native.join(connection)

    return inner


def _connect_or_close(connect, connection):
    try:
        connect(connection)
    except BaseException:
        # It would be used without what has to be set on it before.
        connection.close()
        raise


def _wait_for_cancellation(done):
    if bridge.current() is None:
        done.wait()
        return
    while not done.is_set():
        bridge.await_(asyncio.sleep(0.01))


def _check(connection, block, call):
    if _top(connection) is not block:
        raise belonging.waits_for_itself(connection)
    if call is not None and call.abandoned:
        raise belonging.call_abandoned(connection.alias)
    while block is not None:
        # Who has outlived it may be in a block that was opened since.
        if block.leaving and not block.ended and block.connection is connection:
            raise belonging.outlived(block.alias, block)
        block = block.parent


def _top(connection):
    top = connection.blocks[-1:]
    return top[0] if top else None


def execute_in_turn(execute, sql, params, many, context):
    """Execute in turn. It's called around the execute wrappers."""
    connection, cursor = context["connection"], context["cursor"]
    if connection.vendor == "mysql" and "close" not in vars(cursor):
        cursor.close = _closing_in_turn(connection, cursor.cursor.close)
    with taking_turn(connection):
        turn = connection.turn
        if turn is not None:
            turn.works = sql
        try:
            result = execute(sql, params, many, context)
        except asyncio.CancelledError:
            if (block := belonging.joined(connection)) is not None:
                note_cancellation(block)
            if _is_server_side(cursor.cursor, connection):
                with suppress(connection.Database.Error), bridge.shielded():
                    cursor.close()
            raise
        finally:
            if turn is not None:
                turn.works = None
                turn.finished += 1
        server_side = _is_server_side(cursor.cursor, connection)
        if server_side and "close" not in vars(cursor):
            cursor.close = _closing_server_side(connection, cursor.cursor)
        if connection.turn is None:
            return result
        if connection.serves_scope and not server_side:
            # The driver has all of its rows, and no block's end to check.
            return result
        for name in ("fetchone", "fetchmany", "fetchall"):
            if name not in vars(cursor):
                fetch = _in_turn(connection, getattr(cursor, name), sql)
                setattr(cursor, name, fetch)
        if connection.vendor == "sqlite" and _is_in_progress(cursor, sql):
            _keep_turn(connection.turn, cursor)
        return result


def note_cancellation(block):
    """Note that a query was cancelled inside of it."""
    block.cancelled = True
    mark_block_for_rollback(block, belonging.swallowed(block))


def _in_turn(connection, fetch, sql):
    def inner(*args, **kwargs):
        with taking_turn(connection):
            turn = connection.turn
            if turn is not None:
                turn.works = sql
            try:
                return fetch(*args, **kwargs)
            except asyncio.CancelledError:
                if (block := belonging.joined(connection)) is not None:
                    note_cancellation(block)
                raise
            finally:
                if turn is not None:
                    turn.works = None

    return inner


def _is_server_side(cursor, connection):
    server_side = getattr(connection.Database, "ServerCursor", None)
    return server_side is not None and isinstance(cursor, server_side)


def _closing_server_side(connection, cursor):
    """
    Return a function for the `close` of a server-side cursor, which sends a
    statement. Anybody may call it: an event loop closes generators that were
    abandoned in tasks of its own.
    """
    # When it has ended, the cursor may be gone, and closing it would make the
    # transaction around it fail.
    block = _top(connection)

    def close():
        from django.db import Error

        gone = cursor.closed or (block is not None and block.ended)
        if not gone and _may_wait(connection):
            # Nobody else would return the connection to its pool.
            with (
                bridge.shielded(),
                suppress(Error),
                taking_turn(connection, leaving=True, block=block),
            ):
                cursor.close()
                if connection.is_native:
                    from django.db import native

                    native.join(connection)
        # It remains on the server until its transaction or session ends.
        connection.Database.Cursor.close(cursor)

    return close


def _may_wait(connection):
    """
    Return False for asynchronous code, as when it drops the last reference to
    a generator: it would block tasks that the connection waits for.
    """
    return (
        not connection.is_native
        or asyncio._get_running_loop() is None
        or bridge.current() is not None
    )


def _closing_in_turn(connection, close):
    """
    Return a function for `cursor.close` where closing a cursor asks the
    connection for further results, which somebody else's statement may have.
    """
    from django.db.utils import Error

    def inner():
        with suppress(Error), connection.wrap_database_errors:
            with taking_turn(connection, leaving=True):
                close()

    return inner


def _is_in_progress(cursor, sql):
    """
    Return whether a statement may go on writing while its rows are fetched. On
    SQLite, no other can begin or release a savepoint meanwhile.
    """
    return cursor.cursor.description and not _only_reads(sql)


def _only_reads(sql):
    """Return whether a statement for SQLite is sure not to write."""
    verb = sql.lstrip()[:6].upper()
    return verb in ("SELECT", "PRAGMA", "EXPLAI") or (
        verb[:4] == "WITH" and not MAY_WRITE.search(sql)
    )


def may_be_writing(connection):
    """Return whether executions that share SQLite's connection may write."""
    turn = connection.turn
    return turn is not None and not (turn.works and _only_reads(turn.works))


def _keep_turn(turn, cursor):
    """Hold the turn, which has been taken, until `cursor` is closed."""
    if "close" in vars(cursor):
        # It still holds the turn for an earlier statement, or is closed.
        return
    turn.take(_thread.get_ident(), lambda: True, 0)
    # In another thread, since the garbage collector may call it anywhere, also
    # while this one holds the lock of the turn.
    forgotten = weakref.finalize(cursor, _thread.start_new_thread, turn.give, ())
    forgotten.atexit = False
    close = cursor.cursor.close

    def close_and_give():
        close()
        if forgotten.detach() is not None:
            turn.give()

    cursor.close = close_and_give


def hold_turn(connection, holder):
    """
    Go on holding the turn, which has been taken, and return a function that
    gives it back. `holder` has it meanwhile, or in the bridge, the task.
    """
    turn = connection.turn
    if turn is None:
        return lambda: None
    if (bridged := bridge.current()) is None:
        turn.needs_thread = True
    else:
        holder = bridged.task
    turn.pass_on(holder)

    def give():
        turn.needs_thread = False
        turn.give()

    return give


def _out_of_turn(block):
    """
    Return a block, `block` or one around it, while another one nested in it is
    open, or None. For each alias, it's the innermost one that counts.
    """
    seen = set()
    for block in belonging.chain(block):
        if not block.entered or block.alias in seen:
            continue
        if block.strict or not block.ended:
            seen.add(block.alias)
        if block.connection.turn and not block.ended:
            if _top(block.connection) is not block:
                return block
    return None


async def its_turn(block=None):
    """
    Wait on the event loop until no block nested in those that the current
    task is inside of, or is about to enter `block` inside of, is open. Return
    False if that was given up.
    """
    while (outer := _out_of_turn(block or belonging.current())) is not None:
        turn = outer.connection.turn

        def ready():
            return outer.ended or _top(outer.connection) is outer

        if turn and not await turn.comes(ready, TURN_TIMEOUT):
            return False
    return True


def in_turn(func):
    """
    Return a function for a thread to call: it returns `(True, func())`, or
    `(False, None)` if another block was entered since its_turn() was awaited.
    """

    def inner():
        if _out_of_turn(belonging.current()) is not None:
            return False, None
        return True, func()

    return inner


# ##### Entering and leaving #####


def opens_block(get_connection):
    """Decorate Atomic.__enter__(), and give it the connection."""

    def decorator(enter):
        @wraps(enter)
        def __enter__(self):
            block = belonging.current()
            if block is not None:
                outside = belonging.outside(self.using or DEFAULT_DB_ALIAS, block)
                if outside is not block:
                    _enter_after_the_end(partial(__enter__, self), block, outside)
                    return
            connection = get_connection(self.using)
            if connection.turn is None:
                enter(self, connection)
                _push(connection, self, block)
            else:
                _enter_in_turn(enter, self, connection, block)

        return __enter__

    return decorator


def _enter_in_turn(enter, atomic, connection, block):
    with taking_turn(connection):
        if bridge.current() is not None and not connection.in_atomic_block:
            # This may take long, and be cancelled.
            connection.ensure_connection()
        try:
            with bridge.shielded():
                enter(atomic, connection)
                _push(connection, atomic, block)
        except asyncio.CancelledError as exc:
            # Nothing was entered if it failed, too.
            entered = belonging.current()
            entered_this = entered is not None and entered.atomic is atomic
            if entered_this and not entered.strict:
                with bridge.shielded():
                    atomic.__exit__(type(exc), exc, None)
            raise


def _enter_after_the_end(enter, block, outside):
    """
    Let an execution inside `block` that outlived it, or a block around it,
    enter one `outside` of these.
    """

    def enter_outside():
        enter()
        return belonging.current()

    entered = belonging.call_for(outside, enter_outside)
    # So that it's refused again afterwards.
    entered.parent = block
    belonging.begin(entered)


def _push(connection, atomic, block):
    # An aatomic() has made its block before it got to a thread.
    if block is None or block.entered or block.atomic is not atomic:
        task = None
        if bridge.greenlet is not None and bridge.current() is not None:
            task = belonging.running_task()
        alias = connection.alias
        # By position, which is quicker.
        block = belonging.Block(alias, connection, atomic, block, False, task)
        if task is None:
            # getattr() would take a multiple of the time.
            if "task_context" in _of_asgiref.__dict__:
                block.call = belonging.current_call()
            belonging.set_current(block)
        else:
            block.title = belonging.execution_name()
            belonging.begin(block)
    block.thread_ident = _thread.get_ident()
    block.depth = len(connection.savepoint_ids)
    block.entered = True
    connection.blocks.append(block)


def closes_block(get_connection):
    """Decorate Atomic.__exit__(), and give it the connection."""

    def decorator(exit):
        @wraps(exit)
        def __exit__(self, exc_type, exc_value, traceback):
            block = belonging.current()
            if block is None or block.atomic is not self:
                # Left in another context than it was entered in.
                block = None
            elif block.abandoned:
                _restore(block)
                if exc_type is None:
                    raise belonging.rolled_back(block)
                return
            elif block.cancelled and exc_type is None:
                exc_value = belonging.swallowed(block)
                # Before whoever leaves the block around it looks there.
                passed_on = pass_on_cancellation(block)
                __exit__(self, type(exc_value), exc_value, None)
                if not passed_on:
                    raise exc_value
                return
            if block is None or block.ended or block.connection.turn is not None:
                connection = get_connection(self.using)
            else:
                # Nobody shares it. To look for it would take its time.
                connection = block.connection
            if connection.turn is None:
                try:
                    exit(self, connection, exc_type, exc_value, traceback)
                finally:
                    _pop(connection)
                return
            hooks_due = []
            try:
                # In the bridge, a cancellation comes after it.
                with taking_turn(connection, leaving=True), bridge.shielded():
                    _abandon_nested(connection, block, exit)
                    # Functions given to on_commit() may need other threads,
                    # which need the turn. So they're called after it was given
                    # back.
                    connection.run_and_clear_commit_hooks = lambda: hooks_due.append(
                        True
                    )
                    try:
                        exit(self, connection, exc_type, exc_value, traceback)
                    finally:
                        del connection.run_and_clear_commit_hooks
                        _pop(connection)
            finally:
                if hooks_due and block is not None and block.strict:
                    # By aatomic(), in the task that leaves the block.
                    block.hooks_due = True
                elif hooks_due:
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
        nested.ended = nested.abandoned = True
        exit(nested.atomic, connection, Exception, None, None)
        connection.blocks.pop()


def abandon_nested(connection, block):
    """Do so in turn, and without an Atomic for `block`."""
    # It imports this module.
    from django.db.transaction import Atomic

    with taking_turn(connection, leaving=True):
        _abandon_nested(connection, block, Atomic.__exit__.__wrapped__)


def _restore(block):
    if block.task is None or block.strict:
        belonging.restore(block)
    else:
        # Synchronous code in the bridge has opened it.
        belonging.end(block)


def _pop(connection):
    if not connection.blocks:
        # The connection was made anew inside the block.
        return
    # Blocks left out of order take each other's place, as savepoints do.
    block = connection.blocks.pop()
    block.ended = True
    if block.task is None:
        belonging.restore(block)
    else:
        _restore(block)
    if connection.turn is None:
        return
    if (top := _top(connection)) is not None and top.failure is not None:
        _mark_connection(connection, top.failure)
    if connection.blocks or connection._thread_ident is None:
        connection.turn.changed()
    else:
        unshare(connection)


def note_autocommit(connection):
    """
    Open a block when synchronous code begins to manage transactions manually,
    and close it when that ends.
    """
    if connection.autocommit:
        if len(connection.blocks) == 1 and connection.blocks[0].by_hand:
            _pop(connection)
    elif (
        not connection.blocks
        and connection._thread_ident is not None
        and connection.settings_dict["AUTOCOMMIT"]
    ):
        _push(connection, None, belonging.current())
        connection.blocks[0].by_hand = True


def forget_blocks(connection):
    """
    Drop the blocks that a connection was closed in, when it's opened. Strict
    ones are left by whoever has entered them.
    """
    while connection.blocks and not connection.blocks[-1].strict:
        connection.blocks.pop().ended = True


def mark_for_rollback(connection, exc):
    """
    Mark the innermost block that the current execution is inside of for
    rollback, because of an exception in it.
    """
    if getattr(exc, "was_refused", False):
        return
    if connection.turn is None:
        _mark_connection(connection, exc)
        return
    with _sharing:
        block = belonging.joined(connection)
        if block is None:
            _mark_connection(connection, exc)
        else:
            _mark_block(block, exc)


def begin_rollback(block):
    """
    Note that a block is being left by an exception. It isn't marked any more:
    abandoned code may fail, and be noted, after the mark on the connection was
    reset, which would be for the block around then.
    """
    with _sharing:
        block.leaving = True


def _mark_connection(connection, exc):
    connection.needs_rollback = True
    connection.rollback_exc = exc


def mark_block_for_rollback(block, exc):
    with _sharing:
        _mark_block(block, exc)


def _mark_block(block, exc):
    if block.leaving or block.ended:
        return
    if block is _top(block.connection):
        _mark_connection(block.connection, exc)
    else:
        # The mark on the connection is for the block nested in it.
        block.failure = exc


def pass_on_cancellation(block):
    """
    Note on the block around `block` that a query was cancelled inside. Return
    False if there's none but those of a TestCase.
    """
    for outer in belonging.chain(block.parent):
        if outer.ended or outer.atomic is None:
            # Who has outlived one may have opened `block`.
            continue
        if outer.connection is block.connection:
            outer.cancelled = not outer.atomic._from_testcase
            return outer.cancelled
    return False


def _lower_block(connection):
    """
    Return the block that the current execution is inside of, if one nested in
    it, opened by somebody else, is open.
    """
    block = None if connection.turn is None else belonging.joined(connection)
    return None if block is _top(connection) else block


def get_rollback(connection):
    block = _lower_block(connection)
    return connection.needs_rollback if block is None else block.failure is not None


def set_rollback(connection, rollback):
    block = _lower_block(connection)
    if block is None:
        connection.needs_rollback = rollback
    else:
        block.failure = Exception("set_rollback(True)") if rollback else None


def savepoint_ids(connection):
    """
    Return the set of the savepoints which the current execution is inside of.
    """
    if connection.turn is None or (block := belonging.joined(connection)) is None:
        return set(connection.savepoint_ids)
    return set(connection.savepoint_ids[: block.depth])
