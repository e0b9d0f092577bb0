"""
Random programs, and what a model says that they must do.

A program is a tree of steps. Blocks, savepoints, connections of their own,
crossings between synchronous and asynchronous code, and tasks have steps
inside; the others are statements, each with an outcome: the names that it
reads, or the exception that it raises. Every step has a path, such as 0.2.1,
and what's written has the name of the step that wrote it.

Model says what each step's outcome is, which functions are called after
COMMIT, in which order, and what the table contains at the end. Program.run()
finds out, and so does run_sync(), without any asynchronous code, if the
program has a synchronous equivalent.

Tasks work one after the other, so that there's one right outcome, but for
Siblings: these may have seen what others have written, of a block all of it.
"""

import asyncio
import contextlib
import contextvars
import faulthandler
import functools
import logging
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import hypothesis
from asgiref.sync import async_to_sync, sync_to_async
from hypothesis import strategies as st
from rounds import worker
from rounds.base import Round, Violation
from rounds.invariants import IN_TRANSACTION, remaining

import django.db
from django.db import DatabaseError, connection, connections, transaction
from django.db.transaction import TransactionManagementError

# Seconds.
PROGRAM_TIMEOUT = 20
PROGRAM_TIMEOUT_WHILE_SHRINKING = 4
SHRINKING_TIMEOUT = 60

# How deep steps may be nested, and how many there are in a row.
DEPTH = 5
LENGTH = 4

PROGRAMS_PER_BATCH = 50

# MariaDB keeps deleted rows in its indexes for a while. Who inserts one of
# them again looks on for the live one, and locks the gap behind it, in which
# others wait to insert theirs.
EMPTY = {"mysql": "TRUNCATE TABLE rounds_entry"}

INSERT = "INSERT INTO rounds_entry (name, amount) VALUES (%s, 0)"

# A row that's always there. Its name is before all others, so that MariaDB
# locks no gap between those if it's inserted again.
EXISTING = "!"

REFUSED = TransactionManagementError.__name__
DUPLICATE = django.db.IntegrityError.__name__
NOT_DURABLE = RuntimeError.__name__


class Planned(Exception):
    """What blocks are left by."""


# ##### The steps #####


@dataclass(frozen=True)
class Step:
    steps = ()

    def __str__(self):
        fields = {**vars(self)}
        fields.pop("steps", None)
        shown = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        return f"{type(self).__name__}({shown})"


@dataclass(frozen=True)
class Read(Step):
    how: str


@dataclass(frozen=True)
class Write(Step):
    how: str


@dataclass(frozen=True)
class Duplicate(Step):
    """Insert what's there, which marks a block for rollback."""


@dataclass(frozen=True)
class SetRollback(Step):
    pass


@dataclass(frozen=True)
class OnCommit(Step):
    how: str


@dataclass(frozen=True)
class Block(Step):
    """aatomic() or atomic(), left by an exception if it fails."""

    savepoint: bool
    durable: bool
    decorator: bool
    fails: bool
    steps: list


@dataclass(frozen=True)
class Savepoint(Step):
    rollback: bool
    steps: list


@dataclass(frozen=True)
class NewConnection(Step):
    steps: list


@dataclass(frozen=True)
class Cross(Step):
    """
    Call synchronous code from asynchronous code or vice versa. A thread's own
    connection has to be closed by who gave it the work.
    """

    how: str
    closes: bool
    steps: list


@dataclass(frozen=True)
class Tasks(Step):
    """Tasks that are started at once. Each waits for the one before."""

    how: str
    steps: list


@dataclass(frozen=True)
class Siblings(Step):
    """
    Tasks that don't wait for each other. Each has a block, or works in the one
    around all of them. Their context is their own, one that they share, as
    receivers of asend() do, or that of the task which starts them.
    """

    context: str
    steps: list


@dataclass(frozen=True)
class Body(Step):
    """What a task does."""

    steps: list


@dataclass(frozen=True)
class Foreign(Step):
    """Steps of a task or a thread that was there before."""

    how: str
    steps: list


@dataclass(frozen=True)
class Abandon(Step):
    """
    Call synchronous code that opens a block in a thread, and be cancelled
    while it's open. The steps are done before that is rolled back.
    """

    steps: list


