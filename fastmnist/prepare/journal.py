"""The list of pages that an interrupted writer has done: its successor goes on from it, a second writer is kept out."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from fastmnist.files import open_alone

LINE_SIZE = 9  # bytes: eight hexadecimal digits and the line's end


class Journal:
    """A small text file: a line on what is being written, then the CRC-32 of each page that is done, in order.

    It is locked while it is open. A line that was torn, and all after it, counts as not there; whether the pages
    themselves are whole is for the caller to check, for they may have reached the disk after their line.

    Args:
        path: of the journal; made where it is missing.
        subject: one line; the lines of a journal with another one are dropped.

    Attributes:
        checksums: of the pages that are done, as far as is known.

    Raises:
        FastmnistError: another process has it open. OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, subject: str) -> None:
        self.path = path
        head = f"{subject}\n".encode()
        self._start = len(head)
        self._file = open_alone(
            path, f"{path.with_suffix('')}: another process is writing it; wait for it to end, or name another folder"
        )
        try:
            content = self._file.read()
            if content.startswith(head):
                self.checksums = _checksums(content[len(head) :])
            else:
                self.checksums = []
                self._file.seek(0)
                self._file.write(head)
            self.keep(len(self.checksums))
        except BaseException:
            self._file.close()
            raise

    def keep(self, count: int) -> None:
        """Forgets all pages but the first `count`."""
        del self.checksums[count:]
        self._file.seek(self._start + count * LINE_SIZE)
        self._file.truncate()
        self._file.flush()

    def add(self, checksum: int) -> None:
        """Notes the next page as done."""
        self.checksums.append(checksum)
        self._file.write(_line(checksum))
        self._file.flush()  # to the system, which survives this process

    def remove(self) -> None:
        """Deletes it, once the file has its name."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()  # and with it the lock


def _line(checksum: int) -> bytes:
    return b"%08x\n" % checksum


def _checksums(lines: bytes) -> list[int]:
    found = []
    for line in lines.splitlines(keepends=True):
        try:
            checksum = int(line, 16)
        except ValueError:
            break
        if line != _line(checksum):
            break
        found.append(checksum)
    return found
