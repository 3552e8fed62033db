"""Puts a fault into each process of a sweep that `bench_faults` starts: `FAULT` is its kind, a step, and a file that is
there when it has happened, since it happens once."""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path

kind, _, rest = os.environ.get("FAULT", "").rpartition(" ")[0].rpartition(" ")
KIND, STEP = kind, int(rest or 0)
HAPPENED = Path(os.environ.get("FAULT", "").rpartition(" ")[2] or "/nonexistent")


def disturb(loop) -> None:
    """Have the training loop meet the fault at its step, in a trial with a KL term."""
    train_step = loop.train_step

    def disturbed(engine, given, step):
        update = train_step(engine, given, step)
        # NaN is in the losses of all workers, which are reduced; the rest happens to one.
        happened = HAPPENED.with_suffix("." + os.environ.get("RANK", "0")) if KIND == "NaN" else HAPPENED
        if step != STEP or engine.module.config.beta_kl == 0 or happened.exists():
            return update
        happened.touch()
        if KIND == "raise":
            raise RuntimeError("a fault at a random step")
        if KIND == "NaN":
            return update._replace(parts=update.parts * float("nan"))
        if KIND == "hang":
            time.sleep(3600)
        return update

    loop.train_step = disturbed


class Finder(importlib.abc.MetaPathFinder):
    """Finds the training loop as anybody would, and disturbs it once it is there."""

    def find_spec(self, name, path, target=None):
        if name != "cbtrain.training.loop":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def executed(module) -> None:
            execute(module)
            disturb(module)

        spec.loader.exec_module = executed
        return spec


if KIND in ("raise", "NaN", "hang"):
    sys.meta_path.insert(0, Finder())