@dataclass(frozen=True)
class Outlive(Step):
    """A task that goes on after the end of the block it was started in."""

    steps: list


def walk(steps, path=()):
    for number, step in enumerate(steps):
        yield (*path, number), step
        yield from walk(step.steps, (*path, number))


def show_path(path):
    return ".".join(map(str, path))


def show(steps):
    """Return a program in a readable form."""
    return "\n".join(
        f"{'    ' * (len(path) - 1)}{show_path(path)}: {step}"
        for path, step in walk(steps)
    )


# ##### How they are generated #####


@dataclass(frozen=True)
class Place:
    """What there is around a step, which decides what it can be."""

    database: str
    native: bool
    pool: bool
    depth: int = DEPTH
    asynchronous: bool = True
    # In the bridge of native mode, so on the loop's thread.
    in_bridge: bool = False
    # What synchronous code outside of blocks shares can't be used by others
    # until this has ended: asgiref's thread, or native mode's connection.
    occupies: bool = False
    # There's a connection that isn't just for one statement, there's a block
    # on it, and the outermost one is an aatomic().
    connected: bool = False
    in_block: bool = False
    strict: bool = False
    # The connection is that of an aatomic(), which has a thread, too.
    has_thread: bool = False
    # Somebody has a transaction open. On SQLite, nobody else can write.
    locked: bool = False
    read_only: bool = False
    foreign: bool = False
    # A thread is in a block of code that was abandoned.
    abandoned: bool = False
    # Where the block was entered that a task started here can outlive.
    around: "Place" = None
    # A block was outlived. The others around it, if any, are still open.
    refused: bool = False

    def inner(self, **changes):
        return replace(self, **{"depth": self.depth - 1, "around": None, **changes})

    def block(self):
        return self.inner(
            connected=True,
            in_block=True,
            strict=self.strict if self.in_block else self.asynchronous,
            has_thread=self.has_thread if self.connected else self.asynchronous,
            locked=True,
            around=self if self.asynchronous else None,
            refused=False,
        )

    def outlived(self):
        return self.around.inner(depth=self.depth - 1, refused=True)

    def elsewhere(self, **changes):
        """Return the place of steps that use another connection."""
        return self.inner(
            in_block=False,
            strict=False,
            has_thread=False,
            read_only=self.database == "sqlite" and self.locked,
            **changes,
        )

    def kinds(self):
        kinds = ["read"]
        if not self.read_only:
            kinds += ["write", "duplicate", "set_rollback", "on_commit"]
        if not self.depth:
            return kinds
        kinds += ["cross", "cross", "new_connection"]
        if not self.read_only:
            # They are what it's about, above all where the rest is refused.
            kinds += ["block"] * (8 if self.refused else 3) + ["savepoint"]
        if self.asynchronous:
            kinds.append("tasks")
            if not self.read_only:
                # Only there they may all work in the block around them.
                kinds += ["siblings"] * (3 if self.strict else 1)
            if not (self.connected or self.abandoned or self.read_only or self.refused):
                kinds.append("abandon")
        if not self.foreign and not self.occupies:
            kinds += ["foreign"] * 2
        if self.around is not None:
            kinds.append("outlive")
        return kinds

    def crossings(self):
        if self.asynchronous:
            return ["run_sync", "sensitive", "insensitive", "to_thread"]
        if self.in_bridge or self.occupies:
            return ["async_to_sync"]
        return ["async_to_sync", "asyncio.run"]

    def cross(self, how):
        if not self.asynchronous:
            return self.inner(asynchronous=True, in_bridge=False)
        in_bridge = how == "run_sync" and self.native
        shares = how == "sensitive" or (
            how == "run_sync" and not (self.native and self.pool)
        )
        return self.inner(
            asynchronous=False,
            in_bridge=in_bridge,
            occupies=self.occupies or (shares and not self.has_thread),
        )


def steps_at(place, **kwargs):
    return st.lists(step_at(place), **{"max_size": LENGTH, **kwargs})


def outlive_at(place):
    return st.builds(Outlive, steps_at(place.outlived(), min_size=1))


