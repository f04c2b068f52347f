"""After a signal from a terminal or a batch system, a run finishes the current step, saves and stops."""

import signal
import threading

# Ctrl-C, kill and `scancel`, a batch system's warnings, a closed terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Interruption:
    """Remembers a signal. Inside the context, the first signal only sets `signal`; a second signal acts as usual.

    A signal that was ignored (`nohup`) stays ignored. Outside the main thread nothing happens: Python sends no signals there.

    Args:
        patient: a second signal also changes nothing. One of several processes may get a signal twice: from a batch system and
            from the process that started it. Only the starting process ends at a second signal.
    """

    def __init__(self, patient: bool = False):
        self.signal: signal.Signals | None = None
        self._patient = patient

    def __enter__(self) -> "Interruption":
        here = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        heeded = [number for number in here if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.signal = signal.Signals(number)
        if not self._patient:
            signal.signal(number, signal.SIG_DFL)

    @property
    def status(self) -> int:
        """The exit status that stands for the signal in a shell."""
        return 128 + self.signal if self.signal else 0
