"""A cluster under test: an etcd and some daemons, each on a host of its own in a network of namespaces, and what can be asked of
them as an operator would. What goes wrong with them is faults.py's affair.
"""
import os
import re
import shutil
import signal
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

import grpc  # noqa: E402
from network import Network  # noqa: E402
from support import wire  # noqa: E402
from support.daemon import Daemon, memory_folder  # noqa: E402
from support.etcd import Etcd  # noqa: E402
from support.wire import pb  # noqa: E402

LEASE_S = 5  # the daemon's default
REPAIR_DELAY_S = 1.5
PORT = 7420
CPUCLOCK_SCHED = 2
FOLDER = re.compile(r"bkv-pool-(\d+)-")


def eventually(condition, what, timeout_s):
    """Waits until condition() is true, and returns what it returned; AssertionError after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what() if callable(what) else what}")
        time.sleep(0.05)


class Node(Daemon):
    """A daemon on a host. Its clients reach it through its unix socket whatever the network does, as workers of that host do."""

    def __init__(self, host, etcd, parent, **options):
        settings = {"tcp": f"{host.address}:{PORT}", "insecure": "yes", "etcd": etcd, "node": host.name, "lease": f"{LEASE_S}s",
                    "repair_delay": f"{int(1000 * REPAIR_DELAY_S)}ms", "arena": "128M", "slab": "8M", "max_entries": "16384",
                    "staging": "32M", "shm": "0", "threads": "1", "rpc_threads": "1", "drain_timeout": "5s"}
        super().__init__(parent=parent, prefix=host.words, **{**settings, **options})
        self.host, self.name = host, host.name
        self.options.setdefault("arena_path", os.path.join(self.folder, "arena"))
        self.client = None

    def start(self, **extra):
        super().start(**extra)
        self.reconnect()
        return self

    def reconnect(self):
        """A new connection for questions of an operator: an old one would pause before it tries again."""
        if self.client:
            self.client.close()
        self.client = wire.Client(self.target)

    def forget_arena(self):
        """Its memory is lost, as with a host's power."""
        if os.path.exists(self.options["arena_path"]):
            os.unlink(self.options["arena_path"])

    def running(self):
        return self.process is not None and self.process.poll() is None

    def pause(self):
        self.signal(signal.SIGSTOP)

    def resume(self):
        self.signal(signal.SIGCONT)

    def close(self):
        if self.running():
            self.resume()  # a stopped one would not end
        if self.client:
            self.client.close()
        super().close()

    # ---- questions ----

    def report(self, timeout=5):
        """What it knows of the cluster."""
        return self.client.unary("Cluster", pb.ClusterRequest(), pb.ClusterResponse, timeout)

    def where(self, spec_id, keys, timeout=20):
        return self.client.unary("Where", pb.WhereRequest(spec_id=spec_id, keys=keys), pb.WhereResponse, timeout).keys

    def drain(self, member="", undo=False, ask=False, timeout=10):
        return self.client.unary("Drain", pb.DrainRequest(member=member, undo=undo, ask=ask), pb.DrainResponse, timeout)

    def metrics(self):
        return self.client.stats()

    def cpu_s(self):
        """CPU time that all its threads have used, in seconds: the clock that clock_getcpuclockid(3) names."""
        return time.clock_gettime(~self.process.pid << 3 | CPUCLOCK_SCHED)


class Pool:
    """Hosts n1, n2, ... with a daemon each, and one with etcd. To be used as a context: nothing of it is left behind."""

    def __init__(self, nodes, etcd_options=None, **options):
        remove_leftovers()
        self.folder = tempfile.mkdtemp(prefix=f"bkv-pool-{os.getpid()}-", dir=memory_folder())
        self.options, self.nodes, self.network, self.etcd = options, {}, None, None
        self.repair_delay_s = REPAIR_DELAY_S
        try:
            self.network = Network()
            self.etcd_host = self.network.add("etcd")
            self.etcd = Etcd(host=self.etcd_host.address, port=2379, peer_port=2380, prefix=self.etcd_host.words,
                             parent=self.folder, **(etcd_options or {}))
            self.etcd.start()
            for number in range(1, nodes + 1):
                self.add(f"n{number}")
        except BaseException:
            self.close()
            raise

    def add(self, name, **options):
        """Another host and its daemon, which is not started."""
        node = Node(self.network.add(name), self.etcd.endpoint, self.folder, **{**self.options, **options})
        self.nodes[name] = node
        return node

    def start(self, moved=True):
        for node in self.nodes.values():
            node.start()
        self.settle(moved=moved)
        return self

    def up(self):
        """The nodes whose process runs."""
        return [node for node in self.nodes.values() if node.running()]

    def close(self):
        for node in self.nodes.values():
            node.kill()
            node.close()
        if self.etcd:
            self.etcd.close()
        if self.network:
            self.network.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # ---- the state of all ----

    def unsettled(self, nodes=None, moved=True):
        """Why the pool is not at rest: what a node says that it should not; "" when every node knows just these as members, finds
        that they answer, and (moved) has nothing to send or to wait for."""
        nodes = nodes or self.up()
        names = sorted(node.name for node in nodes)
        for node in nodes:
            try:
                report = node.report(timeout=2)
            except grpc.RpcError as error:
                return f"{node.name}: {error.code().name} {error.details()}"
            if report.state != "member":
                return f"{node.name} is {report.state}: {report.trouble}"
            if [member.id for member in report.members] != names:
                return f"{node.name} sees {[member.id for member in report.members]}, not {names}"
            suspects = [member.id for member in report.members if member.suspected]
            if suspects:
                return f"{node.name} passes over {suspects}"
            if moved and report.repair != "idle":
                return f"{node.name} is {report.repair}, {report.repair_left_keys} keys to go"
        return ""

    def settle(self, nodes=None, moved=True, timeout_s=40):
        """Waits until nothing is unsettled, three looks in a row."""
        said = [""]

        def settled():
            for _ in range(3):
                said[0] = self.unsettled(nodes, moved)
                if said[0]:
                    return False
                time.sleep(0.1)
            return True

        started = time.monotonic()
        eventually(settled, lambda: said[0], timeout_s)
        return time.monotonic() - started

    def total(self, name, nodes=None):
        """The sum of a metric over nodes."""
        return sum(node.metrics()[name] for node in nodes or self.up())


def remove_leftovers():
    """The folders of runs that did not end by themselves."""
    for parent in {memory_folder() or tempfile.gettempdir(), tempfile.gettempdir()}:
        for name in os.listdir(parent):
            found = FOLDER.match(name)
            if found and not os.path.exists(f"/proc/{found.group(1)}"):
                shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
