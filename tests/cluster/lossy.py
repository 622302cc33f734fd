#!/usr/bin/env python3
"""A bad cable, where the kernel has no netem: carries Ethernet frames between two interfaces, late, and loses some.

    lossy.py INTERFACE INTERFACE LOSS DELAY_MS SEED

Frames come and go with their virtio header, so that what the sender has left to the network card (checksums, segments) is still
left to it, and the cable is as fast as a copy. Prints "ready" when it carries, and runs until it is killed.
"""
import collections
import random
import select
import socket
import sys
import time

SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # beyond the system's limit: what does not fit would be lost
BUFFER = 32 << 20
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
ETH_P_ALL = 3
FRAME_MAX = 1 << 17
WAITING_MAX = 4096  # frames; a cable with more under way loses them, as a queue does


def plug(interface):
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
    end.bind((interface, 0))
    end.setblocking(False)
    return end


class Cable:
    def __init__(self, one, other, loss, delay_s, seed):
        self.across, self.loss, self.delay_s = {one: other, other: one}, loss, delay_s
        self.random, self.waiting = random.Random(seed), collections.deque()

    def take(self, end):
        """All frames that have come at one end."""
        while True:
            try:
                frame = end.recv(FRAME_MAX)
            except OSError:  # no more, or the interface is down
                return
            if self.random.random() >= self.loss and len(self.waiting) < WAITING_MAX:
                self.waiting.append((time.monotonic() + self.delay_s, self.across[end], frame))

    def give(self):
        """Those that are due; how long until the next one is."""
        while self.waiting:
            due, end, frame = self.waiting[0]
            left = due - time.monotonic()
            if left > 0:
                return left
            self.waiting.popleft()
            try:
                end.send(frame)
            except OSError:  # the interface is full or down: lost
                pass
        return None

    def carry(self):
        wait = None
        while True:
            ready, _, _ = select.select(list(self.across), [], [], wait)
            for end in ready:
                self.take(end)
            wait = self.give()


def main():
    one, other = plug(sys.argv[1]), plug(sys.argv[2])
    cable = Cable(one, other, float(sys.argv[3]), float(sys.argv[4]) / 1000, int(sys.argv[5]))
    print("ready", flush=True)
    cable.carry()


if __name__ == "__main__":
    main()
