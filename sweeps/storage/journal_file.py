"""The Optuna journal's file, opened with a lock that its file system knows."""

import uuid
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock


def open_journal(path: Path) -> JournalStorage:
    """The journal in a file, made on first use.

    Optuna's lock is a symbolic link, which works over NFS too; where links cannot be made it is a file that is opened
    exclusively.
    """
    lock = None if _links(path.parent) else JournalFileOpenLock(str(path))
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _links(directory: Path) -> bool:
    """Whether symbolic links can be made in a directory."""
    probe = directory / f"probe.{uuid.uuid4().hex}"
    try:
        probe.symlink_to("nowhere")
        probe.unlink()
    except OSError:
        return False
    return True
