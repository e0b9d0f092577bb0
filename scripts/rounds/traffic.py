"""
A real project under a real server, used by real clients.

The round starts uvicorn with rounds.project, and lets clients do what users do
in random order: sign in, buy, look around, download, write by a websocket, use
the admin, and leave in the middle of it. Each remembers what it was answered,
which must agree with what's in the database at the end. The seed decides about
the project's settings as well: pools, ATOMIC_REQUESTS, the middleware, where
sessions are, and the server's event loop.
"""

import asyncio
import atexit
import base64
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from importlib.util import find_spec

import httpx
from rounds.base import Observer, Round, Violation
from rounds.clients import ITEMS, JOBS, PRODUCTS, STOCK, TIMEOUT, USERS, Client

LOOPS = ["asyncio", "uvloop"] if find_spec("uvloop") else ["asyncio"]

# Seconds to start and to stop the server, and for it to be done with requests
# whose clients have left.
START_TIMEOUT = 30
STOP_TIMEOUT = 15
PATIENCE = 10

# The connections that a request of the project may have to a database, without
# a pool: one for its transactions, one for the rest. In native mode, that's
# one for tasks and one for synchronous code in threads.
MOST_OPENED = {"thread": 2, "native": 3}

# Lines of the server's log which tell that something is wrong.
FINDINGS = re.compile(
    r"Traceback|Warning|never awaited|never retrieved|was destroyed|ERROR|CRITICAL"
    r"|Exception ignored|^Error|Future exception"
)

# What they may be a part of: what asyncio's debug mode finds slow, and what
# Django prints with or without the fork, as it doesn't close a stream that the
# client has left before the connection. If the client leaves when a
# synchronous middleware has just called async_to_sync(), asgiref leaves the
# executor of that call in the task's context, where the next sync_to_async()
# finds it.
EXPECTED = re.compile(
    r"^Executing <.* took \d+\.\d+ seconds$"
    r"|^ERROR:    Exception in ASGI application\nTraceback.*\n( .*\n)+"
    r" +await (signals\.request_finished\.asend|sync_to_async\(response\.close\))\("
    r".*\n( .*\n)+"
    r"RuntimeError: CurrentThreadExecutor already quit or is broken$"
    r"|^Exception ignored in: <generator object cursor_iter .*\n"
    r"(Traceback.*\n( .*\n)+)?"
    r".*(ProgrammingError: Cannot operate on a closed database\.|\(2006, ''\))$",
    re.MULTILINE,
)

STEPS_SHOWN = 15

# Lines, in which all threads have a place.
LOG_SHOWN = 300


