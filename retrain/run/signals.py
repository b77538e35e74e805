"""Being told to stop: SIGTERM and Ctrl-C become a flag that the training loop reads between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, final

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@final
class StopSignals:
    """While it is entered, SIGTERM and Ctrl-C do not end the process, they make `requested` true.

    A second Ctrl-C raises KeyboardInterrupt at once. The handlers that stood before come back on leaving. Signals reach the
    main thread only, so elsewhere it does nothing. Of several processes each has its own flag: `processes.any_process` joins
    them.

    Example:
        >>> with StopSignals() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.requested, stop.name
        (True, 'SIGTERM')
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._received is not None

    @property
    def name(self) -> str:
        """Name of the first signal that came; empty if none did."""
        return self._received.name if self._received else ""

    def __enter__(self) -> "StopSignals":
        self._received = None
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            # None: a handler that was not set from Python, and cannot be set back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number)
