"""How the heavy libraries come in: quiet on the screen, and without a search for garbage."""

import contextlib
import functools
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """What is imported in the body is not searched for garbage, now or later: there is none among a million objects,
    and to find that out takes a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@functools.cache  # once: at a second time what a run has left would be passed over for good
@importing()
def quiet_libraries() -> None:
    """Import the heavy libraries and keep their banners, warnings and progress bars off the screen; their errors still
    come through. To be called before anything else imports them."""
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
    import peft  # noqa: F401  the models of transformers come with it

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
