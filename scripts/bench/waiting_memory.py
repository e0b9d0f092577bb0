"""
What a transaction that waits needs of its process's memory.

A contender holds BEFORE transactions, and then MORE besides. The figure is
what the process's anonymous memory (that's neither shared nor a file's, in
/proc/self/smaps_rollup) and its page tables have grown by meanwhile, for each
of MORE. So what is needed once isn't in it, and neither are the kernel's
stacks of threads, 16 KiB each on most machines. A bare connection is measured
in the same way, a psycopg.Connection which has sent a query; report.py
subtracts it.

A transaction reads an account with select_for_update(). Then either the block
waits for something else ("idle"), or its query waits for a row that somebody
has locked ("lock"), with the ORM's functions on the stack. In native mode
that's a task, in stock Django a thread. Each measurement has a new process.
"""

import asyncio
import contextlib
import gc
import pathlib
import re
import threading
import time

BEFORE = 10
MORE = 100

KINDS = {"idle": "the block awaits something", "lock": "a query waits for a lock"}

# No transaction gets this one's lock. Idle ones have others.
LOCKED = 9999

# In seconds.
PATIENCE = 60
INTERVAL = 0.02

WAITING = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> %s AND CASE %s
    WHEN 'idle' THEN state = 'idle in transaction' ELSE wait_event_type = 'Lock' END
"""


def measure(contender, kind, url):
    """Return the bytes that a transaction needs, its connection included."""
    import psycopg

    with psycopg.connect(url) as locking, psycopg.connect(url) as observer:
        observer.autocommit = True
        locking.execute(
            "SELECT 1 FROM bench_account WHERE id = %s FOR UPDATE", [LOCKED]
        )

        def waiting():
            parameters = [locking.info.backend_pid, kind]
            return observer.execute(WAITING, parameters).fetchone()[0]

        # Its first execution needs memory, too.
        waiting()
        if kind == "bare":
            return _measure_bare(psycopg, url)
        if hasattr(contender, "threads"):
            return _measure_in_threads(contender, kind, waiting, locking)
        return asyncio.run(_measure_in_tasks(contender, kind, waiting, locking))


def _key(kind, number):
    return LOCKED if kind == "lock" else number + 1


def _growth(before):
    return (own_memory() - before) / MORE


def _measure_bare(psycopg, url):
    def connect():
        connection = stack.enter_context(psycopg.connect(url))
        connection.execute("SELECT id, balance FROM bench_account WHERE id = 1")

    with contextlib.ExitStack() as stack:
        for _ in range(BEFORE):
            connect()
        before = own_memory()
        for _ in range(MORE):
            connect()
        return _growth(before)


def _measure_in_threads(contender, kind, waiting, locking):
    go = threading.Event()
    failures = []

    def run(number):
        try:
            contender.open()
            try:
                contender.hold(_key(kind, number), go.wait)
            finally:
                contender.close()
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=run, args=[number], daemon=True)
        for number in range(BEFORE + MORE)
    ]

    def start(some, count):
        for thread in some:
            thread.start()
        for _ in _until(waiting, count, failures):
            time.sleep(INTERVAL)

    try:
        start(threads[:BEFORE], BEFORE)
        before = own_memory()
        start(threads[BEFORE:], BEFORE + MORE)
        return _growth(before)
    finally:
        go.set()
        locking.rollback()
        for thread in threads:
            if thread.ident is not None:
                thread.join(PATIENCE)


async def _measure_in_tasks(contender, kind, waiting, locking):
    go = threading.Event() if contender.blocks else asyncio.Event()
    failures = []
    tasks = []

    async def run(number):
        try:
            await contender.hold(_key(kind, number), go.wait)
        except BaseException as error:
            failures.append(error)
            raise

    async def start(count):
        tasks.extend(
            asyncio.create_task(run(number)) for number in range(len(tasks), count)
        )
        for _ in _until(waiting, count, failures):
            await asyncio.sleep(INTERVAL)

    # The pool connects on demand, as the transactions do in threads.
    await contender.open(BEFORE + MORE, min_size=1)
    try:
        await start(BEFORE)
        before = own_memory()
        await start(BEFORE + MORE)
        return _growth(before)
    finally:
        go.set()
        locking.rollback()
        await asyncio.wait(tasks, timeout=PATIENCE)
        await contender.close()


def _until(waiting, count, failures):
    """Iterate until as many transactions wait."""
    deadline = time.monotonic() + PATIENCE
    while (found := waiting()) != count:
        if failures:
            raise failures[0]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{found} transactions wait, not {count}.")
        yield


def own_memory():
    """Return the anonymous memory and the page tables, in bytes."""
    gc.collect()
    return sum(
        int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.M)[1]) * 1024
        for name, text in (
            ("Anonymous", pathlib.Path("/proc/self/smaps_rollup").read_text()),
            ("VmPTE", pathlib.Path("/proc/self/status").read_text()),
        )
    )
