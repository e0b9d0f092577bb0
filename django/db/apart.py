"""
Coroutines that share a context, and yet are in different transactions.

Signal.asend() runs its receivers in tasks with one context, so that each sees
the context variables that the others set. Which block a receiver is inside of
is nothing to share: with apart() those variables have values of the
coroutine's own while it runs.
"""

from asgiref.sync import AsyncToSync, SyncToAsync

from django.db import belonging, bridge


def _get():
    """Return what belongs to the current execution."""
    return (
        belonging.inherited.get(None),
        SyncToAsync.thread_sensitive_context.get(None),
        getattr(AsyncToSync.executors, "current", None),
        *[variable.get() for variable in bridge.confined_variables],
    )


def _swap(values):
    """Replace what _get() returns. Return what it returned before."""
    current = _get()
    if values != current:
        inherited, context, executor, *confined = values
        belonging.inherited.set(inherited)
        SyncToAsync.thread_sensitive_context.set(context)
        AsyncToSync.executors.current = executor
        for variable, value in zip(bridge.confined_variables, confined):
            variable.set(value)
    return current


class apart:
    """Await a coroutine apart from others in the same context."""

    def __init__(self, coroutine):
        self._coroutine = coroutine
        self._own = _get()

    def __await__(self):
        steps = self._coroutine.__await__()
        advance, argument = steps.send, None
        while True:
            shared = _swap(self._own)
            try:
                awaited = advance(argument)
            except StopIteration as exc:
                return exc.value
            finally:
                self._own = _swap(shared)
            try:
                argument = yield awaited
                advance = steps.send
            except BaseException as exc:
                advance, argument = steps.throw, exc
