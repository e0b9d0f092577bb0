"""
A proxy before a PostgreSQL server that breaks connections where it's told to.

It forwards what clients and the server send message by message, and asks
decide() about each one: a connection can be cut before the message, in the
middle of it or after it. It can be half-open: silent, as if a firewall had
forgotten it, until it's reset, as TCP's user timeout does. A message can also
be delayed.

The proxy refuses encryption, so that it can read what's sent.
"""

import asyncio
import contextlib
import pathlib
import struct
import threading
from typing import NamedTuple

CUT_BEFORE = "cut before"
CUT_INSIDE = "cut inside"
CUT_AFTER = "cut after"

CUTS = [CUT_BEFORE, CUT_INSIDE, CUT_AFTER]

# What precedes the first message with a type.
PROTOCOL_3 = 3
ENCRYPTION_REQUESTS = {80877103, 80877104}

# Seconds in which the proxy has to start and stop.
TIMEOUT = 10

# How sessions end.
ENDS = OSError, asyncio.IncompleteReadError, asyncio.CancelledError


class Delay(NamedTuple):
    """Forward the message later."""

    seconds: float


class Silence(NamedTuple):
    """Forward nothing any more, and cut the connection later."""

    seconds: float


class Message(NamedTuple):
    """
    What was sent, and by whom: "client" or "server". The first message of a
    session, and one that cancels a query, have no type.
    """

    sender: str
    type: bytes
    body: bytes

    @property
    def data(self):
        return self.type + struct.pack("!i", len(self.body) + 4) + self.body

    def has_query(self, sql):
        """Return whether it begins the execution of a statement."""
        # The statement is a string of C, which follows its name in "P".
        start = {b"Q": sql + b"\0", b"P": b"\0" + sql + b"\0"}.get(self.type)
        return start is not None and self.body.startswith(start)


class Proxy:
    """
    Listen on a port of localhost while the block is running.

    `host` and `port` are the server's; a directory as `host` is that of its
    unix socket. `decide` is called in the proxy's thread with each Message,
    and returns one of CUTS, a Silence, a Delay, or None to forward it. It can
    be replaced at any time.
    """

    def __init__(self, host, port=5432, decide=lambda message: None):
        self.server_address = host, int(port or 5432)
        self.decide = decide
        self.port = None
        self._writers = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve()), name="proxy", daemon=True
        )

    def __enter__(self):
        self._thread.start()
        if not self._ready.wait(TIMEOUT):
            raise RuntimeError("The proxy doesn't start.")
        return self

    def __exit__(self, *exc_info):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(TIMEOUT)
        if self._thread.is_alive():
            raise RuntimeError("The proxy doesn't stop.")

    def settings(self, database):
        """Return an entry of DATABASES whose connections are proxied."""
        options = {**database.get("OPTIONS", {}), "sslmode": "disable"}
        host, port = "127.0.0.1", str(self.port)
        return {**database, "HOST": host, "PORT": port, "OPTIONS": options}

    def once(self, action, matches):
        """Do something to the next message that `matches`. Return an Event."""
        happened = threading.Event()

        def decide(message):
            if happened.is_set() or not matches(message):
                return None
            happened.set()
            return action

        self.decide = decide
        return happened

    def cut_all(self):
        """Cut all connections that there are."""
        done = threading.Event()

        def cut():
            for writer in self._writers:
                writer.transport.abort()
            done.set()

        self._loop.call_soon_threadsafe(cut)
        done.wait(TIMEOUT)

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._sessions = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for session in list(self._sessions):
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    async def _accept(self, reader, writer):
        session = asyncio.current_task()
        writers = [writer]
        self._sessions.add(session)
        # Nobody awaits this task. A reset or a server that's down ends it.
        with contextlib.suppress(*ENDS):
            try:
                self._writers.add(writer)
                server_reader, server_writer = await self._connect()
                writers.append(server_writer)
                self._writers.add(server_writer)
                await self._serve_session(reader, writer, server_reader, server_writer)
            finally:
                self._sessions.discard(session)
                self._writers.difference_update(writers)
                for each in writers:
                    # What was written is sent before.
                    each.close()

    async def _serve_session(self, reader, writer, server_reader, server_writer):
        first = await self._first_message(reader, writer)
        silence = await self._forward(first, server_writer)
        if silence is None:
            pumps = [
                asyncio.create_task(self._pump("client", reader, server_writer)),
                asyncio.create_task(self._pump("server", server_reader, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                results = await asyncio.gather(*pumps, return_exceptions=True)
            silence = next((each for each in results if isinstance(each, float)), 0)
        await asyncio.sleep(silence)

    async def _connect(self):
        host, port = self.server_address
        if host.startswith("/"):
            path = pathlib.Path(host) / f".s.PGSQL.{port}"
            return await asyncio.open_unix_connection(path)
        return await asyncio.open_connection(host or "localhost", port)

    async def _first_message(self, reader, writer):
        while True:
            body = await self._body(reader)
            if struct.unpack("!i", body[:4])[0] not in ENCRYPTION_REQUESTS:
                return Message("client", b"", body)
            writer.write(b"N")

    async def _body(self, reader):
        (length,) = struct.unpack("!i", await reader.readexactly(4))
        return await reader.readexactly(length - 4)

    async def _pump(self, sender, reader, writer):
        """
        Forward the messages of one side, until the connection is cut. Return
        the seconds for which it's silent before.
        """
        while True:
            kind = await reader.readexactly(1)
            message = Message(sender, kind, await self._body(reader))
            silence = await self._forward(message, writer)
            if silence is not None:
                return silence

    async def _forward(self, message, writer):
        action = self.decide(message)
        if action == CUT_BEFORE:
            return 0.0
        if action == CUT_INSIDE:
            writer.write(message.data[: len(message.data) // 2])
            return 0.0
        if isinstance(action, Silence):
            return float(action.seconds)
        if isinstance(action, Delay):
            await asyncio.sleep(action.seconds)
        writer.write(message.data)
        await writer.drain()
        return 0.0 if action == CUT_AFTER else None