@st.composite
def step_at(draw, place):
    """Return a step that makes sense there."""
    kind = draw(st.sampled_from(place.kinds()))
    if kind == "read":
        return Read(draw(st.sampled_from(["orm", "raw", "iterator"])))
    if kind == "write":
        return Write(draw(st.sampled_from(["orm", "raw", "bulk", "get_or_create"])))
    if kind == "duplicate":
        return Duplicate()
    if kind == "set_rollback":
        return SetRollback()
    if kind == "on_commit":
        # Only aatomic() awaits coroutines.
        hows = ["function", "coroutine"] if place.strict else ["function"]
        return OnCommit(draw(st.sampled_from(hows)))
    if kind == "block":
        inner = place.block()
        steps = draw(steps_at(inner))
        if place.in_block and inner.around and inner.depth and draw(st.booleans()):
            # Who outlives it is still inside of another one.
            steps.append(draw(outlive_at(inner)))
        return Block(
            savepoint=draw(st.sampled_from([True, True, False])),
            durable=draw(st.sampled_from([False, False, True])),
            decorator=draw(st.booleans()),
            fails=draw(st.booleans()),
            steps=steps,
        )
    if kind == "savepoint":
        steps = draw(steps_at(place.inner()))
        return Savepoint(rollback=draw(st.booleans()), steps=steps)
    if kind == "new_connection":
        inner = place.elsewhere(connected=True, refused=False)
        return NewConnection(draw(steps_at(inner)))
    if kind == "cross":
        how = draw(st.sampled_from(place.crossings()))
        closes = how in ("insensitive", "to_thread") and not place.connected
        return Cross(how, closes, draw(steps_at(place.cross(how))))
    if kind == "tasks":
        how = draw(st.sampled_from(["create_task", "gather", "TaskGroup"]))
        bodies = st.builds(Body, steps_at(place.inner()))
        return Tasks(how, draw(st.lists(bodies, min_size=1, max_size=3)))
    if kind == "siblings":
        contexts = ["own", "shared"]
        if not place.connected:
            # In there, nobody is inside of what another task has opened.
            contexts.append("outer")
        context = draw(st.sampled_from(contexts))
        # The others don't know whose block is in a shared context.
        hows = ["insensitive", "to_thread"] if context == "own" else ["sensitive"]
        statements = st.one_of(
            st.builds(Read, st.just("orm")),
            st.builds(Write, st.sampled_from(["orm", "raw"])),
        )
        statement_lists = st.lists(statements, min_size=1, max_size=2)
        crossings = st.builds(
            Cross, st.sampled_from(hows), st.just(False), statement_lists
        )
        blocks = st.builds(
            Block,
            savepoint=st.just(True),
            durable=st.just(False),
            decorator=st.booleans(),
            fails=st.booleans(),
            steps=st.lists(
                st.one_of(statements, crossings), min_size=1, max_size=LENGTH
            ),
        )
        siblings = [draw(blocks)]
        if place.strict and context == "own" and not place.refused:
            # What they write isn't rolled back with the blocks of others.
            blocks = st.one_of(blocks, crossings, st.builds(Body, statement_lists))
        siblings += draw(st.lists(blocks, min_size=1, max_size=2))
        return Siblings(context, siblings)
    if kind == "abandon":
        inner = place.inner(
            locked=True, read_only=place.database == "sqlite", abandoned=True
        )
        return Abandon(draw(steps_at(inner, min_size=1)))
    if kind == "foreign":
        how = draw(st.sampled_from(["task", "thread"]))
        inner = place.elsewhere(
            asynchronous=how == "task",
            in_bridge=False,
            connected=False,
            foreign=True,
            refused=False,
        )
        return Foreign(how, draw(steps_at(inner, min_size=1)))
    return draw(outlive_at(place))


# ##### What they must do #####


@dataclass
class AnyOf:
    """The names that siblings may read: some, and others all at once."""

    least: frozenset
    others: list

    def __eq__(self, names):
        if not isinstance(names, frozenset):
            return False
        rest = names - self.least
        for other in self.others:
            if other <= names:
                rest -= other
        return self.least <= names and not rest


@dataclass(eq=False)
class Saved:
    """What a transaction had written at a savepoint."""

    written: set


