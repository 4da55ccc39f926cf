"""uvicorn's HTTP over h11, with time limits for what a client sends and takes."""

from __future__ import annotations

import asyncio

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from tpimpi.serving.server.problems import ApiError

HEADER_TIME_S = 20.0
MAX_HEADER_BYTES = 1 << 16
TAKING_TIME_S = 30.0  # in which a client takes some of what is kept for it, behind what the system keeps


class TimedProtocol(H11Protocol):
    """Closes a connection that has begun a request, and does not end its headers in time; or sends nothing at first. Drops
    one that takes nothing of its answer, which else would be kept here as long as that goes on."""

    _header_timer: asyncio.TimerHandle | None = None
    _taking_timer: asyncio.TimerHandle | None = None
    _kept = 0  # bytes, when it was looked at

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A body may go on though its request was answered: it is waited for as for a header.
        answered = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if self.conn.their_state is not h11.IDLE and not answered:
            self._stop_timer()
        elif self._header_timer is None and (answered or self.conn.trailing_data[0]):
            self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_again()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_taking_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_taking_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP: the same form as of all errors."""
        body = msgspec.json.encode(ApiError(400, msg, code="invalid_http").body())
        headers = [("content-type", "application/json"), ("connection", "close"), ("content-length", str(len(body)))]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        try:
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer has begun already
            self.transport.abort()
        else:
            self.transport.close()

    def _look_again(self) -> None:
        self._kept = self.transport.get_write_buffer_size()
        self._taking_timer = self.loop.call_later(TAKING_TIME_S, self._look_at_taking)

    def _look_at_taking(self) -> None:
        """A slow client takes some of what is kept."""
        if self.transport.get_write_buffer_size() < self._kept:
            self._look_again()
        else:
            self.transport.abort()

    def _start_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_TIME_S, self._close_slow)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_taking_timer(self) -> None:
        if self._taking_timer is not None:
            self._taking_timer.cancel()
            self._taking_timer = None

    def _close_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
