import asyncio
import os
import threading
from contextlib import suppress

# What a client sends first to have the connection encrypted.
SSL_REQUEST = (8).to_bytes(4) + (80877103).to_bytes(4)


class Relay:
    """
    A TCP server, in a thread of its own, that leads to a database server which
    may be reachable by its Unix socket only. With an SSLContext, it encrypts
    what it exchanges with clients, as PostgreSQL would.

    It's a context manager, whose value is the port.
    """

    def __init__(self, host, port, ssl_context=None):
        self.host = host or "/var/run/postgresql"
        self.port = port or 5432
        self.ssl_context = ssl_context
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._tasks = set()

    def __enter__(self):
        self._thread.start()
        return self._run(self._start())

    def __exit__(self, *exc_info):
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _start(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def _stop(self):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self._tasks.add(task := asyncio.current_task())
        # What ends one direction, or never gets to begin, ends both.
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            if self.ssl_context is not None:
                if await reader.readexactly(8) != SSL_REQUEST:
                    raise ConnectionError
                writer.write(b"S")
                await writer.start_tls(self.ssl_context)
            server_reader, server_writer = await self._connect()
            try:
                await asyncio.wait(
                    [
                        asyncio.ensure_future(_copy(reader, server_writer)),
                        asyncio.ensure_future(_copy(server_reader, writer)),
                    ],
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                server_writer.close()
        writer.close()
        self._tasks.discard(task)

    async def _connect(self):
        if self.host.startswith(("/", "@")):
            path = os.path.join(self.host, f".s.PGSQL.{self.port}")
            return await asyncio.open_unix_connection(path)
        return await asyncio.open_connection(self.host, self.port)


async def _copy(reader, writer):
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
