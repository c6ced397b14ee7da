"""The clients of `load_test.py`: plain HTTP/1.1 over asyncio, so that they take little from the server's processors."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """A request: its bytes, and the answers that are right (task, label, score of each image)."""

    data: bytes
    expected: Sequence[tuple[str, str, float]] | None


@dataclass
class Tally:
    """What came back.

    Attributes:
        answers: (end, latency in s, status) of each request; status 0 for a lost connection.
        wrong: answers that differ.
        largest_difference: of a score.
        retries: repetitions that the server asked for.
    """

    answers: list[tuple[float, float, int]] = field(default_factory=list)
    wrong: int = 0
    largest_difference: float = 0.0
    retries: int = 0

    def statuses(self) -> dict[int, int]:
        """How often each status came."""
        found: dict[int, int] = {}
        for *_, status in self.answers:
            found[status] = found.get(status, 0) + 1
        return dict(sorted(found.items()))


def post(path: str, body: bytes, kind: str) -> bytes:
    """The bytes of a request."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes
) -> tuple[int, bytes]:
    """Send a request over an open connection; status and body."""
    writer.write(data)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return int(head[9:12]), await reader.readexactly(length)


async def client(port: int, calls: Iterator[Call], tally: Tally, going: Callable[[], bool]) -> None:
    """Send calls one after the other over one connection; a lost connection is opened again."""
    reader = writer = None
    for call in calls:
        if not going():
            break
        start = time.perf_counter()
        try:
            if writer is None or reader is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            status, body = await exchange(reader, writer, call.data)
            if status == 200 and call.expected is not None:
                compare(json.loads(body), call.expected, tally)
        except (OSError, asyncio.IncompleteReadError):
            status = 0
        if status in (0, 408, 413):  # the server closes these
            if writer is not None:
                writer.close()
            reader = writer = None
        end = time.perf_counter()
        tally.answers.append((end, end - start, status))
        if status in (0, 429, 503, 504):
            tally.retries += 1
            await asyncio.sleep(0.05)
    if writer is not None:
        writer.close()


def compare(answers: list[dict[str, Any]], expected: Sequence[tuple[str, str, float]], tally: Tally) -> None:
    """Count what differs from the direct answers."""
    for answer, (task, label, score) in zip(answers, expected, strict=True):
        tally.wrong += (answer["task"], answer["label"]) != (task, label)
        tally.largest_difference = max(tally.largest_difference, abs(answer["score"] - score))


async def run_clients(
    port: int, calls: Sequence[Call], count: int, tally: Tally, *, seconds: float | None = None
) -> float:
    """Clients that share the calls; each call once, or round and round for some seconds. Elapsed seconds."""
    start = time.perf_counter()

    def source() -> Iterator[Call]:
        while True:
            yield from calls
            if seconds is None:
                return

    shared = source()
    deadline = None if seconds is None else start + seconds
    await asyncio.gather(
        *(
            client(port, shared, tally, lambda: deadline is None or time.perf_counter() < deadline)
            for _ in range(count)
        )
    )
    return time.perf_counter() - start


async def slow_client(port: int, data: bytes, seconds: float) -> int:
    """Send a byte a second; the status that the server answers in the end, 0 for none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head, _, body = data.partition(b"\r\n\r\n")
    writer.write(head + b"\r\n\r\n")
    answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
    try:
        for byte in body[: int(seconds)]:
            writer.write(bytes([byte]))
            done, _ = await asyncio.wait([answer], timeout=1)
            if done:
                return int(answer.result()[9:12])
    except (OSError, asyncio.IncompleteReadError):
        return 0
    finally:
        answer.cancel()
        writer.close()
    return 0


async def aborting_client(port: int, calls: Sequence[Call], seconds: float) -> int:
    """Send whole or half requests and go away at once; how many."""
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        data = calls[count % len(calls)].data
        writer.write(data if count % 2 else data[: len(data) // 2])
        await writer.drain()
        writer.transport.abort()
        count += 1
        await asyncio.sleep(0.05)
    return count