class Traffic(Round):
    name = "traffic"

    def __init__(self, *args):
        super().__init__(*args)
        self.clients_number = self.random.randint(3, 4 if self.is_sqlite else 8)
        self.options = self.choose_options()
        self.clients = []

    @property
    def is_sqlite(self):
        return self.database == "sqlite"

    def choose_options(self):
        choose = self.random.choice
        look_around = "rounds.project.middleware.look_around"
        note_visits = "rounds.project.middleware.note_visits"
        return {
            "middleware": choose(
                [
                    [note_visits],
                    [note_visits, look_around],
                    [look_around, note_visits],
                ]
            ),
            # On SQLite, a transaction locks a database, and two of them must
            # be locked in the same order by everyone.
            "atomic": choose(
                [[], ["default"]]
                if self.is_sqlite
                else [[], ["default"], ["other"], ["default", "other"]]
            ),
            "pool": self.database == "postgres" and choose([True, False]),
            "sessions": choose(["db", "cached_db"]),
            "flags": choose([["-X", "dev"], ["-W", "default"]]),
            "loop": choose(LOOPS),
            "users": USERS,
            "products": PRODUCTS,
            "stock": STOCK,
            "items": ITEMS,
        }

    @property
    def pool_size(self):
        """
        Return a size that isn't enough for all clients, but which requests
        that wait for their last connection don't exhaust.
        """
        return self.clients_number * (MOST_OPENED[self.mode] - 1) + 3

    def make_databases(self, default):
        default = {"ASYNC_NATIVE": False, **default, "CONN_MAX_AGE": 0}
        databases = {}
        for alias in ("default", "other"):
            options = dict(default["OPTIONS"])
            settings = {**default, "OPTIONS": options}
            if self.is_sqlite:
                settings["NAME"] += f"-{alias}"
            if self.database == "postgres":
                options["application_name"] = alias
            if self.options["pool"]:
                options["pool"] = {
                    "min_size": 0,
                    "max_size": self.pool_size,
                    "timeout": TIMEOUT,
                }
            settings["ATOMIC_REQUESTS"] = alias in self.options["atomic"]
            databases[alias] = settings
        return databases

    def settings(self, database):
        self.options["databases"] = self.make_databases(database)
        # This process uses no database but by observers.
        return super().settings(database)

    def observer(self, alias="default"):
        return Observer(self.options["databases"][alias])

    # ##### The process #####

    def set_up(self):
        self.directory = tempfile.TemporaryDirectory(prefix="traffic-")
        self.env = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "rounds.project.settings",
            "GAUNTLET_PROJECT": json.dumps(self.options),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONFAULTHANDLER": "1",
        }
        command = [sys.executable, "-m", "rounds.project.prepare"]
        subprocess.run(command, env=self.env, check=True, timeout=START_TIMEOUT)
        self.start_server()

    def start_server(self):
        self.log_path = pathlib.Path(self.directory.name, "log")
        with (
            socket.create_server(("127.0.0.1", 0), backlog=128) as listener,
            open(self.log_path, "wb") as log,
        ):
            self.address = "127.0.0.1:%d" % listener.getsockname()[1]
            self.server = subprocess.Popen(
                [
                    sys.executable,
                    *self.options["flags"],
                    "-m",
                    "uvicorn",
                    f"--fd={listener.fileno()}",
                    f"--loop={self.options['loop']}",
                    "--http=h11",
                    "--ws=wsproto",
                    "--log-level=warning",
                    f"--timeout-graceful-shutdown={STOP_TIMEOUT}",
                    "rounds.project.asgi:application",
                ],
                env=self.env,
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        atexit.register(self.server.kill)

    def stop_server(self):
        """Let the server shut down, and look at how that went."""
        self.server.terminate()
        try:
            code = self.server.wait(2 * STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            # It prints where its threads are.
            self.server.send_signal(signal.SIGABRT)
            self.server.wait()
            raise self.violation("The server doesn't shut down.") from None
        finally:
            atexit.unregister(self.server.kill)
        # uvicorn ends by the signal it was sent.
        if code not in (0, -signal.SIGTERM):
            raise self.violation(f"The server has ended with {code}.")

    def log(self):
        """Return what the server has logged and wasn't expected."""
        return EXPECTED.sub("", self.log_path.read_text(errors="replace"))

    def violation(self, message, steps=()):
        """Return a Violation with all that's needed to understand it."""
        shown = {key: self.options[key] for key in list(self.options)[:6]}
        lines = [f"{name}: {value}" for name, value in shown.items()]
        lines += [f"clients: {self.clients_number}", "steps:", *map(str, steps)]
        lines += ["the server's log:", *self.log().splitlines()[-LOG_SHOWN:]]
        return Violation(message, "\n".join(lines))

    # ##### The round #####

    def warm_up(self):
        """Do everything once, and two things at once."""
        if self.clients:
            # What's done in this process the second time isn't in the server.
            return
        asyncio.run(self.drive(self.warm_up_client, 2))
        self.before = asyncio.run(self.settled_state())

    async def warm_up_client(self, client):
        for action in client.actions():
            await action()
        for kind in JOBS:
            await client.start_job(kind)

    def run(self):
        deadline = self.deadline()

        async def use(client):
            while time.monotonic() < deadline:
                await client.act()

        with self.watch_sessions() as most:
            asyncio.run(self.drive(use, self.clients_number))
        after = asyncio.run(self.settled_state(self.before))
        self.check_state(after, most)
        self.count_memory(self.before["memory"], after["memory"])
        return {**self.count(), "longest stall, ms": round(1000 * after["stall"])}

    def count(self):
        """Return what to tell of the round, and which settings it had."""
        orders = self.known("orders")
        return {
            "requests": sum(len(client.steps) for client in self.clients),
            "orders": len(orders["yes"]),
            "failed requests": len(orders["no"]),
            "interrupted requests": len(orders["unknown"]),
            "rounds with a pool": int(self.options["pool"]),
            "rounds with ATOMIC_REQUESTS": int(bool(self.options["atomic"])),
        }

    async def drive(self, use, number):
        """Let clients use the server, and keep what they know."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(number):
                    client = Client(self, len(self.clients))
                    self.clients.append(client)
                    group.create_task(self.use(client, use))
        except ExceptionGroup as group:
            # The others were cancelled, or failed of the same cause.
            raise group.exceptions[0] from None

    async def use(self, client, use):
        async with client:
            try:
                await use(client)
            except Violation:
                raise
            except Exception as error:
                message = f"A request has failed. {type(error).__name__}: {error}"
                steps = client.steps[-STEPS_SHOWN:]
                if isinstance(error, (TimeoutError, httpx.TimeoutException)):
                    steps += await self.hanging()
                raise self.violation(message, steps) from error

    @contextlib.contextmanager
    def watch_sessions(self):
        """Yield the most sessions that each database has at the same time."""
        most, ended = Counter(), threading.Event()

        def watch():
            with self.observer() as observer:
                last = Counter()
                while not ended.wait(0.05):
                    found = Counter(
                        name
                        for [name] in observer.rows(
                            "SELECT application_name FROM pg_stat_activity "
                            "WHERE datname = current_database() "
                            "AND pid <> pg_backend_pid()"
                        )
                    )
                    # One that's just being replaced is counted twice, but not
                    # for long.
                    for name, number in (found & last).items():
                        most[name] = max(most[name], number)
                    last = found

        if self.database != "postgres":
            yield most
            return
        thread = threading.Thread(target=watch, name="watch_sessions")
        thread.start()
        try:
            yield most
        finally:
            ended.set()
            thread.join()

    # ##### What's left in the process #####

    async def state(self):
        async with httpx.AsyncClient(timeout=TIMEOUT) as client:
            response = await client.get(f"http://{self.address}/state/")
            return response.json()

    async def hanging(self):
        """Return what the server does, as lines, and let its log say more."""
        self.server.send_signal(signal.SIGUSR1)
        lines = ["the sessions:", *map(str, self.sessions()), "the server's tasks:"]
        try:
            async with httpx.AsyncClient(timeout=PATIENCE) as client:
                response = await client.get(f"http://{self.address}/tasks/")
        except httpx.HTTPError as error:
            return [*lines, f"It doesn't say: {error!r}"]
        return [*lines, *response.json()]

    async def settled_state(self, before=None):
        """
        Return what the process has when it's done with what it was told. Wait
        for a while if there's more than before.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            state = await self.state()
            is_done = not state["active"] and not state["jobs"]
            if is_done and (before is None or not more_than(before, state)):
                sessions = self.sessions()
                if not sessions:
                    return state
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        if not is_done:
            raise self.violation(
                f"{state['active']} requests and {state['jobs']} jobs haven't ended."
            )
        if before is not None and (more := more_than(before, state)):
            raise self.violation("The server has more than before: " + ", ".join(more))
        raise self.violation(f"Sessions were left: {sessions}")

    def sessions(self):
        """
        Return the sessions of the server that should be closed: all of them
        without a pool, and with one those that are in use.
        """
        queries = {
            "postgres": "SELECT application_name, state, query FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            "mariadb": "SELECT id, command, info FROM information_schema.processlist "
            "WHERE db = database() AND id <> connection_id()",
        }
        if self.is_sqlite:
            return []
        with self.observer() as observer:
            sessions = observer.rows(queries[self.database])
        if self.options["pool"]:
            return [session for session in sessions if session[1] != "idle"]
        return sessions

    def check_state(self, state, most):
        if state["stack"]:
            raise self.violation(
                f"The event loop was stalled for {state['stall']:.2f} s.",
                state["stack"].splitlines(),
            )
        for path, number in state["most_opened"].items():
            if not self.options["pool"] and number > MOST_OPENED[self.mode]:
                raise self.violation(
                    f"A request of {path} has opened {number} connections to a "
                    "database.",
                    sorted(state["most_opened"].items()),
                )
        for alias in ("default", "other"):
            if self.options["pool"] and most[alias] > self.pool_size:
                raise self.violation(
                    f"There were {most[alias]} sessions for {alias!r}, which has a "
                    f"pool of {self.pool_size}."
                )

    # ##### What's left in the database #####

    def check(self):
        self.stop_server()
        self.check_log()
        with self.observer() as default, self.observer("other") as other:
            self.check_orders(default, other)
            self.check_jobs(other)
            self.check_written(default)
            self.check_sessions(default)
        self.directory.cleanup()

    def check_log(self):
        found = [line for line in self.log().splitlines() if FINDINGS.search(line)]
        if found:
            raise self.violation(f"The server has logged: {found[0]}")

    def known(self, kind):
        """Return what clients know: names, by what they were answered."""
        known = {"yes": set(), "no": set(), "unknown": set()}
        for client in self.clients:
            for name, answer in client.known[kind].items():
                known[answer].add(name)
        return known

    def compare(self, what, found, known):
        """Raise Violation unless a list of names is as clients know it."""
        twice = [name for name, number in Counter(found).items() if number > 1]
        lost = known["yes"].difference(found)
        left = known["no"].intersection(found)
        alien = set(found).difference(*known.values())
        for names, message in (
            (lost, "was confirmed and isn't there"),
            (left, "was refused or failed, and is there"),
            (alien, "is there and was never asked for"),
            (twice, "is there twice"),
        ):
            if names:
                name = sorted(names)[0]
                raise self.violation(
                    f"{what} {message}: {name} ({len(names)} in all).",
                    self.steps_of(name),
                )

    def steps_of(self, name):
        for client in self.clients:
            for index, step in enumerate(client.steps):
                if name in step:
                    return client.steps[max(0, index - STEPS_SHOWN) : index + 2]
        return []

    def check_orders(self, default, other):
        orders = {
            name: pk for pk, name in default.rows("SELECT id, name FROM shop_order")
        }
        self.compare("An order", list(orders), self.known("orders"))
        audits = [
            name
            for [name] in other.rows("SELECT name FROM shop_audit")
            if " " not in name
        ]
        known = self.known("orders")
        # Those of interrupted requests are there if they were committed.
        for name in known.pop("unknown"):
            known["yes" if name in orders else "no"].add(name)
        known["unknown"] = set()
        self.compare("What on_commit() has written", audits, known)
        for query, message in (
            (
                "SELECT name FROM shop_order WHERE NOT is_complete",
                "half of a transaction is there",
            ),
            ("SELECT order_id FROM shop_gift", "a savepoint wasn't rolled back"),
            (
                "SELECT o.name FROM shop_order o LEFT JOIN shop_event e "
                "ON e.order_id = o.id GROUP BY o.name "
                "HAVING count(DISTINCT e.kind) <> 2 OR count(*) <> 2",
                "receivers' rows are missing, or there twice",
            ),
            (
                "SELECT p.name, p.stock, sum(l.quantity) FROM shop_product p "
                "LEFT JOIN shop_line l ON l.product_id = p.id "
                "GROUP BY p.id, p.name, p.stock "
                f"HAVING p.stock + coalesce(sum(l.quantity), 0) <> {STOCK}",
                "stock and orders don't add up",
            ),
        ):
            if rows := default.rows(query):
                raise self.violation(
                    f"Orders: {message}: {rows[0]} ({len(rows)} in all).",
                    self.steps_of(str(rows[0][0])),
                )

    def check_jobs(self, other):
        rows = other.rows("SELECT name, kind FROM shop_job")
        self.compare("A job", [name for name, kind in rows], self.known("jobs"))
        if outlived := [name for name, kind in rows if kind == "outlived"]:
            raise self.violation(
                f"A task has written after the end of its block: {outlived[0]}",
                self.steps_of(outlived[0]),
            )
        gathered = [name for [name] in other.rows("SELECT name FROM shop_audit")]
        gathered = [name for name in gathered if " " in name]
        self.compare("What gather() has written", gathered, self.known("gathered"))

    def check_written(self, default):
        for table, kind in (("shop_message", "messages"), ("shop_notice", "notices")):
            names = [name for [name] in default.rows(f"SELECT name FROM {table}")]
            self.compare(table, names, self.known(kind))
        logged = default.rows("SELECT object_repr FROM django_admin_log")
        self.compare(
            "The admin's log", [name for [name] in logged], self.known("notices")
        )
        visits = dict(default.rows("SELECT name, status FROM shop_visit"))
        for client in self.clients:
            for name, status in client.statuses.items():
                if visits.get(name) != status:
                    raise self.violation(
                        f"Middleware has noted {visits.get(name)} for {name}, which "
                        f"was answered {status}.",
                        self.steps_of(name),
                    )
        logins = dict(
            default.rows("SELECT kind, count(*) FROM shop_login GROUP BY kind")
        )
        expected = sum(client.logins for client in self.clients)
        if expected and logins != {"sync": expected, "async": expected}:
            raise self.violation(f"There were {expected} logins, and rows of {logins}.")

    def check_sessions(self, default):
        """Look for a session that has what's another user's."""
        names = dict(default.rows("SELECT id, username FROM auth_user"))
        for [data] in default.rows("SELECT session_data FROM django_session"):
            session = decoded(data)
            user = names.get(int(session.get("_auth_user_id", 0)))
            token = session.get("token")
            # That of the admin has none.
            if token is not None and token != f"token of {user}":
                raise self.violation(f"A session of {user} has the {token}.")


def decoded(data):
    """Return what a session has."""
    payload = data.split(":")[0]
    is_compressed = payload.startswith(".")
    payload = payload.lstrip(".")
    content = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    return json.loads(zlib.decompress(content) if is_compressed else content)


def more_than(before, state):
    """Return what there's more of in a state than there was, as text."""
    return [
        f"{number} {name!r} of its {kind}"
        for kind, counted in state["held"].items()
        for name, number in (Counter(counted) - Counter(before["held"][kind])).items()
    ]
