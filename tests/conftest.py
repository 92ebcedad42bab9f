# Owns: what holds for every test.
from __future__ import annotations

import signal

# Whoever starts the tests in the background has this signal ignored, and so has every process that inherits it; Ctrl-C
# is something that is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
