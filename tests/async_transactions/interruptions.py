import asyncio
import types
from functools import partial


class Interruption:
    """
    Cancel a task at chosen suspensions of a coroutine, counted from zero.

    The cancellation comes when the coroutine has begun to wait or, if it's
    `late`, when what it waits for is there, but the coroutine wasn't told.
    """

    def __init__(self, *numbers, late=False):
        self.numbers = set(numbers)
        self.late = late
        # How often the coroutine was suspended.
        self.count = 0
        # Whether it was interrupted.
        self.happened = False

    async def run(self, coroutine):
        return await self._drive(coroutine)

    @types.coroutine
    def _drive(self, coroutine):
        resume = partial(coroutine.send, None)
        while True:
            try:
                future = resume()
            except StopIteration as stop:
                return stop.value
            if self.count in self.numbers:
                self._cancel(asyncio.current_task(), future)
            self.count += 1
            try:
                resume = partial(coroutine.send, (yield future))
            except BaseException as exc:
                resume = partial(coroutine.throw, exc)

    def _cancel(self, task, future):
        self.happened = True
        if self.late and future is not None:
            # Called before the task's own callback, which isn't added yet.
            future.add_done_callback(lambda future: task.cancel())
        else:
            task.cancel()
