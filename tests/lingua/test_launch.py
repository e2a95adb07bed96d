"""A rank goes when its launcher is gone."""

from __future__ import annotations

import os
import select
import signal
import sys

import pytest

from lingua.launch import init_signal_handler, leave_with_torchrun


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child that its parent died")
@pytest.mark.parametrize("launcher, told", [("TORCHELASTIC_RUN_ID", b"2"), ("LOCAL_RANK", b"")])
def test_a_rank_is_told_that_torchrun_was_killed(monkeypatch, launcher, told):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv(launcher, "0")
    reader, writer = os.pipe()
    torchrun = os.fork()
    if torchrun == 0:
        if os.fork() == 0:
            rank(writer)
        signal.pause()
    assert os.read(reader, 1) == b"1"  # ready
    os.kill(torchrun, signal.SIGKILL)
    os.waitpid(torchrun, 0)
    os.close(writer)
    patience = 30 if told else 0.3
    ready, _, _ = select.select([reader], [], [], patience)
    assert (os.read(reader, 1) if ready else b"") == told
    os.close(reader)


def rank(writer: int) -> None:
    init_signal_handler(lambda *_: os.write(writer, b"2") and os._exit(0))
    leave_with_torchrun()
    os.write(writer, b"1")
    signal.sigtimedwait([], 5)
    os._exit(0)
