"""Serve bundles over HTTP, and classify millions of images, on Ray; needs the extra `serve`, never torch.

`python -m runtime.serving serve --bundle engines/` and `python -m runtime.serving batch ...` are the commands.
"""
