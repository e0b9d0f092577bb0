"""
Asynchronous code that waits for its databases on the event loop.

This is the way of the databases with ASYNC_NATIVE. run() calls synchronous
code in the bridge (see django.db.bridge): that's an operation. If the task
isn't inside a block, the operation leases a connection when it's first asked
for, until it ends:

* Without a pool, all tasks of a scope (see django.db.scopes) lease the same
  one, and take turns with statements and blocks. While no operation and no
  cursor uses it, a transaction may have its session.
* With a pool, each task has a wrapper of its own, and each operation gets a
  connection from the pool and returns it.

A connection on which a server-side cursor is open stays leased.

If an event loop is closed and its coroutines aren't destroyed, nobody ends
their leases. So the next event loop does that before its first one.
"""

import asyncio
import socket
import sys
import threading
import weakref
from _thread import get_ident
from contextlib import suppress
from contextvars import ContextVar
from functools import cache, partial

from django.core.exceptions import ImproperlyConfigured
from django.db import async_atomic, belonging, bridge, connections, scopes, sharing
from django.db.backends.signals import connection_created
from django.db.utils import Error

# What all wrappers have, and tasks inherit along with attributes that are only
# set by users. They log to one log.
INHERITED_ATTRIBUTES = ["force_debug_cursor", "queries_log"]

# What the wrappers here have besides.
PRIVATE_ATTRIBUTES = ["cursors", "has_inherited", "lease_count", "rests"]

# The aliases that have been checked on each event loop.
_checked = weakref.WeakKeyDictionary()

# Leases that tasks of each event loop haven't ended, by what they lease.
_leases = weakref.WeakKeyDictionary()

# The leases of each task's operation, by alias.
_operations = weakref.WeakKeyDictionary()

# The TaskWrappers of each task, by alias, and those that tasks which it starts
# inherit from.
_wrappers = weakref.WeakKeyDictionary()
_inherited = ContextVar("django.db.native", default=None)
bridge.confined_variables.append(_inherited)


async def run(func, block=None, shielded=False):
    """
    Call a synchronous function in the bridge and return its result. If it's
    `shielded`, it's not interrupted by a cancellation.

    If there's a `block`, it's called for that: to enter or to leave it.
    """
    if shielded:
        func = partial(_call_shielded, func)
    task = asyncio.current_task()
    if block is None:
        belonging.claim()
    else:
        func = partial(belonging.call_for, block, func)
    if (leases := _operations.get(task)) is not None:
        # It's called by a coroutine that code in the bridge awaits.
        return await bridge.run(_call_in_operation, func, leases)
    _operations[task] = leases = {}
    try:
        return await bridge.run(_call_with_leases, func, leases)
    finally:
        # The task may be gone already, with its event loop.
        _operations.pop(task, None)


def check(alias):
    """
    Raise ImproperlyConfigured if the database can't be waited for on the
    running event loop.
    """
    loop = asyncio.get_running_loop()
    checked = _checked.setdefault(loop, set())
    if alias in checked:
        return
    check_wrapper(connections.create_connection(alias))
    settings = connections.settings[alias]
    if settings["OPTIONS"].get("pool") and not settings["AUTOCOMMIT"]:
        raise ImproperlyConfigured(
            "With ASYNC_NATIVE and a pool, each operation outside of transactions has "
            "a connection of its own, so nobody could commit what it did. Set "
            f"AUTOCOMMIT, or remove one of them from the settings of the database "
            f"{alias!r}."
        )
    try:
        bridge.check()
    except ImproperlyConfigured as exc:
        raise ImproperlyConfigured(
            f"{exc} Or remove ASYNC_NATIVE from the settings of the database "
            f"{alias!r}."
        ) from exc
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("socket"):
        raise _refused(
            alias,
            "sockets that gevent hasn't patched. Run without gevent.monkey",
        )
    if not _can_watch_sockets(loop):
        raise _refused(
            alias,
            f"an event loop that can watch sockets, unlike {loop!r}. Use another "
            "one, such as asyncio.SelectorEventLoop",
        )
    checked.add(alias)


