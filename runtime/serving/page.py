"""The page at `/`: one file without network, whose script and style are allowed by their hash alone."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files


@functools.cache
def page() -> bytes:
    """The page's HTML."""
    return files("runtime.serving").joinpath("page.html").read_bytes()


def _hashes(tag: str) -> str:
    inner = re.findall(rf"<{tag}>(.*?)</{tag}>", page().decode(), re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inner]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


PAGE_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
}
