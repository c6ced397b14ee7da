"""The server around the application: which bundles it takes, without starting Ray."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from runtime.errors import BundleError
from runtime.serving import server
from runtime.serving.engine import bundle_digest
from runtime.serving.settings import ServeSettings


@pytest.fixture
def own(bundle, tmp_path):
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def watched(own, monkeypatch):
    """`watched(deploy)`: a server looks after the bundle until `stop`; digests that it deploys go to `deploy`."""
    stopping, looked = threading.Event(), threading.Event()
    threads = []

    def seen(directory):
        found = bundle_digest(directory)
        looked.set()
        return found

    def start(deploy):
        monkeypatch.setattr(server, "bundle_digest", seen)
        monkeypatch.setattr(server, "deploy", lambda settings: deploy(bundle_digest(settings.bundle)))
        settings = ServeSettings(bundle=str(own), watch=0.02)
        threads.append(threading.Thread(target=server.watch, args=(settings, stopping)))
        threads[0].start()
        assert looked.wait(10)

    yield start
    stopping.set()
    threads[0].join(10)
    assert not threads[0].is_alive()


def rewrite(bundle, indent):
    """The same bundle under another digest, exchanged in one step."""
    manifest = bundle / "manifest.json"
    new = manifest.with_suffix(".new")
    new.write_text(json.dumps(json.loads(manifest.read_text()), indent=indent))
    new.replace(manifest)
    return bundle_digest(bundle)


def test_a_new_bundle_is_deployed_once(own, watched):
    deployed, seen = [], threading.Event()

    def deploy(digest):
        deployed.append(digest)
        seen.set()

    watched(deploy)
    assert not seen.wait(0.2)  # the one that is served already is not deployed again
    new = rewrite(own, 3)
    assert seen.wait(10)
    threading.Event().wait(0.2)
    assert deployed == [new]


def test_a_damaged_bundle_is_left_alone_until_it_is_whole(own, watched):
    weights = own / "weights.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    seen, digests = threading.Event(), []

    def deploy(digest):
        digests.append(digest)
        seen.set()

    watched(deploy)
    new = rewrite(own, 4)
    assert not seen.wait(0.5)
    weights.write_bytes(whole)
    assert seen.wait(10)
    assert digests == [new]


def test_after_a_bundle_that_does_not_start_the_next_one_is_tried(own, watched):
    digests, once, twice = [], threading.Event(), threading.Event()

    def deploy(digest):
        digests.append(digest)
        if len(digests) == 2:
            twice.set()
        once.set()
        if len(digests) == 1:
            raise RuntimeError("replicas do not start")

    watched(deploy)
    first = rewrite(own, 3)
    assert once.wait(10)
    second = rewrite(own, 5)
    assert twice.wait(10)
    assert digests == [first, second]


def test_a_missing_or_damaged_bundle_is_refused_before_ray_starts(own, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "ray_cluster", lambda _: pytest.fail("Ray was started"))
    with pytest.raises(BundleError):
        server.run_server(ServeSettings(bundle=str(tmp_path / "nothing")))
    (own / "weights.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"weights\.bin"):
        server.run_server(ServeSettings(bundle=str(own)))