def check_wrapper(connection):
    """Raise ImproperlyConfigured if the connection can't wait on any loop."""
    if connection.lacks_for_native:
        raise _refused(connection.alias, connection.lacks_for_native)


def _refused(alias, lacking):
    return ImproperlyConfigured(
        f"ASYNC_NATIVE requires {lacking}, or remove it from the settings of the "
        f"database {alias!r}."
    )


def _can_watch_sockets(loop):
    first, second = socket.socketpair()
    with first, second:
        try:
            loop.add_reader(first, lambda: None)
        except NotImplementedError:
            return False
        loop.remove_reader(first)
        return True


def _call_shielded(func):
    with bridge.shielded():
        return func()


def _call_in_operation(func, leases):
    bridged = bridge.current()
    bridged.leases = leases
    bridged.before_coroutine = partial(_pause, leases)
    return func()


def _pause(leases):
    """
    Don't keep a pooled connection for the operation, if that has no use for it
    now, while a coroutine is awaited: tasks that are started in there, as
    asynchronous receivers of signals are, may need one to go on.
    """
    for lease in list(leases.values()):
        lease.pause()


def _call_with_leases(func, leases):
    try:
        return _call_in_operation(func, leases)
    finally:
        if leases:
            with bridge.shielded():
                _end(list(leases.values()))


def _end(leases):
    try:
        leases.pop().end()
    finally:
        # Each, even if another one can't be ended.
        if leases:
            _end(leases)


def connection_for(alias):
    """
    Return the connection that a task uses for a native alias, or None if it's
    asked by synchronous code outside of the bridge.

    Raise TransactionManagementError if the task outlived its block.
    """
    if asyncio._get_running_loop() is None or alias not in connections.native_aliases:
        return None
    if (block := belonging.block_for(alias)) is not None:
        sharing.share(block.connection)
        return block.connection
    bridged = bridge.current()
    if bridged is None:
        if asyncio.current_task() is None:
            return None
        # Asynchronous code can't use it, but look at it, and prepare it.
        return _lease_class(alias).wrapper(alias)
    leases = bridged.leases
    if leases is None:
        return None
    if alias not in leases:
        leases[alias] = _lease_class(alias)(alias)
    return leases[alias].connection


def _lease_class(alias):
    pool = connections.settings[alias]["OPTIONS"].get("pool")
    return _PoolLease if pool else _ScopeLease


def leased_connections():
    """
    Return the connections that code in the bridge uses and nobody else does:
    what it has leased, and that of a TestCase around it.
    """
    if bridge.current() is None:
        return []
    leases = _operations.get(asyncio.current_task(), {}).values()
    leased = [lease.connection for lease in leases if lease.is_exclusive()]
    for alias in connections.native_aliases:
        block = belonging.open_block(alias)
        if block is not None and block.connection._thread_ident is not None:
            leased.append(block.connection)
    return leased


def extend_lease(connection):
    """
    Return a lease of its own for who goes on using a connection that the
    operation has leased, or None if it has leased no such.
    """
    lease = _operations.get(asyncio.current_task(), {}).get(connection.alias)
    if lease is None or lease.connection is not connection:
        return None
    return type(lease)(connection.alias)


def join(connection):
    """
    Let the current operation, which has used a connection that may be leased
    to another task, return it if it's the last one.
    """
    bridged = bridge.current()
    if not connection.serves_scope or bridged is None or bridged.leases is None:
        return
    leases = bridged.leases
    for lease in leases.values():
        if lease.connection is connection:
            return
    if connection.settings_dict["OPTIONS"].get("pool"):
        leases[connection] = _PoolLease(connection.alias, connection)
    else:
        leases[connection] = _ScopeLease(connection.alias)


