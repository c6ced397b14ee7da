"""A directory takes its name in one step: whoever looks, whenever a process is killed, it is whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from mass_export import staging as module
from mass_export.staging import previous_name, replace_directory, staging

FILES = ("a", "b", "c")


def write(out: Path, text: str) -> None:
    with staging(out) as scratch:
        staged = scratch / "new"
        staged.mkdir()
        for name in FILES:
            (staged / name).write_text(text)
        replace_directory(staged, out)


def content(out: Path) -> set[str]:
    handle = os.open(out, os.O_RDONLY)  # of one directory, whatever gets its name meanwhile
    try:
        texts = set()
        for name in FILES:
            with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=handle)) as file:
                texts.add(file.read())
        return texts
    finally:
        os.close(handle)


def killed_before(number: int, out: Path, text: str) -> bool:
    """Write in a forked process that ends before its n-th file operation."""
    pid = os.fork()
    if not pid:
        left = number

        def hook(event: str, _: object) -> None:
            nonlocal left
            if event.startswith(("os.", "open", "shutil.", "tempfile.", "ctypes.")):
                left -= 1
                if left == -1:  # the kill is an event, too
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        write(out, text)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.fixture(params=["exchange", "two steps"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "two steps":
        monkeypatch.setattr(module, "_exchange", lambda _a, _b: False)
    return tmp_path / "engines"


def test_a_directory_is_made_replaced_and_nothing_else_is_left(out: Path) -> None:
    for text in ("first", "second", "third"):
        write(out, text)
        assert content(out) == {text}
        assert [path.name for path in out.parent.iterdir()] == ["engines"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_before_any_file_operation_it_is_the_old_or_the_new_one(out: Path) -> None:
    write(out, "0")
    kills = 0
    while killed_before(kills, out, str(kills + 1)):
        found = out if out.is_dir() else previous_name(out)  # the latter only without an exchange
        assert len(content(found)) == 1
        kills += 1
    assert kills > 15
    assert content(out) == {str(kills + 1)}
    assert [path.name for path in out.parent.iterdir()] == ["engines"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_with_an_exchange_the_name_is_never_free(tmp_path: Path) -> None:
    out = tmp_path / "engines"
    write(out, "0")
    kills = 0
    while killed_before(kills, out, "1"):
        assert out.is_dir()
        kills += 1
    assert kills > 15


def test_what_was_between_two_renames_is_put_back_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "engines"
    write(out, "old")
    out.rename(previous_name(out))
    with staging(out):
        assert content(out) == {"old"}


def test_writers_at_once_do_not_mix_and_readers_see_whole_directories(out: Path) -> None:
    write(out, "start")
    stop, problems = threading.Event(), []
    moments = {"missing": 0, "read": 0}

    def read() -> None:
        while not stop.is_set():
            try:
                seen = content(out)
            except FileNotFoundError:  # deleted while it was read, or between two renames
                moments["missing"] += 1
                continue
            moments["read"] += 1
            if len(seen) != 1:
                problems.append(seen)

    def write_many(name: str) -> None:
        try:
            for i in range(15):
                write(out, f"{name}{i}")
        except Exception as error:
            problems.append(error)
            raise

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write_many, args=(name,)) for name in "ABCD"]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert not problems
    assert moments["read"] > 0
    assert len(content(out)) == 1
    assert [path.name for path in out.parent.iterdir()] == ["engines"]


def test_a_directory_in_use_is_not_taken_for_a_left_one(tmp_path: Path) -> None:
    out = tmp_path / "engines"
    left = tmp_path / ".engines.staging-killed"
    left.mkdir()
    with staging(out) as mine, staging(out) as other:
        assert mine.is_dir()
        assert other.is_dir()
        assert not left.exists()


def test_a_failing_rename_leaves_the_old_one(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, "old")

    def refuse(_: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(target))

    with staging(out) as scratch:
        (scratch / "new").mkdir()
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(PermissionError):
            replace_directory(scratch / "new", out)
    monkeypatch.undo()
    assert content(out) == {"old"}
