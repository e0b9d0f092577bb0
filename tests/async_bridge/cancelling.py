import asyncio
from functools import partial


class CancelledAt:
    """
    Await a coroutine and cancel the task when it waits for the `number`th
    time: before what it waits for has happened, or if it's `late` just after
    that, so that the task would have gone on.
    """

    def __init__(self, number, late, coroutine):
        self.number = number
        self.late = late
        self.coroutine = coroutine
        # How often it has waited.
        self.count = 0

    @property
    def was_reached(self):
        return self.count >= self.number

    def __await__(self):
        step = partial(self.coroutine.send, None)
        while True:
            try:
                future = step()
            except StopIteration as exc:
                return exc.value
            self.count += 1
            if self.count == self.number:
                self._cancel(future)
            try:
                yield future
            except BaseException as exc:
                step = partial(self.coroutine.throw, exc)
            else:
                step = partial(self.coroutine.send, None)

    def _cancel(self, future):
        task = asyncio.current_task()
        if self.late and future is not None:
            # It's called before the task is told.
            future.add_done_callback(lambda future: task.cancel())
        else:
            task.get_loop().call_soon(task.cancel)


async def cancel_everywhere(test, make_coroutine):
    """
    Run `make_coroutine()` once for each time that it waits, and cancel it
    there. Yield the task, which has ended. The last one was never cancelled.
    """
    for late in (False, True):
        number = 0
        reached = True
        while reached:
            number += 1
            cancelled = CancelledAt(number, late, make_coroutine())
            task = asyncio.create_task(_await(cancelled))
            await asyncio.wait([task], timeout=20)
            test.assertIs(task.done(), True)
            reached = cancelled.was_reached
            if not reached:
                task.result()
            yield task
        test.assertGreater(number, 1)


async def _await(awaitable):
    return await awaitable
