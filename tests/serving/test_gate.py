import asyncio

import pytest

from runtime.serving.gate import Gate
from runtime.serving.settings import Limits

LIMITS = Limits(max_body_mib=0.001, body_timeout=0.5)  # 1048 bytes


def call(gate, chunks=(b"x",), headers=(), path="/v1/classify", pause=0.0):
    """Status, headers and body of a request whose body comes in chunks."""
    sent, waiting = [], list(chunks)

    async def receive():
        if not waiting:
            await asyncio.sleep(60)
        await asyncio.sleep(pause)
        chunk = waiting.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers)}
    asyncio.run(gate(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return (sent[0]["status"], dict(sent[0]["headers"]), body) if sent else None


class Inner:
    """An application that answers with what it received, after some failures."""

    def __init__(self, *failures, status=200, marked=True):
        self.failures, self.calls = list(failures), []
        self.status, self.marked = status, marked

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.calls.append(message["body"])
        scope["path"] = "changed"
        if self.failures and self.failures.pop(0):
            return
        headers = [(b"x-mass-bundle", b"1")] if self.marked else []
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": message["body"]})


def test_the_application_gets_the_body_in_one_piece():
    inner = Inner()
    assert call(Gate(inner, LIMITS), [b"a", b"b", b"c"])[2] == b"abc"
    assert inner.calls == [b"abc"]


@pytest.mark.parametrize("chunks", [[b"x" * 1100], [b"x" * 600] * 2, [b"x" * 600] * 50])
def test_too_large_a_body_never_reaches_the_application(chunks):
    inner = Inner()
    status, _, body = call(Gate(inner, LIMITS), chunks)
    assert status == 413
    assert b"0.001 MiB" in body
    assert inner.calls == []


def test_an_announced_length_counts_too():
    assert call(Gate(Inner(), LIMITS), headers=[(b"content-length", b"99999")])[0] == 413


def test_a_client_that_sends_too_slowly_may_try_again():
    inner = Inner()
    status, headers, _ = call(Gate(inner, LIMITS), [b"x"] * 20, pause=0.05)
    assert status == 408
    assert headers[b"retry-after"] == b"1"
    assert inner.calls == []


def test_a_request_whose_replica_died_is_sent_to_another():
    inner = Inner(True, True)
    status, _, body = call(Gate(inner, LIMITS, proxy=True), [b"image"])
    assert (status, body) == (200, b"image")
    assert inner.calls == [b"image"] * 3


def test_when_replicas_go_on_dying_the_client_may_try_again():
    status, headers, _ = call(Gate(Inner(True, True, True), LIMITS, proxy=True))
    assert status == 503
    assert b"retry-after" in headers


@pytest.mark.parametrize(("theirs", "ours"), [(404, 503), (408, 504), (429, 429), (500, 503), (503, 503)])
def test_errors_of_the_proxy_itself_become_problems_that_may_be_tried_again(theirs, ours):
    status, headers, _ = call(Gate(Inner(status=theirs, marked=False), LIMITS, proxy=True))
    assert status == ours
    assert headers[b"retry-after"] == b"1"


def test_errors_of_the_application_pass():
    assert call(Gate(Inner(status=404), LIMITS, proxy=True))[0] == 404


def test_a_client_that_left_costs_nothing():
    inner = Inner()

    async def receive():
        return {"type": "http.disconnect"}

    async def send(_):
        raise AssertionError("nobody listens")

    asyncio.run(Gate(inner, LIMITS)({"type": "http", "path": "/", "headers": []}, receive, send))
    assert inner.calls == []


def test_many_large_requests_at_once_are_put_off_and_memory_is_given_back():
    gate = Gate(Inner(), Limits(max_body_mib=0.001, body_timeout=60))
    waiting = asyncio.Event()
    sent = []

    async def slowly():
        await waiting.wait()
        return {"type": "http.disconnect"}

    def receiver():
        chunks = [{"type": "http.request", "body": b"x" * 1000, "more_body": True}]

        async def receive():
            return chunks.pop() if chunks else await slowly()

        return receive

    async def send(message):
        sent.append(message)

    async def crowd():
        scope = {"type": "http", "path": "/v1/classify", "headers": []}
        tasks = [asyncio.create_task(gate(dict(scope), receiver(), send)) for _ in range(30)]
        await asyncio.sleep(0.05)
        statuses = [message["status"] for message in sent if "status" in message]
        waiting.set()
        await asyncio.gather(*tasks)
        return statuses

    statuses = asyncio.run(crowd())
    assert set(statuses) == {503}
    assert 10 < len(statuses) < 20
    assert call(gate, [b"x"])[0] == 200
    assert gate._held == 0
