"""The RDMA tests' frame: each test_*.py runs itself again in a guest of its own (run-in-vm.sh), where the daemon has the device
rxe0 and its clients rxe1, two ends of one cable; what the kernel says of their use tells whether anything was left behind.
"""
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "integration"))

from harness import Case, eventually, np, pb  # noqa: E402
from support import built, native, runner  # noqa: E402

RUNNER = os.path.join(HERE, "run-in-vm.sh")
LIMIT_S = 300  # of a whole test program, which takes a fraction of it unless the machine is very busy
SETTLE_S = 10  # the longest that anything may be left behind: retries of a link, an idle session, a tick of the daemon

# Raw blocks: every byte of a payload comes back in its record, which ends with it.
LAYERS, HEADS, DIM, TOKENS = 4, 4, 64, 128
BLOCK = LAYERS * HEADS * TOKENS * 2 * DIM * 2
SPEC = dict(model="rdma@1", layers=LAYERS, kv_heads=HEADS, key_dim=DIM, dtype=pb.DTYPE_BF16, block_tokens=TOKENS,
            codec=pb.CODEC_RAW)


def run():
    """As support.runner.run, in a guest. Without one: says so, and counts as one skip."""
    if "BKV_GUEST" in os.environ:
        runner.run()
    done = subprocess.run([RUNNER, "-t", str(LIMIT_S), "--", sys.executable, *sys.argv], check=False)
    if done.returncode == 77:
        skip()
    sys.exit(done.returncode)


def skip():
    print("SKIPPED: no guest with Soft-RoCE can be had here (see above), nothing was tested over RDMA")
    print("0 passed, 0 failed, 1 skipped")
    sys.exit(0)


def content(name, size=BLOCK):
    """The payload under key(name): random but finite bf16 numbers, all of them from the name."""
    return np.random.default_rng(name).integers(0, 0x4000, size // 2, np.uint16).tobytes()


def key(name):
    return native.Key(*(b"rdma-%d-" % name).ljust(32, b"."))


def resources(device):
    """What is in use of a device, by kind: queue pairs, completion queues, regions of memory, protection domains."""
    shown = subprocess.run(["rdma", "-j", "resource", "show"], capture_output=True, text=True, check=True)
    entry = next(entry for entry in json.loads(shown.stdout) if entry["ifname"] == device)
    return {kind: entry[kind] for kind in ("qp", "cq", "mr", "pd")}


class Client(native.Client):
    """The real client, with a spec open."""

    def __init__(self, endpoint, transport="verbs", device="rxe1", window=0, timeout_ms=10000, **changes):
        spec = {**SPEC, **changes}
        super().__init__(endpoint, timeout_ms, transport=transport, window_bytes=window, verbs_device=device, **spec)
        self.size = BLOCK // LAYERS * spec["layers"]

    def put_names(self, *names, codec=0, rate=0):
        self.put([(key(name), TOKENS * name, TOKENS, content(name, self.size), codec, rate) for name in names])

    def get_names(self, *names):
        """The records' bytes."""
        return self.take(self.get_raw([key(name) for name in names]))

    def fold_names(self, *names, **fields):
        return self.take(self.fold_raw([key(name) for name in names], **fields))

    def take(self, records):
        taken = [native.c.string_at(record.data, record.length) for record in records]
        self.free(records)
        return taken

    def check(self, *names):
        """AssertionError unless each name's record ends with its payload."""
        for name, record in zip(names, self.get_names(*names)):
            if not record.endswith(content(name, self.size)):
                raise AssertionError(f"wrong bytes came for key {name}")


class Peer:
    """peer.c and its window: a file in memory that both see."""

    def __init__(self, device="rxe1", window=4 << 20, gid_index=1):
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.truncate(window)
            self.window = np.memmap(file.name, np.uint8, "r+")
            self.process = subprocess.Popen([built("tests", "rdma-peer"), device, str(gid_index), file.name], text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line or line.startswith("error"):
            raise AssertionError(f"peer: {line or 'ended'}")
        names = ("queue_pair", "packet", "gid", "mtu", "address", "key", "bytes")
        self.end = {name: bytes.fromhex(word) if name == "gid" else int(word) for name, word in zip(names, line.split())}

    def tell(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        self.read()

    def offer(self, **changes):
        """Its end as an AttachRequest."""
        return pb.AttachRequest(verbs=pb.VerbsWindow(**{"reads": 16, **self.end, **changes}))

    def attach(self, client, **changes):
        """A session with the daemon; the connection is made."""
        reply = client.unary("Attach", self.offer(**changes), pb.AttachResponse)
        daemon = reply.verbs
        self.tell("connect", daemon.queue_pair, daemon.packet, daemon.gid.hex(), daemon.mtu)
        return reply

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class VerbsCase(Case):
    """A daemon with rxe0 for the tests of a class. After each test nothing may be in use that was not before it."""

    options = {"verbs": "rxe0", "idle": "2s", "arena": "64M", "slab": "2M", "staging": "32M", "op_timeout": "8s"}

    def setUp(self):
        super().setUp()
        self.address = f"127.0.0.1:{self.daemon.port()}"
        self.level = self.used()
        self.addCleanup(self.check_level)

    def used(self):
        return {device: resources(device) for device in ("rxe0", "rxe1")}

    def check_level(self):
        try:
            eventually(lambda: self.used() == self.level and self.client.stats()["sessions"] == 0, "", SETTLE_S)
        except AssertionError:
            sessions = self.client.stats()["sessions"]
            raise AssertionError(f"left behind: {sessions:.0f} sessions; {self.used()} instead of {self.level}") from None

    def native(self, *args, **kwargs):
        client = Client(self.address, *args, **kwargs)
        self.addCleanup(client.close)
        return client

    def peer(self, **kwargs):
        peer = Peer(**kwargs)
        self.addCleanup(peer.close)
        return peer

    def moved(self):
        """(fetches, deliveries, failed) so far."""
        stats = self.client.stats()
        return tuple(int(stats[name]) for name in ("fetches_total", "deliveries_total", "transfers_failed_total"))
