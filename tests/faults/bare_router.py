# A ROUTER as a dispatcher might have it, and nothing else: whoever says something gets so much that its queue is full;
# a message of many frames is read slowly. Says what it does on stdout. Arguments: port, 1 or 0 for ROUTER_HANDOVER.
from __future__ import annotations

import contextlib
import sys
import time

import zmq


def main() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    for option, value in ((zmq.ROUTER_MANDATORY, 1), (zmq.ROUTER_HANDOVER, int(sys.argv[2])), (zmq.SNDHWM, 1000)):
        router.setsockopt(option, value)
    router.bind(f"tcp://127.0.0.1:{sys.argv[1]}")
    print("listens", flush=True)
    full = False
    while True:
        identity, frames = router.recv(), 0
        while router.getsockopt(zmq.RCVMORE):
            router.recv()
            frames += 1
            if frames == 1000:
                print("reads", flush=True)
            if frames % 100 == 0:
                time.sleep(0.002)
        if frames > 1:
            print("has read", flush=True)
        with contextlib.suppress(zmq.ZMQError):
            while not full:
                router.send_multipart([identity, bytes(5000)], zmq.NOBLOCK)
        if not full:
            full = True
            print("full", flush=True)


main()