def _make_wrapper(alias):
    connection = async_atomic.make_connection(alias)
    connection.serves_scope = True
    # How many leases there are of it, if it's a task's own, and whether
    # between them, it's as connect() would make it.
    connection.lease_count = 0
    connection.rests = False
    if connection.settings_dict["OPTIONS"].get("pool"):
        connection.connect = partial(_connect, weakref.ref(connection))
    connection._cursor = partial(_cursor_in_turn, weakref.ref(connection))
    return connection


def _cursor_in_turn(ref, *args, **kwargs):
    """
    Make a cursor after checking the session, or opening one. Other tasks wait
    for that, and don't get a cursor of a session that's about to be closed.
    """
    connection = ref()
    with sharing.taking_turn(connection):
        return type(connection)._cursor(connection, *args, **kwargs)


def _was_in_threads(connection):
    """
    Return whether synchronous code has used it in threads, inside of atomic()
    in the bridge. If its caller was cancelled, it may still have a cursor.
    """
    turn = connection.turn
    if turn is None or not turn.threads:
        return False
    turn.threads.clear()
    return True


def _forget_error(connection):
    """
    Don't keep the task for as long as its wrapper, which would be forever: the
    traceback of the error for which a block was rolled back refers to it.
    """
    if not connection.in_atomic_block:
        connection.rollback_exc = None


def has_open_cursors(connection):
    """Return whether a server-side cursor is open."""
    for cursor in list(connection.cursors):
        if getattr(cursor, "name", None) and not cursor.closed:
            return True
    return False


class _Lease:
    """The use of a connection by an operation, or by what goes on after it."""

    def __init__(self):
        loop = asyncio.get_running_loop()
        if loop not in _leases:
            for other, leases in list(_leases.items()):
                if other.is_closed():
                    # Other threads may do the same.
                    with suppress(KeyError):
                        while True:
                            leases.popitem()[1].desert()
            _leases[loop] = {}
        self._leases = _leases[loop]

    def desert(self):
        """End it after its event loop was closed."""
        thread = threading.Thread(
            target=_end_session, args=[self.connection], daemon=True
        )
        thread.start()


def _end_session(connection):
    with async_atomic.ending_session(connection), suppress(Error):
        sharing.unshare(connection)
        # Whoever closes the coroutine closes the connection, too.
        connection.inc_thread_sharing()
        connection.close()


# ##### Without a pool #####


def _shared(scope, alias):
    with scope.lock:
        lease = scope.shared.get(alias)
        if lease is not None and (lease.users or lease.fits(connections.settings)):
            return lease
        if lease is not None:
            lease.close()
        wrapper = TaskWrapper(alias)
        lease = scope.shared[alias] = scopes.Lease(wrapper.connection)
        lease.wrapper = wrapper
        lease.rest()
        return lease


class _ScopeLease(_Lease):
    def __init__(self, alias):
        super().__init__()
        self._scope = scopes.current()
        with self._scope.lock:
            self._lease = lease = _shared(self._scope, alias)
            if not lease.users:
                _prepare(lease)
            lease.users += 1
        self.connection = lease.connection
        self._leases[self] = self

    def is_exclusive(self):
        """Return whether nobody else uses the connection."""
        return self._lease.users == 1 and not has_open_cursors(self.connection)

    @staticmethod
    def wrapper(alias):
        return _shared(scopes.current(), alias).connection

    def pause(self):
        """It's shared by tasks that are started meanwhile, anyway."""

    def desert(self):
        with self._scope.lock:
            shared = self._scope.shared
            if shared.get(self.connection.alias) is not self._lease:
                # Another one was deserted before.
                return
            del shared[self.connection.alias]
        super().desert()

    def end(self):
        self._leases.pop(self, None)
        with self._scope.lock:
            self._lease.users -= 1
            if self._lease.users:
                return
            self._lease.rest()
            _forget_error(self.connection)
            if not self._scope.is_open or _was_in_threads(self.connection):
                self._lease.close()