@dataclass
class Session:
    """A connection, and what Atomic does there."""

    committed: set
    # What an open transaction has written.
    written: set = field(default_factory=set)
    in_block: bool = False
    needs_rollback: bool = False
    # A Saved for each nested block, or None if it has no savepoint.
    savepoints: list = field(default_factory=list)
    # What on_commit() was given, and the savepoints that it depends on.
    hooks: list = field(default_factory=list)

    def read(self):
        return frozenset(self.committed | self.written)

    def write(self, name):
        (self.written if self.in_block else self.committed).add(name)

    def enter(self, savepoint):
        if not self.in_block:
            self.in_block = True
        elif savepoint and not self.needs_rollback:
            self.savepoints.append(Saved(set(self.written)))
        else:
            self.savepoints.append(None)

    def leave(self, fails):
        """Leave a block. Return the hooks to be called."""
        rolls_back = fails or self.needs_rollback
        self.needs_rollback = False
        if not self.savepoints:
            self.in_block = False
            hooks = [] if rolls_back else [name for name, _ in self.hooks]
            if not rolls_back:
                self.committed.update(self.written)
            self.written, self.hooks = set(), []
            return hooks
        saved = self.savepoints.pop()
        if rolls_back and saved is None:
            self.needs_rollback = True
        elif rolls_back:
            self.written = saved.written
            self.hooks = [hook for hook in self.hooks if saved not in hook[1]]
        return []


class Model:
    """
    What a program must do: `outcomes` by path, `hooks` in the order they are
    called, and `committed`, the names that are there at the end.
    """

    def __init__(self, steps):
        self.committed = {EXISTING}
        self.outcomes = {}
        self.hooks = []
        self.outliving = []
        self.run(steps, (), None, False)

    def run(self, steps, path, session, refused):
        """
        Run steps with a Session, or None for the connection that everybody
        has outside of blocks. They are `refused` after the end of a block, but
        for the blocks that they open on the Session.
        """
        for number, step in enumerate(steps):
            self.step(step, (*path, number), session, refused)

    def step(self, step, path, session, refused):
        method = getattr(self, type(step).__name__.lower(), None)
        if method is not None:
            method(step, path, session, refused)
        elif isinstance(step, (Cross, Tasks, Body, Abandon)):
            self.run(step.steps, path, session, refused)
        else:
            session = session or Session(self.committed)
            self.outcomes[path] = self.statement(step, path, session, refused)

    def statement(self, step, path, session, refused):
        if refused:
            return REFUSED
        if isinstance(step, OnCommit):
            if session.in_block:
                session.hooks.append((path, list(session.savepoints)))
            else:
                self.hooks.append(path)
            return None
        if isinstance(step, SetRollback):
            if not session.in_block:
                return REFUSED
            session.needs_rollback = True
            return None
        if session.needs_rollback:
            return REFUSED
        if isinstance(step, Read):
            return session.read()
        if isinstance(step, Duplicate):
            session.needs_rollback = session.in_block
            return DUPLICATE
        session.write(show_path(path))
        return None

    def block(self, step, path, session, refused):
        around = session
        session = session or Session(self.committed)
        if step.durable and session.in_block:
            self.outcomes[path] = NOT_DURABLE
            return
        outer, self.outliving = self.outliving, []
        session.enter(step.savepoint)
        self.run(step.steps, path, session, False)
        self.hooks += session.leave(step.fails)
        self.outcomes[path] = Planned.__name__ if step.fails else None
        outliving, self.outliving = self.outliving, outer
        for body, path_of_body in outliving:
            self.run(body.steps, path_of_body, around, True)

    def savepoint(self, step, path, session, refused):
        session = session or Session(self.committed)
        if refused or session.needs_rollback:
            self.outcomes[path] = REFUSED
            return
        saved = set(session.written)
        self.run(step.steps, path, session, refused)
        if session.needs_rollback:
            self.outcomes[path] = REFUSED
            return
        if step.rollback and session.in_block:
            session.written = saved
        self.outcomes[path] = None

    def newconnection(self, step, path, session, refused):
        self.run(step.steps, path, Session(self.committed), False)

    def foreign(self, step, path, session, refused):
        self.run(step.steps, path, None, False)

    def outlive(self, step, path, session, refused):
        self.outliving.append((step, path))

    def siblings(self, step, path, session, refused):
        base = frozenset(self.committed) if session is None else session.read()
        paths = [
            list(walk(sibling.steps, (*path, number)))
            for number, sibling in enumerate(step.steps)
        ]
        written = [
            written_at_once(sibling, inner) for sibling, inner in zip(step.steps, paths)
        ]
        self.run(step.steps, path, session, refused)
        for number, inner in enumerate(paths):
            others = [
                names
                for other, groups in enumerate(written)
                for names in groups
                if other != number
            ]
            own = set()
            for path_of_statement, statement in inner:
                if isinstance(statement, Write):
                    own.add(show_path(path_of_statement))
                elif (
                    isinstance(statement, Read)
                    and self.outcomes[path_of_statement] != REFUSED
                ):
                    self.outcomes[path_of_statement] = AnyOf(base | own, others)


