"""What a client did wrong or has to wait for: problems as of RFC 9457, `application/problem+json`."""

from __future__ import annotations

import json
from http import HTTPStatus

from runtime.errors import MassRuntimeError

RETRY_AFTER_S = 1
PROBLEM_JSON = "application/problem+json"


class RequestProblem(MassRuntimeError):  # noqa: N818 - RFC 9457's word
    """A request that is not answered with predictions.

    Attributes:
        status: of HTTP; 408, 429, 503 and 504 may be tried again later, and say so with `Retry-After`.
        detail: what failed, expected, got, what to do.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail

    @property
    def title(self) -> str:
        """The status in words."""
        return HTTPStatus(self.status).phrase

    @property
    def may_retry(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (408, 429, 503, 504)

    def headers(self) -> dict[str, str]:
        """Of the response."""
        headers = {"content-type": PROBLEM_JSON}
        if self.may_retry:
            headers["retry-after"] = str(RETRY_AFTER_S)
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return headers

    def body(self) -> bytes:
        """Of the response."""
        return json.dumps({"title": self.title, "status": self.status, "detail": self.detail}).encode()
