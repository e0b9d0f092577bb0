"""
Do what run.py asks for, with one contender, in its environment.

    python worker.py MODULE URL OPTIONS

Each line of the input is a JSON object, a command and its arguments, and so is
each line of the output, its result. Everything else that is written there goes
to the standard error.
"""

import asyncio
import gc
import importlib
import itertools
import json
import os
import sys
import threading
import time
import traceback

import http_load as http
import waiting_memory
from operations import OPERATIONS, VERIFIED_KEY

# Seconds. By then, caches are filled, and statements are prepared.
WARM_UP = 0.3


def verify(contender, operation):
    """Do an operation once. Return what it has read, and its time."""
    operation = OPERATIONS[operation]
    args = () if operation.keys is None else (min(VERIFIED_KEY, operation.keys),)
    method = getattr(contender, operation.name)
    if operation.view_of is not None:
        result, elapsed = asyncio.run(http.verify(contender, operation, *args))
        return {"read": result, "elapsed": elapsed}
    if hasattr(contender, "threads"):
        contender.open()
        try:
            start = time.perf_counter()
            result = method(*args)
            elapsed = time.perf_counter() - start
        finally:
            contender.close()
    else:

        async def call():
            await contender.open(operation.pool)
            try:
                start = time.perf_counter()
                result = await method(*args)
                return result, time.perf_counter() - start
            finally:
                await contender.close()

        result, elapsed = asyncio.run(call())
    return {"read": described(operation.name, result), "elapsed": elapsed}


def described(operation, result):
    """Return what an operation has read, the same for all contenders."""
    if operation in ("get", "slow_get"):
        return _item(result)
    if operation == "list":
        return [_item(item) for item in result]
    if operation == "prefetch":
        return [
            [author.id, author.name, _titles(books), _titles(awards)]
            for author, books, awards in result
        ]
    if operation == "stream":
        return list(result)
    return None


def _item(item):
    created = item.created.timestamp()
    return [item.id, item.name, item.price, created, item.note]


def _titles(rows):
    return sorted([row.id, row.title] for row in rows)


def measure(contender, operation, tasks, seconds):
    """Do an operation as often as possible. Return what that took."""
    operation = OPERATIONS[operation]
    meter = Meter(operation)
    gc.collect()
    if operation.view_of is not None:
        rates = asyncio.run(http.measure(contender, operation, tasks, seconds, meter))
        return meter.result(rates)
    method = getattr(contender, operation.name)
    if hasattr(contender, "threads"):
        _measure_in_threads(contender, method, meter, tasks, seconds)
    else:
        asyncio.run(_measure_in_tasks(contender, method, meter, tasks, seconds))
    return meter.result(meter.rates())


class Meter:
    """The time that calls take, and what the process uses meanwhile."""

    def __init__(self, operation):
        self.operation = operation
        self._numbers = itertools.count()
        self.times = []

    def arguments(self):
        return self.operation.arguments(next(self._numbers))

    def start(self):
        # What the process has needed before isn't of this measurement.
        reset_peak_memory()
        self._cpu = time.process_time()
        self._start = time.perf_counter()

    def add(self, start):
        """Note a call that has just returned."""
        self._end = time.perf_counter()
        self.times.append(self._end - start)

    def stop(self):
        self._cpu = time.process_time() - self._cpu

    def result(self, rates):
        return {**rates, "cpu": self._cpu / rates["count"], "memory": peak_memory()}

    def rates(self):
        times = sorted(self.times)
        count = len(times)
        elapsed = self._end - self._start
        return {
            "count": count,
            "elapsed": elapsed,
            "rate": count / elapsed,
            "p50": times[count // 2],
            "p99": times[min(count - 1, count * 99 // 100)],
        }


async def _measure_in_tasks(contender, method, meter, tasks, seconds):
    operation = meter.operation
    await contender.open(operation.pool)

    async def once():
        start = time.perf_counter()
        await method(*meter.arguments())
        meter.add(start)

    async def repeat(until):
        while time.perf_counter() < until:
            await once()

    async def run(*coroutines):
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)

    try:
        if operation.once:
            coroutines = [once() for _ in range(tasks)]
        else:
            until = time.perf_counter() + WARM_UP
            await run(*[repeat(until) for _ in range(tasks)])
            meter.times.clear()
            until = time.perf_counter() + seconds
            coroutines = [repeat(until) for _ in range(tasks)]
        meter.start()
        await run(*coroutines)
        meter.stop()
    finally:
        await contender.close()


def _measure_in_threads(contender, method, meter, tasks, seconds):
    operation = meter.operation
    threads = operation.pool if operation.once else contender.threads
    count = min(tasks, threads)
    failures = []
    until = 0
    ready, go = threading.Barrier(count + 1), threading.Barrier(count + 1)

    def once():
        start = time.perf_counter()
        method(*meter.arguments())
        meter.add(start)

    def repeat(until):
        while time.perf_counter() < until:
            once()

    def run():
        try:
            contender.open()
            try:
                if not operation.once:
                    repeat(time.perf_counter() + WARM_UP)
                ready.wait()
                go.wait()
                if operation.once:
                    for _ in range(tasks // count):
                        once()
                else:
                    repeat(until)
            finally:
                contender.close()
        except BaseException as error:
            failures.append(error)
            ready.abort()
            go.abort()

    pool = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in pool:
        thread.start()
    try:
        ready.wait()
        meter.times.clear()
        until = time.perf_counter() + seconds
        meter.start()
        go.wait()
    except threading.BrokenBarrierError:
        pass
    for thread in pool:
        thread.join()
    if failures:
        raise failures[0]
    meter.stop()


def reset_peak_memory():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory():
    """Return the peak of the resident memory, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise ValueError("The kernel tells no VmHWM.")


def call(contender, method, arguments=()):
    """Call a method of raw_psycopg that prepares or checks something."""
    return getattr(contender, method)(*arguments)


def can(contender, operation):
    return getattr(contender, operation, None) is not None


def hold(contender, kind, url):
    """Return the memory that a waiting transaction needs."""
    return waiting_memory.measure(contender, kind, url)


COMMANDS = {
    function.__name__: function for function in (verify, measure, call, can, hold)
}


def failure(error):
    """Return an exception in one line. The rest is for the log."""
    traceback.print_exception(error)
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return traceback.format_exception_only(error)[0].splitlines()[0]


def main(module, url, options):
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(**answer):
        replies.write(json.dumps(answer) + "\n")

    try:
        module = importlib.import_module(f"contenders.{module}")
        contender = module.Contender(url, **json.loads(options))
    except Exception as error:
        reply(error=failure(error))
        return
    reply(result=None)
    for line in sys.stdin:
        request = json.loads(line)
        command = COMMANDS[request.pop("command")]
        try:
            reply(result=command(contender, **request))
        except Exception as error:
            reply(error=failure(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