def written_at_once(sibling, steps):
    """Return sets of what others see of a sibling: all of each, or nothing."""
    names = [show_path(path) for path, step in steps if isinstance(step, Write)]
    if not isinstance(sibling, Block):
        return [frozenset([name]) for name in names]
    return [] if sibling.fails else [frozenset(names)]


# ##### What they do #####


class Program:
    """A run of a program."""

    def __init__(self, steps, model, timeout=PROGRAM_TIMEOUT):
        self.steps = steps
        self.model = model
        self.timeout = timeout
        self.outcomes = {}
        # Those that aren't expected.
        self.errors = []
        self.hooks = []

    def fail(self, path, error):
        self.outcomes[path] = type(error).__name__
        if self.model.outcomes.get(path) != self.outcomes[path]:
            lines = traceback.format_exception(error)
            self.errors.append(f"{show_path(path)}: {''.join(lines)}")

    # Statements, for both colours of code.

    def write_hook(self, path):
        self.hooks.append(path)

    async def awrite_hook(self, path):
        self.hooks.append(path)

    def statement(self, step, path):
        from rounds.models import Entry

        name, entries = show_path(path), Entry.objects
        match step:
            case Read(how="orm"):
                return frozenset(entry.name for entry in entries.all())
            case Read(how="iterator"):
                return frozenset(entry.name for entry in entries.iterator(chunk_size=2))
            case Read(how="raw"):
                with connection.cursor() as cursor:
                    cursor.execute("SELECT name FROM rounds_entry")
                    return frozenset(name for name, in cursor.fetchall())
            case Write(how="orm"):
                entries.create(name=name)
            case Write(how="bulk"):
                entries.bulk_create([Entry(name=name)])
            case Write(how="get_or_create"):
                entries.get_or_create(name=name)
            case Write(how="raw"):
                with connection.cursor() as cursor:
                    cursor.execute(INSERT, [name])
            case Duplicate():
                entries.create(name=EXISTING)
            case SetRollback():
                transaction.set_rollback(True)
            case OnCommit(how="function"):
                transaction.on_commit(functools.partial(self.write_hook, path))
            case OnCommit(how="coroutine"):
                transaction.on_commit(functools.partial(self.awrite_hook, path))

    async def astatement(self, step, path):
        from rounds.models import Entry

        name, entries = show_path(path), Entry.objects
        match step:
            case Read(how="orm"):
                return frozenset([entry.name async for entry in entries.all()])
            case Read(how="iterator"):
                iterator = entries.aiterator(chunk_size=2)
                return frozenset([entry.name async for entry in iterator])
            case Read(how="raw"):
                async with connection.acursor() as cursor:
                    await cursor.execute("SELECT name FROM rounds_entry")
                    return frozenset(name for name, in await cursor.fetchall())
            case Write(how="orm"):
                await entries.acreate(name=name)
            case Write(how="bulk"):
                await entries.abulk_create([Entry(name=name)])
            case Write(how="get_or_create"):
                await entries.aget_or_create(name=name)
            case Write(how="raw"):
                async with connection.acursor() as cursor:
                    await cursor.execute(INSERT, [name])
            case Duplicate():
                await entries.acreate(name=EXISTING)
            case SetRollback():
                await transaction.aset_rollback(True)
            case OnCommit(how="function"):
                await transaction.aon_commit(functools.partial(self.write_hook, path))
            case OnCommit(how="coroutine"):
                await transaction.aon_commit(functools.partial(self.awrite_hook, path))

    # Synchronous code.

    def run_steps(self, steps, path):
        for number, step in enumerate(steps):
            self.run_step(step, (*path, number))

    def run_step(self, step, path):
        method = getattr(self, type(step).__name__.lower(), None)
        if method is not None:
            method(step, path)
            return
        try:
            self.outcomes[path] = self.statement(step, path)
        except DatabaseError as error:
            self.fail(path, error)

    def block(self, step, path):
        atomic = transaction.atomic(savepoint=step.savepoint, durable=step.durable)

        def body():
            self.run_steps(step.steps, path)
            if step.fails:
                raise Planned

        try:
            if step.decorator:
                atomic(body)()
            else:
                with atomic:
                    body()
        except (Planned, RuntimeError) as error:
            self.fail(path, error)
        else:
            self.outcomes[path] = None

    def savepoint(self, step, path):
        try:
            sid = transaction.savepoint()
            self.run_steps(step.steps, path)
            if step.rollback:
                transaction.savepoint_rollback(sid)
            else:
                transaction.savepoint_commit(sid)
        except DatabaseError as error:
            self.fail(path, error)
        else:
            self.outcomes[path] = None

    def newconnection(self, step, path):
        with django.db.new_connection():
            self.run_steps(step.steps, path)

    def cross(self, step, path):
        async def body():
            await self.arun_steps(step.steps, path)

        if step.how == "asyncio.run":
            asyncio.run(body())
        else:
            async_to_sync(body)()

    def foreign(self, step, path):
        if asyncio._get_running_loop() is not None:
            # It's in the bridge.
            async_to_sync(self.aforeign)(step, path)
        elif step.how == "thread":
            self.thread.submit(self.run_steps, step.steps, path).result(PROGRAM_TIMEOUT)
        else:
            future = asyncio.run_coroutine_threadsafe(
                self.task.run(step.steps, path), self.loop
            )
            future.result(PROGRAM_TIMEOUT)

    # Asynchronous code.

    async def arun_steps(self, steps, path):
        for number, step in enumerate(steps):
            await self.arun_step(step, (*path, number))

    async def arun_step(self, step, path):
        method = getattr(self, f"a{type(step).__name__.lower()}", None)
        if method is not None:
            await method(step, path)
            return
        try:
            self.outcomes[path] = await self.astatement(step, path)
        except DatabaseError as error:
            self.fail(path, error)

    async def ablock(self, step, path):
        aatomic = transaction.aatomic(savepoint=step.savepoint, durable=step.durable)
        outliving = []

        async def body():
            for number, inner in enumerate(step.steps):
                await self.arun_step_of_block(inner, (*path, number), outliving)
            if step.fails:
                raise Planned

        try:
            if step.decorator:
                await aatomic(body)()
            else:
                async with aatomic:
                    await body()
        except (Planned, RuntimeError) as error:
            self.fail(path, error)
        else:
            self.outcomes[path] = None
        for ended, task in outliving:
            ended.set()
            await task

    async def arun_step_of_block(self, step, path, outliving):
        if not isinstance(step, Outlive):
            await self.arun_step(step, path)
            return
        ended = asyncio.Event()

        async def outlive():
            await ended.wait()
            await self.arun_steps(step.steps, path)

        outliving.append((ended, asyncio.create_task(outlive())))

    async def asavepoint(self, step, path):
        try:
            sid = await transaction.asavepoint_create()
            await self.arun_steps(step.steps, path)
            if step.rollback:
                await transaction.asavepoint_rollback(sid)
            else:
                await transaction.asavepoint_commit(sid)
        except DatabaseError as error:
            self.fail(path, error)
        else:
            self.outcomes[path] = None

    async def anewconnection(self, step, path):
        async with django.db.new_connection():
            await self.arun_steps(step.steps, path)

    async def across(self, step, path):
        def body():
            try:
                self.run_steps(step.steps, path)
            finally:
                if step.closes:
                    # Also those that are kept for the thread's event loops.
                    connections.close_all()

        match step.how:
            case "run_sync":
                await django.db.run_sync(body)
            case "sensitive":
                await sync_to_async(body)()
            case "insensitive":
                await sync_to_async(body, thread_sensitive=False)()
            case "to_thread":
                await asyncio.to_thread(body)

    async def atasks(self, step, path):
        events = [asyncio.Event() for _ in step.steps]

        async def work(number, body):
            if number:
                await events[number - 1].wait()
            try:
                await self.arun_steps(body.steps, (*path, number))
            finally:
                events[number].set()

        works = [work(number, body) for number, body in enumerate(step.steps)]
        if step.how == "gather":
            await asyncio.gather(*works)
        elif step.how == "TaskGroup":
            async with asyncio.TaskGroup() as group:
                for coroutine in works:
                    group.create_task(coroutine)
        else:
            for task in [asyncio.create_task(coroutine) for coroutine in works]:
                await task

    async def asiblings(self, step, path):
        context = {
            "own": None,
            "shared": contextvars.copy_context(),
            "outer": asyncio.current_task().get_context(),
        }[step.context]
        async with asyncio.TaskGroup() as group:
            for number, sibling in enumerate(step.steps):
                coroutine = self.arun_step(sibling, (*path, number))
                group.create_task(coroutine, context=context)

    async def aabandon(self, step, path):
        loop = asyncio.get_running_loop()
        ended, goes_on = loop.create_future(), threading.Event()

        def body():
            try:
                with contextlib.suppress(Planned), transaction.atomic():
                    self.statement(Write("orm"), path)
                    loop.call_soon_threadsafe(lambda: timeout.reschedule(loop.time()))
                    goes_on.wait(PROGRAM_TIMEOUT)
                    raise Planned
            finally:
                connections.close_all()
                loop.call_soon_threadsafe(ended.set_result, None)

        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None) as timeout:
                    await sync_to_async(body, thread_sensitive=False)()
            await self.arun_steps(step.steps, path)
        finally:
            goes_on.set()
            await ended

    async def abody(self, step, path):
        await self.arun_steps(step.steps, path)

    async def aforeign(self, step, path):
        if step.how == "thread":
            future = self.thread.submit(self.run_steps, step.steps, path)
        else:
            future = asyncio.run_coroutine_threadsafe(
                self.task.run(step.steps, path), self.loop
            )
        await asyncio.wrap_future(future)

    # The program.

    async def run(self):
        self.loop = asyncio.get_running_loop()
        with foreign_thread() as self.thread:
            async with asyncio.timeout(self.timeout), ForeignTask(self) as self.task:
                await self.arun_steps(self.steps, ())


