"""Rebuilds the example zoo from packages of npm, PyPI and Debian."""
