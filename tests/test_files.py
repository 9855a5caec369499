"""Files that appear whole or not at all, whoever is killed, and whoever else writes them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmnist import files
from fastmnist.errors import FastmnistError
from fastmnist.files import open_alone, remove_orphans, replacing, write_bytes


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


DIE_WRITING = """
import os, signal, sys
from pathlib import Path
from fastmnist.files import replacing

with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_while_writing(path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", DIE_WRITING, path], timeout=60).returncode == -signal.SIGKILL


def orphan(path: Path, process: int = 1) -> Path:
    """As a killed writer of `path` leaves it; process 1 always runs, so its number shows nothing."""
    left = path.with_name(f".{path.name}.{process}-0123abcd.tmp")
    left.write_bytes(b"half")
    return left


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    killed_while_writing(path)
    assert path.read_bytes() == b"before"
    assert len(names(tmp_path)) == 2
    write_bytes(path, b"whole")
    assert (names(tmp_path), path.read_bytes()) == ({"a"}, b"whole")


def test_another_s_temporary_file_is_left_alone_while_it_is_written(tmp_path: Path) -> None:
    """Two writers of one file: both end, the last one to end is there."""
    path = tmp_path / "a"
    with replacing(path) as first:
        first.write(b"first")
        write_bytes(path, b"second")
        remove_orphans(tmp_path)
        assert path.read_bytes() == b"second"
        assert len(names(tmp_path)) == 2
    assert (names(tmp_path), path.read_bytes()) == ({"a"}, b"first")


def test_only_temporary_files_of_that_name_are_removed(tmp_path: Path) -> None:
    own, other = orphan(tmp_path / "a[b]"), orphan(tmp_path / "other")
    foreign = tmp_path / ".a[b].notours.tmp"
    foreign.write_bytes(b"")
    write_bytes(tmp_path / "a[b]", b"")
    assert names(tmp_path) == {"a[b]", other.name, foreign.name}
    assert not own.exists()
    remove_orphans(tmp_path)
    assert names(tmp_path) == {"a[b]", foreign.name}


def test_nothing_is_removed_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    left = orphan(tmp_path / "a")
    monkeypatch.setattr(files.fcntl, "flock", without)
    write_bytes(tmp_path / "a", b"whole")
    with open_alone(tmp_path / "b", "taken"):
        pass
    assert names(tmp_path) == {"a", "b", left.name}


def test_a_temporary_file_that_is_taken_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer comes between this one's making and locking it: once it holds the lock, once it has deleted."""
    real, calls = files.lock, []

    def late(file) -> bool | None:
        calls.append(file.name)
        if len(calls) == 1:
            return False
        if len(calls) == 2:
            os.unlink(file.name)
        return real(file)

    monkeypatch.setattr(files, "lock", late)
    with replacing(tmp_path / "a") as file:
        file.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert len({str(name) for name in calls}) == 3


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "a"
    if before is not None:
        path.write_bytes(before)

    def fill() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(FastmnistError, match=re.escape(str(path))):
        fill()
    assert (path.read_bytes() if path.exists() else None) == before
    assert names(tmp_path) == ({"a"} if before else set())


def test_a_second_opener_is_refused_until_the_first_one_closes(tmp_path: Path) -> None:
    with open_alone(tmp_path / "a", "taken"), pytest.raises(FastmnistError, match="taken"):
        open_alone(tmp_path / "a", "taken")
    open_alone(tmp_path / "a", "taken").close()
