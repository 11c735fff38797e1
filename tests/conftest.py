"""What all tests rely on."""

from __future__ import annotations

import signal

# A shell ignores SIGINT for what it runs in the background, and programs inherit that. The
# tests that interrupt programs would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
