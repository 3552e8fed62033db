"""How a command ends: one line and a status for what the user can mend, and for a signal, whatever it became."""

import os
import signal
import time

import pytest

from cbtrain.config import InputError, cli


def ends(error: BaseException | None, sent: signal.Signals | None = None) -> int:
    """The status of a command that raises, after a signal that a library made something else of."""

    def main() -> int:
        if sent is not None:
            try:
                os.kill(os.getpid(), sent)
                signal.sigtimedwait([], 1)  # the handler runs before this returns
            except KeyboardInterrupt:
                pass
        if error is not None:
            raise error
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        return cli.run(main)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "sent", "status"),
    [
        (InputError("--lr: odd"), None, 2),
        (OSError(28, "No space left on device", "f.bin"), None, 1),
        (KeyboardInterrupt(), None, 130),
        (KeyboardInterrupt(), signal.SIGINT, 130),
        (KeyboardInterrupt(), signal.SIGTERM, 143),
        (ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'"), signal.SIGINT, 130),
        (RuntimeError("a wait was broken off"), signal.SIGTERM, 143),
    ],
)
def test_a_command_ends_with_one_line_and_its_status(capsys, error, sent, status):
    assert ends(error, sent) == status
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("sent", "ended_well"),
    [([], True), ([0.0], True), ([0.0, 0.01], True), ([0.0, 0.5], False)],
    ids=["none", "one", "one that came twice", "a second"],
)
def test_the_first_signal_asks_and_the_second_ends_at_once(sent, ended_well):
    """Each is sent so many seconds after the body has begun."""
    asked, reached = [], []

    def main() -> int:
        with cli.asked_first(lambda: asked.append(True)):
            before = 0.0
            for at in sent:
                time.sleep(at - before)
                os.kill(os.getpid(), signal.SIGTERM)
                before = at
            time.sleep(0.2)
            reached.append(True)
        return 0

    status = cli.run(main)
    assert (status == 0, bool(reached)) == (ended_well, ended_well)
    assert len(asked) == bool(sent)
    assert ended_well or status == 143


def test_a_program_that_does_not_heed_the_first_signal_is_ended_after_a_while(monkeypatch):
    monkeypatch.setattr(cli, "GRACE_S", 0.3)

    def main() -> int:
        with cli.asked_first(lambda: None):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(30)
        return 0

    began = time.monotonic()
    assert cli.run(main) == 143
    assert time.monotonic() - began < 10


def test_an_error_of_the_program_itself_is_raised():
    with pytest.raises(RuntimeError, match="a fault"):
        ends(RuntimeError("a fault"))
