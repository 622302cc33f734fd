"""Mooncake Store over TCP as a child of the bench: starts a master and a process that owns the memory, and is their client.

    bench_mooncake.py LARGEST_BYTES      lines "put|get|drop FIRST COUNT BYTES" on stdin, "ok SECONDS" on stdout for each

The calls are those that its documentation recommends for speed: put_from and get_into on registered memory, and their batch
forms. Needs the package mooncake-transfer-engine (or -non-cuda) in its own Python.
"""
import ctypes
import mmap
import os
import signal
import socket
import subprocess
import sys
import time

import mooncake
from mooncake.store import MooncakeDistributedStore

SEGMENT = 2 << 30  # what the owner lends to the store
LOCAL = 16 << 20
LIBC = ctypes.CDLL(None)


def die_with_parent():
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connect(master, segment):
    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment, LOCAL, "tcp", "", master)
    if code != 0:
        raise RuntimeError(f"setup: {code}")
    return store


def own(master):
    """The process that owns the memory: as long as its standard input is open."""
    store = connect(master, SEGMENT)
    print("owner", flush=True)
    sys.stdin.read()
    store.close()


def start():
    """Master and owner; the master's address and both processes."""
    port, metrics = free_port(), free_port()
    program = os.path.join(os.path.dirname(mooncake.__file__), "mooncake_master")
    quiet = {"stderr": subprocess.DEVNULL, "preexec_fn": die_with_parent}
    master = subprocess.Popen([program, f"--rpc_port={port}", f"--metrics_port={metrics}", "--rpc_address=127.0.0.1"],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **quiet)
    address = f"127.0.0.1:{port}"
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.05)
    owner = subprocess.Popen([sys.executable, __file__, "--own", address],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, **quiet)
    if owner.stdout.readline() != b"owner\n":
        raise RuntimeError("the owner of the memory does not start")
    return address, [owner, master]


class Client:
    def __init__(self, master, largest):
        self.store = connect(master, 0)
        self.size = largest
        self.memory = [mmap.mmap(-1, largest) for _ in range(2)]
        self.source, self.target = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self.memory)
        self.memory[0][:] = os.urandom(1 << 20) * (largest >> 20)
        self.memory[1][:] = bytes(largest)
        for address in (self.source, self.target):
            if self.store.register_buffer(address, largest) != 0:
                raise RuntimeError("register_buffer")

    def put(self, keys, size):
        start = time.perf_counter()
        if len(keys) == 1:
            codes = [self.store.put_from(keys[0], self.source, size)]
        else:
            codes = self.store.batch_put_from(keys, [self.source + i * size for i in range(len(keys))], [size] * len(keys))
        seconds = time.perf_counter() - start
        if any(codes):
            raise RuntimeError(f"put_from: {codes}")
        return seconds

    def get(self, keys, size):
        ctypes.memset(self.target, 0, 64)
        start = time.perf_counter()
        if len(keys) == 1:
            sizes = [self.store.get_into(keys[0], self.target, size)]
        else:
            sizes = self.store.batch_get_into(keys, [self.target + i * size for i in range(len(keys))], [size] * len(keys))
        seconds = time.perf_counter() - start
        same = LIBC.memcmp(ctypes.c_void_p(self.source), ctypes.c_void_p(self.target), ctypes.c_size_t(size * len(keys))) == 0
        if sizes != [size] * len(keys) or not same:
            raise RuntimeError(f"get_into: {sizes}, the bytes {'' if same else 'not '}as put")
        return seconds

    def drop(self, keys, _):
        for key in keys:
            self.store.remove(key, True)
        return 0.0


def serve(largest, answer):
    children = []
    try:
        master, children = start()
        client = Client(master, largest)
        answer("ready")
        for line in sys.stdin:
            what, first, count, size = line.split()
            keys = [f"block-{int(first) + i}" for i in range(int(count))]
            answer(f"ok {getattr(client, what)(keys, int(size)):.9f}")
    except Exception as error:  # the bench is told, whatever it is
        answer(f"{type(error).__name__}: {error}".replace("\n", " "))
    finally:
        for child in children:
            child.kill()


def main():
    if sys.argv[1] == "--own":
        own(sys.argv[2])
        return
    # The library writes to both streams; the answers keep the real standard output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    serve(int(sys.argv[1]), lambda text: print(text, file=answers, flush=True))


main()
