"""A sweep's results copied out at its end, to any place that pyarrow opens: `--copy-to s3://bucket/sweeps`."""

import os
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from pyarrow import ArrowException, fs
from rich.filesize import decimal

from cbtrain.config import InputError
from cbtrain.utils.errors import first_line
from sweeps.reporting.screen import SCREEN
from sweeps.storage.run_directory import RunDirectory

LEFT_OUT = ("teacher_cache", "ray")
"""Of a run directory: what is large and can be made again, and what nobody reads."""
LAST = "sweep.json"
"""Written when all else is there, so that a copy with it is a whole one."""


class Destination:
    """`URI/NAME`, NAME being the run directory's.

    Args:
        uri: of a directory: a URI, or a path of this machine.
        name: of the directory to make there.

    Raises:
        InputError: pyarrow does not know such a URI, or lacks what it takes to open it, or it holds a password.
    """

    def __init__(self, uri: str, name: str) -> None:
        if re.match(r"[^/]+://[^/]*@", uri):  # sweep.json would keep it
            bare = re.sub("//[^/]*@", "//…@", uri)
            raise InputError(f"--copy-to {bare}: credentials do not belong in it; they come from the environment")
        self.uri = f"{uri.rstrip('/')}/{name}"
        self._given = uri
        try:
            self._files, root = fs.FileSystem.from_uri(uri if "://" in uri else str(Path(uri).absolute()))
        except (ArrowException, OSError, ImportError) as error:
            raise InputError(f"--copy-to {uri}: {first_line(error)}; give a URI such as s3://bucket/sweeps") from None
        self._root = f"{root.rstrip('/')}/{name}"

    def check(self, *, new: bool) -> None:
        """Write and remove a file there.

        Args:
            new: whether it must not hold a sweep yet.

        Raises:
            InputError: it cannot be written to, or holds a sweep.
        """
        probe = f"{self._root}/probe.{uuid.uuid4().hex}"
        try:
            if new and self._files.get_file_info(f"{self._root}/{LAST}").type != fs.FileType.NotFound:
                raise InputError(f"--copy-to {self._given}: {self.uri} already holds a sweep; give another --run-dir")
            self._files.create_dir(self._root, recursive=True)
            with self._files.open_output_stream(probe) as stream:
                stream.write(b"")
            self._files.delete_file(probe)
        except (ArrowException, OSError) as error:
            raise InputError(f"--copy-to {self._given}: cannot be written to ({first_line(error)})") from None

    def copy(self, run_dir: Path) -> tuple[int, int]:
        """Copy a run directory without teacher cache, checkpoints and Ray's files; how many files and bytes.

        Raises:
            OSError: the place cannot be written to; what is there is not whole.
        """
        here, size = fs.LocalFileSystem(), 0
        files = sorted(_results(run_dir), key=lambda file: file == Path(LAST))
        for file in files:
            destination = f"{self._root}/{file.as_posix()}"
            self._files.create_dir(destination.rpartition("/")[0], recursive=True)
            fs.copy_files(str(run_dir / file), destination, source_filesystem=here, destination_filesystem=self._files)
            size += (run_dir / file).stat().st_size
        return len(files), size

    def deliver(self, run: RunDirectory, status: int) -> int:
        """Copy a sweep that has ended, and say so; its exit status, 1 where one that ended well could not be copied."""
        try:
            with SCREEN.phase("copying", f"to {self.uri}"):
                files, size = self.copy(run.path)
        except OSError as error:
            reason = first_line(error)
            print(f"error: --copy-to {self.uri}: {reason}; copy {run.shown} by hand", file=sys.stderr)
            return status or 1
        SCREEN.conclude(f"copied    {files} files, {decimal(size)}, to {self.uri}")
        return status


def _results(run_dir: Path) -> Iterator[Path]:
    """Files of a run directory that are worth keeping, relative to it."""
    for directory, folders, files in os.walk(run_dir):
        inside = Path(directory).relative_to(run_dir)
        dropped = LEFT_OUT if inside == Path() else ("checkpoint",) if inside.parent == Path("trials") else ()
        folders[:] = [folder for folder in folders if folder not in dropped]
        yield from (inside / file for file in files if file != "lock")
