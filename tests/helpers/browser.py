"""A real browser to look at pages with: the machine's Chromium, driven by Playwright; axe-core comes from npm."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = "axe-core@4"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to look at a page with")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a window, ended with the block."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


def axe_script(directory: Path) -> str:
    """The text of axe-core, which npm brings to `directory`; skips the test where npm cannot."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm on this machine to bring axe-core")
    packed = subprocess.run(
        [npm, "pack", AXE, "--silent"],
        cwd=directory,
        env={**os.environ, "npm_config_cache": str(directory / "npm")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    archives = list(directory.glob("axe-core-*.tgz"))
    if packed.returncode or not archives:
        reason = (packed.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"npm cannot bring axe-core here: {reason}")
    shutil.unpack_archive(archives[0], directory)
    return (directory / "package" / "axe.min.js").read_text(encoding="utf-8")
