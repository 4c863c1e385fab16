"""The process: its address, its signals, and its end."""

import asyncio
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from ipaddress import ip_address

import uvicorn

from coadapt.serving.app import Serving, build

POLL = 0.05
KEPT_ALIVE = 30
"""Seconds for which a connection stays open between requests."""


def bound(host: str, port: int, key: str | None) -> socket.socket:
    """A socket at that address, which listens to nobody yet. Port 0 is a free one.

    Raises:
        ValueError: others could reach it and there is no key, it is taken, or there is no such address here.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host}: there is no such address ({error.strerror}).") from error
    if key is None and not ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ValueError(
            f"--host {host}: others could reach this address, so clients must have a key: --api-key KEY, or "
            "COADAPT_API_KEY in the environment."
        )
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(0)  # now, so that it is ours; nobody is answered before the models are there
    except OSError as error:
        made.close()
        raise ValueError(
            f"--port {port} on {host} cannot be had: {error.strerror}. Choose another; --port 0 takes a free one."
        ) from error
    return made


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Nothing: `serve` hears the signals itself."""
        yield


class Service:
    """One server, from its start to its end.

    Args:
        where: a socket, as of `bound`.
        stop_after: seconds that what runs has to finish when the server is stopped.
    """

    def __init__(self, serving: Serving, where: socket.socket, *, stop_after: float) -> None:
        self.serving, self.where, self.stop_after = serving, where, stop_after
        self._first, self._second = asyncio.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, ready: Callable[[], None]) -> None:
        """Answers until it is stopped, by `stop` or a signal. `ready` is called when it answers."""
        self._loop = asyncio.get_running_loop()
        config = uvicorn.Config(
            build(self.serving),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEPT_ALIVE,
            timeout_graceful_shutdown=2,
            backlog=512,
        )
        server = _Server(config)
        self.serving.engine.start()
        answering = asyncio.ensure_future(server.serve(sockets=[self.where]))
        stopping = asyncio.ensure_future(self._stopped())
        try:
            with self._signals():
                while not server.started and not answering.done():
                    await asyncio.sleep(POLL / 10)
                if server.started:
                    ready()
                await asyncio.wait((answering, stopping), return_when=asyncio.FIRST_COMPLETED)
                server.should_exit = True
                await answering
        finally:
            stopping.cancel()
            await asyncio.to_thread(self.serving.engine.stop, finish=False)

    def stop(self) -> None:
        """The first time nothing new is let in, the second time what runs is ended. For any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        (self._second if self._first.is_set() else self._first).set()
        self.serving.state.stopping = True

    @contextmanager
    def _signals(self) -> Generator[None]:
        """Context in which signals stop it, where it runs on the main thread."""
        loop, heard = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        try:
            for number in heard:
                loop.add_signal_handler(number, self._hear)
        except (ValueError, RuntimeError, NotImplementedError):  # another thread, or Windows
            yield
            return
        try:
            yield
        finally:
            for number in heard:
                loop.remove_signal_handler(number)

    async def _stopped(self) -> None:
        """Until it was stopped, and nothing runs any more."""
        await self._first.wait()
        until = asyncio.get_running_loop().time() + self.stop_after
        while self.serving.state.running and not self._second.is_set():
            if asyncio.get_running_loop().time() >= until:
                break
            await asyncio.sleep(POLL)
        if self.serving.state.running:
            # Every row hears that it is cancelled, and says so to its client.
            await asyncio.to_thread(self.serving.engine.stop, finish=False)
