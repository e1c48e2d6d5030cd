"""Receive the signal with which a scheduler, a launcher or a terminal asks a run to stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from megatron_ettin.base.errors import EXIT_REQUEUE
from megatron_ettin.base.log import log_warning

# SIGHUP: the terminal or the connection is gone
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopSignal:
    """Receives a stop signal, which the training loop sends to the other ranks with the next step.

    Before the first step there is nothing to save, so the process ends at once with exit status 75. The main thread may
    then be waiting for other ranks in C code, where Python runs no signal handler, so another thread reads the signal.

    Attributes:
        received: whether the signal came.
        begun: whether the steps have begun.
    """

    def __init__(self, listen: bool, logs_end: bool = True) -> None:
        """Install the signal handlers, and start the thread that reads the signals.

        Args:
            listen: `resilience.save_on_signal`.
            logs_end: whether this process logs that it ends; one process of a host does.
        """
        self.received = self.begun = False
        self.logs_end = logs_end
        self._waking: int | None = None
        if not listen:
            return
        for number in STOPS:
            # a signal that was ignored at the start stays ignored, such as SIGHUP under nohup
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        self._reading, self._waking = os.pipe()
        os.set_blocking(self._waking, False)
        signal.set_wakeup_fd(self._waking, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="stop signal", daemon=True).start()

    def close(self) -> None:
        """End the thread. A signal that comes later changes nothing."""
        if self._waking is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._waking)
            self._waking = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def _listen(self) -> None:
        while numbers := os.read(self._reading, 64):
            for number in numbers:
                if number in STOPS and not self.begun:
                    self._end(signal.Signals(number).name)
        os.close(self._reading)

    def _end(self, name: str) -> None:
        if self.logs_end:
            log_warning(f"ettin train: {name} before the first step: nothing to save, exit status {EXIT_REQUEUE}")
        os._exit(EXIT_REQUEUE)