def _prepare(lease):
    """Make sure that an idle session can be used."""
    connection = lease.connection
    # Unlike while it rests (see Scope.show()).
    connection._thread_ident = None
    if connection.connection is None:
        return
    lease.prepare()
    if not connection.connection.is_quiet():
        connection.health_check_enabled = True


def call_idle(name):
    """Call a method of the connections that nobody uses."""
    for alias in connections.native_aliases:
        if connections.settings[alias]["OPTIONS"].get("pool"):
            continue
        lease = _ScopeLease(alias)
        try:
            if lease.is_exclusive():
                getattr(lease.connection, name)()
        finally:
            lease.end()


def take_session(scope, connection):
    """Give a transaction the session of its scope, if nobody uses it."""
    if connection.settings_dict["OPTIONS"].get("pool"):
        _expect_session(connection)
        return
    with scope.lock:
        lease = _shared(scope, connection.alias)
        idle = lease.connection
        if lease.users or idle.connection is None or has_open_cursors(idle):
            return
        if not _is_plain(idle):
            return
        _prepare(lease)
        if idle.connection is not None:
            async_atomic.move_session(idle, connection)


def give_session(scope, connection):
    """
    Keep the session of a transaction for its scope, unless that has another
    one. Return whether that's so.
    """
    if connection.connection is None:
        return True
    with scope.lock:
        lease = _shared(scope, connection.alias)
        if not scope.is_open or lease.users or lease.connection.connection is not None:
            return False
        if not _is_plain(connection):
            return False
        async_atomic.move_session(connection, lease.connection)
        lease.rest()
        return True


# ##### With a pool #####


class TaskWrapper:
    """The wrapper that one task has for pooled connections, or a scope."""

    def __init__(self, alias):
        self.connection = _make_wrapper(alias)
        # To tell what was set since.
        self._original = vars(self.connection).copy()
        self._loop = weakref.ref(asyncio.get_running_loop())

    def hand_down(self, heir):
        """
        Set on another wrapper what was set on this one: by its users, or by
        its class if that isn't Django's, but nothing of Django's own state.
        """
        if not _is_plain(self.connection):
            attributes = vars(self.connection)
            for name in attributes.keys() - _own_attributes(type(heir)):
                value = attributes[name]
                if name not in self._original or self._original[name] is not value:
                    setattr(heir, name, value)
                    heir.has_inherited = True
        if not heir.settings_dict["OPTIONS"].get("pool"):
            # As in thread mode, a block's connection has its own.
            return
        for name in INHERITED_ATTRIBUTES:
            setattr(heir, name, getattr(self.connection, name))
        heir.execute_wrappers = self.connection.execute_wrappers.copy()

    def is_of_earlier_loop(self):
        """
        Return whether async_to_sync() brought it to its caller, which called
        it again.
        """
        loop = self._loop()
        return loop is None or loop.is_closed()


def _wrapper_for(alias):
    """
    Return the TaskWrapper of the current task, that of the one which started
    it, or without a pool that of the scope, or None.
    """
    if not connections.settings[alias]["OPTIONS"].get("pool"):
        return _shared(scopes.current(), alias).wrapper
    own = _wrappers.get(asyncio.current_task(), {})
    wrapper = own.get(alias) or (_inherited.get() or {}).get(alias)
    if wrapper is None or wrapper.is_of_earlier_loop():
        return None
    return wrapper


def inherit(connection):
    """Let a block's connection have what the current task has set."""
    if (wrapper := _wrapper_for(connection.alias)) is not None:
        wrapper.hand_down(connection)


@cache
def _own_attributes(wrapper_class):
    """Return the names of all that a wrapper of Django's has."""
    for django_class in wrapper_class.__mro__:
        if django_class.__module__.startswith("django."):
            return {
                *vars(django_class({})),
                *dir(django_class),
                *async_atomic.SESSION_ATTRIBUTES,
                *PRIVATE_ATTRIBUTES,
            }


