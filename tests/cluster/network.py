"""A network of namespaces: one per host, each with a cable (veth) to a bridge in a namespace of its own, so that nothing of this
machine's own network is touched; and what can go wrong in it: hosts that do not hear each other, cables pulled out, packets late
or lost.

Namespaces are named after this process (bkv<pid>-...). Those of a run that ended without tearing them down are removed, with all
that still runs in them, when the next one begins.
"""
import atexit
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PREFIX = "10.77.0."
NOWHERE = "02:00:00:00:00:01"  # an Ethernet address that nobody has
OURS = re.compile(r"bkv(\d+)[-+]")
CLONE_NEWNET = 0x40000000


def ip(*words):
    run("ip", *words)


def run(*words):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


def inside(namespace):
    """Words before a command that run it in a namespace, and end it with this program."""
    return ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", namespace]


def why_not():
    """Why there are no namespaces to be had here; None when there are."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"bkv{os.getpid()}-probe"
    try:
        ip("netns", "add", probe)
    except OSError as error:
        return f"no network namespaces: {error}"
    try:
        ip("-n", probe, "link", "add", "b0", "type", "bridge")
        ip("-n", probe, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        ip("-n", probe, "link", "set", "v0", "master", "b0")
    except OSError as error:
        return f"no bridge of veth pairs: {error}"
    finally:
        ip("netns", "del", probe)
    return None


def remove_leftovers():
    """What runs of programs that are gone have left."""
    for name in names():
        found = OURS.match(name)
        if found and not os.path.exists(f"/proc/{found.group(1)}"):
            remove(name)


def names():
    return [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line]


def remove(name):
    for pid in run("ip", "netns", "pids", name).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass
    ip("netns", "del", name)


def move_in():
    """This program itself, and all threads that it starts from now on, become a host, which every Network of it has a cable to:
    so that it can speak to the others. To be called before anything else has begun to use the network."""
    name = own_namespace()
    ip("netns", "add", name)
    atexit.register(lambda: name in names() and remove_name(name))
    with open(f"/run/netns/{name}", "rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    ip("link", "set", "lo", "up")


def own_namespace():
    return f"bkv{os.getpid()}+here"


def remove_name(name):
    """Of a namespace in which we are ourselves."""
    with contextlib.suppress(OSError):
        ip("netns", "del", name)


class Host:
    """One namespace: name, address, words (what runs a command in it)."""

    def __init__(self, name, namespace, number):
        self.name, self.namespace, self.number = name, namespace, number
        self.address, self.mac = f"{PREFIX}{number}", f"02:00:00:00:01:{number:02x}"
        self.port = f"p{number}"  # the bridge's end of its cable
        self.words = inside(namespace)


class Network:
    def __init__(self):
        remove_leftovers()
        self.prefix = f"bkv{os.getpid()}-"
        self.switch, self.hosts, self.wires = self.prefix + "switch", {}, {}
        self.netem = None
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "b0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", self.switch, "link", "set", "b0", "up")
        self.netem = self._netem_works()
        if own_namespace() in names():
            self._plug(Host("here", own_namespace(), 250))

    def _netem_works(self):
        """Whether this kernel can lose and delay packets by itself."""
        try:
            run("ip", "netns", "exec", self.switch, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "loss", "0%")
        except OSError:
            return False
        run("ip", "netns", "exec", self.switch, "tc", "qdisc", "del", "dev", "lo", "root")
        return True

    def add(self, name):
        """Another host."""
        host = Host(name, self.prefix + name, len(self.hosts) + 1)
        ip("netns", "add", host.namespace)
        self.hosts[name] = host
        ip("-n", host.namespace, "link", "set", "lo", "up")
        self._plug(host)
        return host

    def _plug(self, host):
        ip("-n", self.switch, "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "address", host.mac, "netns",
           host.namespace)
        ip("-n", self.switch, "link", "set", host.port, "master", "b0", "up")
        # The plain one, whatever this machine's own is: a guess of bandwidth and delay would be wrong after each impair().
        run("ip", "netns", "exec", host.namespace, "sysctl", "-q", "-w", "net.ipv4.tcp_congestion_control=reno")
        ip("-n", host.namespace, "link", "set", "eth0", "up")
        ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")

    # ---- what can go wrong ----

    def part(self, one, other, both=True):
        """Packets from one to the other, and back, go nowhere: silently, as when a switch in between is gone."""
        ip("-n", one.namespace, "neigh", "replace", other.address, "lladdr", NOWHERE, "nud", "permanent", "dev", "eth0")
        if both:
            self.part(other, one, both=False)

    def join(self, one, other):
        """They hear each other again."""
        for here, there in ((one, other), (other, one)):
            ip("-n", here.namespace, "neigh", "replace", there.address, "lladdr", there.mac, "nud", "permanent", "dev", "eth0")

    def unplug(self, host):
        ip("-n", self.switch, "link", "set", host.port, "down")

    def plug(self, host):
        ip("-n", self.switch, "link", "set", host.port, "up")

    def impair(self, host, loss, delay_ms, seed=0):
        """All that a host sends and gets is delayed, each way, and some of it lost: by netem, else by lossy.py in the cable."""
        if self.netem:
            for words in (["-n", self.switch, "qdisc", "replace", "dev", host.port],
                          ["-n", host.namespace, "qdisc", "replace", "dev", "eth0"]):
                run("tc", *words, "root", "netem", "delay", f"{delay_ms}ms", "loss", f"{100 * loss}%", "limit", 10000)
            return
        near, far = host.port + "a", host.port + "b"
        ip("-n", self.switch, "link", "add", near, "type", "veth", "peer", "name", far)
        for device in (near, far):
            ip("-n", self.switch, "link", "set", device, "up")
        wire = subprocess.Popen([*inside(self.switch), sys.executable, os.path.join(HERE, "lossy.py"), host.port, near, str(loss),
                                 str(delay_ms), str(seed)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.wires[host.name] = wire
        if wire.stdout.readline() != b"ready\n":
            raise OSError("lossy.py did not start")
        ip("-n", self.switch, "link", "set", host.port, "nomaster")
        ip("-n", self.switch, "link", "set", far, "master", "b0")

    def repair(self, host):
        """Takes impair back."""
        if self.netem:
            run("tc", "-n", self.switch, "qdisc", "del", "dev", host.port, "root")
            run("tc", "-n", host.namespace, "qdisc", "del", "dev", "eth0", "root")
            return
        ip("-n", self.switch, "link", "del", host.port + "a")
        ip("-n", self.switch, "link", "set", host.port, "master", "b0")
        wire = self.wires.pop(host.name)
        wire.kill()
        wire.wait()
        wire.stdout.close()

    def close(self):
        """Ends all that runs in the namespaces, and removes them."""
        for wire in self.wires.values():
            wire.kill()
            wire.wait()
            wire.stdout.close()
        self.wires.clear()
        if own_namespace() in names():  # whose end of the cable would go a little later than the next one comes
            ip("-n", own_namespace(), "link", "del", "eth0")
        for name in names():
            if name.startswith(self.prefix):
                remove(name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
