# Owns: what holds for every test.
from __future__ import annotations

import signal

import zmq

# Whoever starts the tests in the background has this signal ignored, and so has every process that inherits it; Ctrl-C
# is something that is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What a failed test leaves open is collected in any order: a context before its sockets, and libzmq would wait for them
# for ever.
del zmq.Context.__del__