def _is_plain(connection):
    """
    Return whether a wrapper has nothing that isn't Django's, such as what it
    has set on its session, which another wrapper wouldn't know of.
    """
    return vars(connection).keys() <= _own_attributes(type(connection))


# ##### With a pool, between operations #####


@cache
def _connects_as_django(wrapper_class):
    """Return whether Django's own code is all that connects and closes."""
    return all(
        getattr(wrapper_class, name).__module__.startswith("django.db.backends.")
        for name in ("connect", "init_connection_state", "close", "_close")
    )


def _connect(ref):
    """
    Get a connection from the pool. Where it's the next operation that does so,
    nothing has changed of what connect() sets besides.
    """
    connection = ref()
    if not connection.rests or connection_created.receivers:
        connection.rests = False
        type(connection).connect(connection)
        return
    if not connection.serves_scope:
        # A block's, which is only just being entered.
        connection.rests = False
        connection.connection = connection.get_new_connection({})
        return
    with sharing.taking_turn(connection):
        if connection.connection is None:
            connection.rests = False
            connection.connection = connection.get_new_connection({})
            join(connection)


def _expect_session(connection):
    """
    Let the connect() of a new wrapper get a connection from the pool, if
    there's nothing else that it would do.
    """
    # It imports this module.
    from django.db.backends.base.base import RAN_DB_VERSION_CHECK

    connection.rests = (
        connection.alias in RAN_DB_VERSION_CHECK
        and not hasattr(connection, "has_inherited")
        and _connects_as_django(type(connection))
    )
    if connection.rests:
        connection.autocommit = connection.health_check_done = True
        connection.connect = partial(_connect, weakref.ref(connection))


def _rest(connection):
    """
    Return the connection to the pool as close() does, after an operation.
    """
    connection.rests = (
        connection.autocommit
        and not connection.errors_occurred
        and not connection.run_on_commit
        and not connection.closed_in_transaction
        and not connection.needs_rollback
        and connection.health_check_done
        and connection.connection.autocommit
        and _connects_as_django(type(connection))
    )
    if not connection.rests:
        connection.close()
        return
    pooled, connection.connection = connection.connection, None
    pooled._pool.putconn(pooled)


class _PoolLease(_Lease):
    def __init__(self, alias, connection=None):
        super().__init__()
        self.connection = connection or self.wrapper(alias)
        self.connection.lease_count += 1
        self._leases[self.connection] = self

    def is_exclusive(self):
        """Return whether nobody else uses the connection."""
        return self.connection.lease_count == 1

    @staticmethod
    def wrapper(alias):
        wrappers = _wrappers.setdefault(asyncio.current_task(), {})
        if alias not in wrappers:
            wrapper = TaskWrapper(alias)
            inherit(wrapper.connection)
            wrappers[alias] = wrapper
            _inherited.set({**(_inherited.get() or {}), alias: wrapper})
        return wrappers[alias].connection

    def pause(self):
        connection = self.connection
        if (
            self.is_exclusive()
            and not connection.turn.depth
            and not connection.in_atomic_block
            and connection.autocommit
            and all(cursor.closed for cursor in list(connection.cursors))
        ):
            with bridge.shielded():
                connection.close()

    def end(self):
        connection = self.connection
        connection.lease_count -= 1
        if not connection.lease_count:
            _forget_error(connection)
        if (
            not connection.lease_count
            and connection.connection is not None
            and not connection.in_atomic_block
            and not has_open_cursors(connection)
        ):
            if asyncio._get_running_loop() is None:
                # A coroutine is destroyed whose loop was closed.
                connection._thread_ident = get_ident()
            if _was_in_threads(connection):
                connection.connection.close()
            _rest(connection)
        if not connection.lease_count and connection.connection is None:
            self._leases.pop(connection, None)
