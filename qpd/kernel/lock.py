"""One daemon for one set of pins: two would write each other's maps."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from pathlib import Path

RUN_DIR = Path("/run/qpd")


class LockedError(Exception):
    """Another daemon is running: one line that names its process id."""


class PinLock:
    """A lock on ``pin_dir``, held until ``release`` or the end of the process, however it ends (flock(2)).

    Raises LockedError where another process holds it, OSError where the lock file cannot be made.
    """

    def __init__(self, pin_dir: str | Path, run_dir: Path = RUN_DIR) -> None:
        pin_dir = Path(pin_dir)
        run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        # bpffs holds no ordinary files, so the lock lies elsewhere, under a name that follows from the pins'.
        self.path = run_dir / f"{hashlib.sha256(os.fsencode(pin_dir)).hexdigest()[:12]}.lock"
        self._fd = -1
        while not self._take(pin_dir):
            pass
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _take(self, pin_dir: Path) -> bool:
        """Lock the file; False: it was removed meanwhile, and another one may be there."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "not known"
            self.release()
            raise LockedError(
                f"another qpd (process {holder}) uses the pins in {pin_dir}: stop it, or set another bpf.pin_dir"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == os.fstat(self._fd).st_ino:
                return True
        self.release()
        return False

    def release(self) -> None:
        """Let the next one have it. The file stays; ``remove`` takes it away."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Take the file away, while it is held: whoever waits for it finds that out and makes another."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> PinLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
