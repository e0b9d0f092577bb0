"""
Promises 1 to 5 with event loops whose tasks aren't plain ones: what belongs to
which block must not depend on how a task was made.
"""

import asyncio
import contextvars
from importlib import import_module
from inspect import iscoroutinefunction
from unittest import mock

from django.test import SimpleTestCase

MODULES = [
    "test_apart",
    "test_async_calls",
    "test_ends",
    "test_forum",
    "test_generators",
    "test_inside",
    "test_isolation",
    "test_receivers",
    "test_siblings",
    "test_sync_blocks",
    "test_turns",
]


class TaskFactoryMixin:
    """Give every event loop that's made during a test a task factory."""

    def setUp(self):
        self.made = 0
        new_event_loop = asyncio.new_event_loop

        def with_factory():
            loop = new_event_loop()
            loop.set_task_factory(self.count)
            return loop

        # asyncio.run() and asyncio.Runner find it in the one, tests in the
        # other.
        for target in ("asyncio.events.new_event_loop", "asyncio.new_event_loop"):
            patcher = mock.patch(target, with_factory)
            patcher.start()
            self.addCleanup(patcher.stop)
        # Django replaces the method by a synchronous one.
        if iscoroutinefunction(getattr(type(self), self._testMethodName)):
            self.addCleanup(lambda: self.assertGreater(self.made, 0))
        super().setUp()

    def count(self, loop, coroutine, **kwargs):
        self.made += 1
        return self.make_task(loop, coroutine, **kwargs)


class TracingMixin(TaskFactoryMixin):
    """
    Do as packages do that trace what an application does: wrap the coroutine,
    and copy the context rather than leaving that to the task.
    """

    span = contextvars.ContextVar("span", default=0)

    def make_task(self, loop, coroutine, *, context=None, **kwargs):
        async def traced():
            token = self.span.set(self.span.get() + 1)
            try:
                return await coroutine
            finally:
                self.span.reset(token)

        if context is None:
            context = contextvars.copy_context()
        return asyncio.Task(traced(), loop=loop, context=context, **kwargs)


class EagerMixin(TaskFactoryMixin):
    """A task begins to run before create_task() returns."""

    make_task = staticmethod(asyncio.eager_task_factory)


def add_test_cases():
    """Make subclasses of the test cases in MODULES, for each factory."""
    for module_name in MODULES:
        module = import_module(f"{__package__}.{module_name}")
        for name, test_case in list(vars(module).items()):
            if (
                isinstance(test_case, type)
                and issubclass(test_case, SimpleTestCase)
                and test_case.__module__ == module.__name__
            ):
                for mixin in (TracingMixin, EagerMixin):
                    prefix = mixin.__name__.removesuffix("Mixin")
                    globals()[f"{prefix}{name}"] = type(
                        f"{prefix}{name}",
                        (mixin, test_case),
                        {"__module__": __name__},
                    )


add_test_cases()