class SyncProgram(Program):
    """A run of a program without asynchronous code."""

    @staticmethod
    def can_run(steps):
        return not any(isinstance(step, Outlive) for _, step in walk(steps))

    def run(self):
        with foreign_thread() as self.thread:
            self.run_steps(self.steps, ())

    def statement(self, step, path):
        if isinstance(step, OnCommit):
            step = OnCommit("function")
        return super().statement(step, path)

    def inline(self, step, path):
        self.run_steps(step.steps, path)

    body = cross = tasks = siblings = abandon = inline

    def foreign(self, step, path):
        self.thread.submit(self.run_steps, step.steps, path).result(PROGRAM_TIMEOUT)


@contextlib.contextmanager
def foreign_thread():
    """Yield an executor whose thread is there, and close its connections."""
    with ThreadPoolExecutor(1, "foreign") as executor:
        executor.submit(int).result()
        try:
            yield executor
        finally:
            executor.submit(connections.close_all).result(PROGRAM_TIMEOUT)


class ForeignTask:
    """A task that's there before a program, and runs steps for it."""

    def __init__(self, program):
        self.program = program
        self.queue = asyncio.Queue()

    async def __aenter__(self):
        self.worker = asyncio.create_task(self.work())
        return self

    async def __aexit__(self, *exc_info):
        self.queue.put_nowait(None)
        await self.worker

    async def work(self):
        while (item := await self.queue.get()) is not None:
            steps, path, done = item
            try:
                await self.program.arun_steps(steps, path)
            except Exception as error:
                if not done.done():
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(None)

    async def run(self, steps, path):
        done = self.program.loop.create_future()
        self.queue.put_nowait((steps, path, done))
        await done


