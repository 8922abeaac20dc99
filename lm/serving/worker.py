"""The thread that owns an engine, and what connections of an event loop hold of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from lm.inference.engine import Engine
from lm.inference.requests import Event, Request

_log = logging.getLogger(__name__)


class EngineFailed(Exception):
    """The engine has met a fault of its own; the server can do no more."""


class Ticket:
    """The requests of one connection: their numbers, and their events as they come.

    Always `close` it; what still runs is then cancelled.
    """

    def __init__(self, worker: Worker):
        self._worker = worker
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event | EngineFailed] = asyncio.Queue()
        self.numbers: list[int] = []

    async def event(self) -> Event:
        """The next event of any of the requests.

        Raises:
          EngineFailed: there will be none.
        """
        event = await self.events.get()
        if isinstance(event, EngineFailed):
            raise event
        return event

    def cancel(self, number: int) -> None:
        """Ends one request; no event of it is worth reading from now on."""
        self._worker.post(lambda: self._worker.forget([number]))

    def close(self) -> None:
        """Ends what still runs."""
        numbers = self.numbers
        self._worker.post(lambda: self._worker.forget(numbers))


class Worker:
    """Runs `Engine.step` in a thread while there is anything to do.

    All that touches the engine is done by that thread, between two steps, in the order of asking.

    Attributes:
      failure: what ended the thread before its time; None while all is well.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.failure: EngineFailed | None = None
        self._tickets: dict[int, Ticket] = {}  # the thread's own
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread once nothing runs."""
        self._inbox.put(None)
        self._thread.join()

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Hands requests to the engine, all or none.

        Raises:
          QueueFull, ConfigError: as `Engine.submit` does.
          EngineFailed: there is no engine any more.
        """
        ticket = Ticket(self)

        def work() -> None:
            try:
                for request in requests:
                    ticket.numbers.append(self.engine.submit(request))
            except BaseException:
                for number in ticket.numbers:
                    self.engine.cancel(number)
                raise
            self._tickets.update(dict.fromkeys(ticket.numbers, ticket))

        try:
            await self._asked(work)
        except asyncio.CancelledError:
            ticket.close()  # comes after `work`, whether that is done or not
            raise
        return ticket

    async def _asked(self, function: Callable[[], Any]) -> Any:
        """What `function` returns, called by the thread between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error else future.set_result(result)

        def work() -> None:
            result, error = None, None
            try:
                if self.failure:
                    raise self.failure
                result = function()
            except Exception as raised:
                error = raised
            _call(loop, settle, result, error)

        self.post(work)
        return await future

    def post(self, work: Callable[[], None]) -> None:
        """Has the thread do this before its next step."""
        self._inbox.put(work)

    def forget(self, numbers: Sequence[int]) -> None:
        """For the thread: cancels what of these still runs."""
        for number in numbers:
            if self._tickets.pop(number, None) and not self.failure:
                self.engine.cancel(number)

    def _run(self) -> None:
        left = True  # whether the engine may have something to do
        while True:
            try:
                work = self._inbox.get(block=not left)
            except queue.Empty:
                left = self._step()
                continue
            if work is None:
                while self._tickets and self._step():
                    pass
                return
            work()
            left = not self.failure

    def _step(self) -> bool:
        """One step of the engine, its events delivered; whether there is more to do."""
        if self.failure:
            return False
        try:
            events = self.engine.step()
        except Exception as error:
            _log.exception("the engine failed")
            self.failure = EngineFailed(f"{type(error).__name__}: {error}")
            for ticket in {id(t): t for t in self._tickets.values()}.values():
                _call(ticket.loop, ticket.events.put_nowait, self.failure)
            self._tickets.clear()
            return False
        by_loop: dict[Any, list[tuple[Ticket, Event]]] = {}
        for event in events:
            ticket = self._tickets.get(event.number)
            if ticket is not None:
                by_loop.setdefault(ticket.loop, []).append((ticket, event))
            if event.finish is not None:
                self._tickets.pop(event.number, None)
        for loop, pairs in by_loop.items():
            _call(loop, _deliver, pairs)
        return bool(self._tickets)


def _deliver(pairs: Sequence[tuple[Ticket, Event]]) -> None:
    for ticket, event in pairs:
        ticket.events.put_nowait(event)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function in a loop, unless that has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)
