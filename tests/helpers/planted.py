"""False tokens, planted where real ones would be, and a search for them wherever a sweep writes."""

import contextlib
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from commands import Sweep
from platformdirs import user_cache_path

VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "OPENAI_API_KEY"),
)


class Planted:
    """Tokens in the environment and in the login files of a home of its own.

    Args:
        home: a directory to make.
    """

    def __init__(self, home: Path) -> None:
        self.environment = {name: f"planted{secrets.token_hex(20)}" for name in VARIABLES}
        files = {
            ".netrc": "machine api.wandb.ai login user password {}\n",
            ".cache/huggingface/token": "{}",
            ".ray/auth_token": "{}",
        }
        in_files = [f"planted{secrets.token_hex(20)}" for _ in files]
        for (name, content), token in zip(files.items(), in_files, strict=True):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(content.format(token))
        self.tokens = [*self.environment.values(), *in_files]
        self.environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(user_cache_path())}

    def among(self, text: bytes | str) -> list[str]:
        """Which of the tokens a text holds."""
        data = text.encode() if isinstance(text, str) else text
        return [token for token in self.tokens if token.encode() in data]

    def below(self, directories: Iterable[Path]) -> list[tuple[Path, list[str]]]:
        """Files that hold tokens."""
        files = [path for place in directories for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
        return [(path, found) for path in files if (found := self.among(path.read_bytes()))]


@contextlib.contextmanager
def watched_arguments(sweep: Sweep) -> Iterator[set[str]]:
    """The arguments of all processes of a sweep, gathered while the body runs."""
    seen: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            for process in sweep.processes():
                with contextlib.suppress(psutil.Error):
                    seen.add(" ".join(process.cmdline()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def open_to_others(directory: Path) -> list[Path]:
    """Files and directories that others than their owner may read or write."""
    return [
        path for path in (directory, *directory.rglob("*")) if not path.is_symlink() and os.stat(path).st_mode & 0o077
    ]