# ##### The round #####


class OutOfTime(BaseException):
    """There's no time left to find a smaller program."""


class Programs(Round):
    name = "programs"
    pool = False

    def settings(self, database):
        settings = super().settings(database)
        if self.database == "postgres":
            # A lock that's never released must not look like patience.
            database["OPTIONS"]["options"] = f"-c lock_timeout={PROGRAM_TIMEOUT // 2}s"
            self.pool = self.random.random() < 0.5
            if self.pool:
                # It reports connections that come back closed.
                logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
                database["OPTIONS"]["pool"] = {"min_size": 1, "max_size": 20}
        return settings

    def run(self):
        from django.db import sharing

        # A turn that never comes is found sooner.
        sharing.TURN_TIMEOUT = PROGRAM_TIMEOUT // 2
        self.counts = {"programs": 0, "steps": 0, "sync programs": 0}
        self.found = None
        end = self.deadline()
        with self.observer() as self.watcher:
            while time.monotonic() < end:
                self.run_batch(end)
        return self.counts

    def run_batch(self, end):
        place = Place(self.database, self.mode == "native", self.pool)

        @hypothesis.seed(self.random.getrandbits(32))
        @hypothesis.settings(
            max_examples=PROGRAMS_PER_BATCH,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(steps_at(place, min_size=1))
        def test(steps):
            if self.found is None and time.monotonic() > end:
                return
            if self.found is not None and time.monotonic() > self.shrinking_ends:
                raise OutOfTime
            try:
                self.check_program(steps)
            except Violation as violation:
                if self.found is None:
                    self.shrinking_ends = time.monotonic() + SHRINKING_TIMEOUT
                # The last one is the smallest.
                self.found = violation
                raise

        try:
            test()
        except (Exception, OutOfTime):
            if self.found is None:
                raise
            raise self.found from None

    def check_program(self, steps):
        """Raise Violation unless a program does what it must."""
        self.counts["programs"] += 1
        self.counts["steps"] += sum(1 for _ in walk(steps))
        model = Model(steps)
        with self.limited(steps):
            if SyncProgram.can_run(steps):
                self.counts["sync programs"] += 1
                program = SyncProgram(steps, model)
                self.compare(program, program.run, "Without asynchronous code")
            timeout = PROGRAM_TIMEOUT
            if self.found is not None:
                timeout = PROGRAM_TIMEOUT_WHILE_SHRINKING
            program = Program(steps, model, timeout)
            self.compare(program, lambda: self.run_async(program.run()), "With tasks")

    def compare(self, program, run, how):
        empty = EMPTY.get(self.watcher.vendor, "DELETE FROM rounds_entry")
        self.watcher.rows(empty)
        self.watcher.rows(INSERT, EXISTING)
        shown, model = show(program.steps), program.model
        try:
            run()
        except Violation as violation:
            violation.reproduction = f"{shown}\n\n{violation.reproduction}"
            raise
        except Exception as error:
            raise Violation(
                f"{how}, a program failed. {type(error).__name__}: {error}",
                f"{shown}\n\n{traceback.format_exc()}",
            ) from error
        rows = self.watcher.rows("SELECT name FROM rounds_entry")
        differences = [
            f"{show_path(path)}: expected {outcome}, got {program.outcomes.get(path)}"
            for path, outcome in model.outcomes.items()
            if path not in program.outcomes or outcome != program.outcomes[path]
        ]
        for what, expected, actual in (
            ("called after COMMIT", model.hooks, program.hooks),
            ("committed", model.committed, {name for name, in rows}),
        ):
            if expected != actual:
                differences.append(f"{what}: expected {expected}, got {actual}")
        if query := IN_TRANSACTION.get(self.watcher.vendor):
            # A pool may be preparing one.
            if sessions := remaining(lambda: self.watcher.rows(query), patience=2):
                differences.append(f"sessions in a transaction: {sessions}")
        if differences:
            raise Violation(
                f"{how}, a program did what it must not. {differences[0]}",
                "\n".join([shown, "", *differences, *program.errors]),
            )

    @contextlib.contextmanager
    def limited(self, steps):
        """Give up if it takes too long, and tell which program it was."""

        def give_up():
            faulthandler.dump_traceback()
            worker.give_up("A program didn't end.", show(steps))

        timer = threading.Timer(2 * PROGRAM_TIMEOUT, give_up)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
