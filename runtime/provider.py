"""What runs a bundle, by name."""

from __future__ import annotations

from typing import Literal

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
