"""What is said on the screen; `main` calls `quiet_libraries` before the heavy libraries are imported."""

import functools
import logging
import os
import sys
from pathlib import Path


def quiet_libraries() -> None:
    """Keep libraries' banners, warnings and progress bars off the screen; their errors still come through."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.captureWarnings(True)  # to the log, where there is one

    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)


def log_to(path: Path) -> None:
    """Send what libraries log or warn of to a file, off the screen."""
    logging.captureWarnings(True)
    logging.basicConfig(filename=path, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", force=True)


@functools.cache
def say_once(text: str) -> None:
    """Print a line to standard error, once in a process and by the first of torchrun's processes alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
