"""A host that dies without a word, in two guests joined by a network: the daemon's, in use by a client on the other one; and the
one of a cluster's two that owns all blocks, while the other one reads them.

Without arguments this program is the test, on this machine; the names in ROLES are what it runs in the guests. They say how far
they are by lines on stdout, and are told that the other host is gone by a file in the folder that all three share.
"""
import os
import subprocess
import sys
import tempfile
import time
import unittest

from guest import RUNNER, Client, eventually, key, native, resources
from harness import Daemon
from support import runner, wire
from support.etcd import Etcd

ADDRESS = "10.77.9.1:7420"
READER = "10.77.9.2"
BLOCKS = 8
LIMIT_S = 300  # of a guest
DEADLINE_S = 4  # of each call
GRACE_S = 3  # of emulated machines
NOTICED_S = 10  # retries of the link and an idle session
PATIENCE_S = 120  # for a line of a guest, its boot included


def say(*words):
    print(*words, flush=True)


def serve(folder):
    """The daemon's host. Once the client's is gone nothing of it may be left, and others are served."""
    with Daemon(verbs="rxe0", idle="2s", tcp=ADDRESS, insecure="yes", arena="64M", slab="2M", staging="32M") as daemon:
        level, asking = resources("rxe0"), wire.Client(daemon.target)
        say("serving")
        eventually(lambda: os.path.exists(os.path.join(folder, "gone")), "the client's host is gone", LIMIT_S)
        start = time.monotonic()
        eventually(lambda: asking.stats()["sessions"] == 0 and resources("rxe0") == level, "back at the level", NOTICED_S)
        say("settled", f"{time.monotonic() - start:.1f}")
        client = Client(ADDRESS, device="rxe0", timeout_ms=DEADLINE_S * 1000)
        client.put_names(1)
        client.check(1)
        client.close()
        say("served")
        time.sleep(LIMIT_S)


def connect(**options):
    """A client, once the daemon's host has come up."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return Client(ADDRESS, timeout_ms=DEADLINE_S * 1000, **options)
        except native.Failure:
            if time.monotonic() > end:
                raise


def use():
    """The client's host: says which calls failed and after which time."""
    client, done = connect(device="rxe0"), 0
    while True:
        start = time.monotonic()
        try:
            client.put_names(done % 8)
            client.check(done % 8)
            client.drop([key(done % 8)])
        except native.Failure as error:
            say("failed", str(error).split(":", maxsplit=1)[0], f"{time.monotonic() - start:.1f}")
        done += 1
        if done == 8:
            with wire.Client(ADDRESS) as asking:
                say("using", int(asking.stats()["fetches_total"]))


def member(name, address, **options):
    return Daemon(node=name, tcp=address, etcd=f"{READER}:2379", verbs="rxe0", insecure="yes", replicas=1, hot_copies=0,
                  repair_delay="10m", arena="64M", slab="2M", staging="32M", **options)


def own(_):
    """The host of the member that owns all blocks."""
    with member("owner", ADDRESS):
        client = connect(transport="inline")
        for name in range(BLOCKS):
            client.put_names(name)
        say("put")
        time.sleep(LIMIT_S)


def read(_):
    """The host of etcd and of a member that owns nothing: says when all blocks come by READ, then as `use` does."""
    address = f"{READER}:7420"
    with Etcd(READER, 2379, 2380), member("reader", address, owns="no"), wire.Client(address) as asking:
        client, reads = Client(address, transport="inline", timeout_ms=DEADLINE_S * 1000), 0
        while True:
            start = time.monotonic()
            try:
                client.check(*range(BLOCKS))
                if reads < BLOCKS:
                    reads = int(asking.stats()["cluster_peer_read_total"])
                    if reads >= BLOCKS:
                        say("reading", reads)
            except native.Failure as error:
                if reads >= BLOCKS:
                    say("failed", str(error).split(":", maxsplit=1)[0], f"{time.monotonic() - start:.1f}")


ROLES = {"serve": serve, "use": lambda _: use(), "own": own, "read": read}


class Guest:
    """One of two joined guests, and what it says."""

    def __init__(self, folder, node, role):
        self.process = subprocess.Popen([RUNNER, "-t", str(LIMIT_S), "-w", folder, "-j", folder, "-n", str(node), "--",
                                         sys.executable, os.path.abspath(__file__), role, folder], stdout=subprocess.PIPE)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.text, self.read_lines = "", 0

    def expect(self, word):
        """The words of the next line, which must begin with `word`, before PATIENCE_S are over."""
        end = time.monotonic() + PATIENCE_S
        while True:
            self.text += (self.process.stdout.read() or b"").decode(errors="replace")
            lines = self.text.split("\n")[:-1]
            if len(lines) > self.read_lines:
                words = lines[self.read_lines].split()
                self.read_lines += 1
                if not words or words[0] != word:
                    time.sleep(1)
                    self.text += (self.process.stdout.read() or b"").decode(errors="replace")
                    raise AssertionError(f"instead of '{word}':\n{self.text}")
                return words[1:]
            if self.process.poll() == 77:
                raise unittest.SkipTest("no guest with Soft-RoCE can be had here, nothing was tested between two hosts")
            if time.monotonic() > end or self.process.poll() is not None:
                raise AssertionError(f"no '{word}' (status {self.process.poll()}):\n{self.text}")
            time.sleep(0.05)

    def cut_power(self):
        """The runner kills qemu, and so the guest, without another instruction of its own."""
        self.process.terminate()
        self.process.wait(10)
        self.process.stdout.close()


class Hosts(unittest.TestCase):
    def start(self, *args):
        guest = Guest(self.folder, *args)
        self.addCleanup(lambda: guest.process.poll() is None and guest.cut_power())
        return guest

    def test_either_dies(self):
        with tempfile.TemporaryDirectory() as self.folder:
            server, client = self.start(1, "serve"), self.start(2, "use")
            server.expect("serving")
            self.assertGreaterEqual(int(client.expect("using")[0]), 8, "RDMA is not in use")
            client.cut_power()
            with open(os.path.join(self.folder, "gone"), "wb"):
                second = self.start(2, "use")  # boots meanwhile
            server.expect("settled")
            server.expect("served")
            second.expect("using")
            server.cut_power()
            for _ in range(2):
                status, seconds = second.expect("failed")
                self.assertIn(status, ("DEADLINE_EXCEEDED", "BUSY"))
                self.assertLess(float(seconds), DEADLINE_S + GRACE_S)
            second.cut_power()

    def test_an_owner_dies_while_it_is_read(self):
        with tempfile.TemporaryDirectory() as self.folder:
            reader, owner = self.start(2, "read"), self.start(1, "own")
            owner.expect("put")
            self.assertGreaterEqual(int(reader.expect("reading")[0]), BLOCKS)
            owner.cut_power()
            for _ in range(2):
                status, seconds = reader.expect("failed")
                self.assertIn(status, ("DEADLINE_EXCEEDED", "BUSY", "NOT_FOUND"))  # the last once it is no member any more
                self.assertLess(float(seconds), DEADLINE_S + GRACE_S)
            reader.cut_power()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ROLES:
        ROLES[sys.argv[1]](sys.argv[2])
    else:
        runner.run()
