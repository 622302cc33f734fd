"""What goes wrong with a pool under load, and what must hold while it does and afterwards. One method a fault; each ends with the
pool at rest again, every block with all of its owners.

A fault says what it excuses (referee.py): misses between a death and the end of the dead daemon's lease, errors of a daemon that
is itself in trouble. Nothing else is.
"""
import contextlib
import itertools
import os
import signal
import subprocess
import time

from ledger import KINDS, generator
from pool import LEASE_S, eventually
from referee import SPACE_S

NOTICE_S = 1.0  # between the end of a lease and the moment when everybody knows: etcd looks for dead leases twice a second
SETTLE_S = 40
FAULTS = ("kill", "pause", "part_from_peers", "part_from_all", "lossy", "stop_etcd", "restart_all", "kill_and_forget",
          "part_from_etcd", "fill_etcd", "join_and_drain", "freeze_etcd")


class Faults:
    def __init__(self, pool, load, seed, say=print):
        self.pool, self.load, self.referee, self.ledger = pool, load, load.referee, load.ledger
        self.rng, self.say, self.problems, self.joined = generator(seed, "faults"), say, [], itertools.count(1)
        self.repairs, self.movements, self.after = [], [], []  # (name, seconds), (name, bytes, ideal), (name, found, of)
        self.before_s = 2.0  # of load before something happens

    def schedule(self):
        """Names of faults, without end: the kill first, the others in an order of the seed's."""
        yield FAULTS[0]
        while True:
            yield from self.rng.sample(FAULTS, len(FAULTS))

    def run(self, name):
        time.sleep(self.before_s)
        self.say(f"-- {name}")
        getattr(self, name)()

    def pick(self):
        return self.rng.choice(sorted(self.pool.up(), key=lambda node: node.name))

    def trouble(self, node):
        """Errors at this node are excused, and workers seldom ask it, until calm()."""
        self.load.avoided.add(node.name)
        return self.referee.excuse(node.name)

    def calm(self, node, excuse):
        self.load.avoided.discard(node.name)
        excuse.close()

    # ---- what must hold ----

    def settle(self, name):
        took = self.pool.settle(timeout_s=SETTLE_S)
        self.repairs.append((name, took))
        self.say(f"   at rest after {took:.1f} s")

    def verify(self, name):
        """With nothing under way: every block is with all of its owners, and what two daemons have acknowledged is all there."""
        self.load.pause()
        found = total = 0
        try:
            for kind, blocks in self.blocks():
                where = self.where(kind, blocks)
                gone = [block for block, place in zip(blocks, where) if not place.holders]
                for block, place in zip(blocks, where):
                    self.judge(name, block, place)
                total += len(blocks) - sum(not block.protected() for block in gone)
                found += len(blocks) - len(gone)
                self.ledger.lost(gone)
        finally:
            self.load.resume()
        self.after.append((name, found, total))
        self.say(f"   {found} of {total} blocks are in the pool, each with all its owners")

    def judge(self, name, block, place):
        text = f"{name}: {block.kind.name} {block.number} is with {list(place.holders)}, its owners are {list(place.owners)}"
        if set(place.owners) <= set(place.holders):
            self.ledger.stored(block, len(place.owners))  # repair has made good what its Put could not do
        elif place.holders or block.protected():
            self.problems.append(text)

    def blocks(self):
        """(kind, live blocks of it)."""
        live = self.ledger.all()
        return [(kind, [b for b in live if b.kind is kind]) for kind in KINDS if any(b.kind is kind for b in live)]

    def where(self, kind, blocks, node=None, ask=True):
        node = node or self.pick()
        spec_id = blocks[0].spec_id if ask else b""
        return [place for at in range(0, len(blocks), 500)
                for place in node.where(spec_id, [b.key for b in blocks[at:at + 500]])]

    def sweep(self):
        """Reads all that two daemons have acknowledged, while the load goes on: the referee sees what is missing."""
        worker = self.load.workers[0].twin()
        for _, blocks in self.blocks():
            for at in range(0, len(blocks), 32):
                live = [b for b in blocks[at:at + 32] if b.protected()]
                if live:
                    worker.fetch(live, operation="sweep", deadline_s=10)
        worker.hang_up()

    # ---- what moves ----

    def owners(self):
        """{block: (its owners, its record's bytes)}, with nothing being put."""
        return {block: (set(place.owners), place.record_bytes) for kind, blocks in self.blocks()
                for block, place in zip(blocks, self.where(kind, blocks))}

    def bury(self, name):
        """Blocks that were dropped while a daemon was away may have come back with it. Dropped again, they are nowhere."""
        for kind, blocks in self.ledger.take_dropped():
            node = self.pick()
            node.client.open(**kind.spec)
            for at in range(0, len(blocks), 500):
                node.client.drop(blocks[0].spec_id, [block.key for block in blocks[at:at + 500]])
            for block, place in zip(blocks, self.where(kind, blocks)):
                if place.holders:
                    self.problems.append(f"{name}: {kind.name} {block.number} was dropped, and is with {list(place.holders)}")

    def sent(self):
        return {node.name: (metrics[""].boot_epoch, metrics["cluster_repair_sent_bytes_total"])
                for node in self.pool.up() for metrics in [node.metrics()]}

    def measure(self, name, change, share):
        """change() under reads alone: what is sent for it, against the share of all bytes that the theory says must move."""
        self.load.only_reads(True)
        self.bury(name)
        time.sleep(2 * self.pool.repair_delay_s)
        self.pool.settle(timeout_s=SETTLE_S)
        was, sent = self.owners(), self.sent()
        change()
        self.settle(name)
        moved = sum(bytes_ - (sent[node][1] if sent.get(node, (0,))[0] == epoch else 0)
                    for node, (epoch, bytes_) in self.sent().items())
        now = self.owners()
        needed = sum(bytes_ * len(owners - was[block][0]) for block, (owners, bytes_) in now.items() if block in was)
        ideal = share * sum(bytes_ * len(owners) for owners, bytes_ in now.values())
        self.movements.append((name, moved, ideal, needed))
        self.say(f"   {moved / 1e6:.1f} MB moved; the share is {ideal / 1e6:.1f} MB, of these blocks {needed / 1e6:.1f} MB")
        self.load.only_reads(False)

    # ---- daemons ----

    def die(self, node, name):
        """kill -9 under load; until the lease has expired and the others have repaired."""
        misses, errors = self.referee.excuse(), self.trouble(node)
        died = time.monotonic()
        node.kill()
        self.say(f"   killed {node.name}")
        time.sleep(LEASE_S + NOTICE_S)
        misses.close(-SPACE_S)
        self.sweep()
        self.say(f"   everything read {time.monotonic() - died:.1f} s after its death")
        self.settle(name)
        self.verify(name)
        self.sweep()
        return errors

    def come_back(self, node, excuse, name):
        node.start()
        self.calm(node, excuse)
        self.settle(name)
        self.verify(name)

    def kill(self):
        """A daemon dies, and comes back with the memory it had."""
        node = self.pick()
        excuse = self.die(node, "kill")
        self.come_back(node, excuse, "return")

    def kill_and_forget(self):
        """A host dies, and comes back at once with empty memory, while the lease of the dead daemon still runs."""
        node = self.pick()
        misses, errors = self.referee.excuse(), self.trouble(node)
        node.kill()
        node.forget_arena()
        node.start()
        self.say(f"   killed {node.name} and started it anew, without its memory")
        time.sleep(LEASE_S + NOTICE_S)
        misses.close(-SPACE_S)
        self.calm(node, errors)
        self.sweep()
        self.settle("return without memory")
        self.verify("return without memory")

    def pause(self):
        """SIGSTOP, for longer than a lease, or for a moment."""
        node, length = self.pick(), self.rng.choice((2, LEASE_S + 3))
        excuse = self.trouble(node)
        node.pause()
        self.say(f"   stopped {node.name} for {length} s")
        time.sleep(length)
        node.resume()
        self.calm(node, excuse)
        self.settle("pause")
        self.verify("pause")

    def restart_all(self):
        """A rolling restart: no error and no miss is excused, whoever asks goes to another daemon."""
        absences = self.referee.excuse(*self.pool.nodes, absences=True)
        for node in sorted(self.pool.up(), key=lambda node: node.name):
            self.load.avoided.add(node.name)
            node.stop()
            node.start()
            self.load.avoided.discard(node.name)
            self.pool.settle(moved=False, timeout_s=SETTLE_S)
        absences.close()
        self.say("   every daemon has been restarted")
        self.settle("rolling restart")
        self.verify("rolling restart")

    def join_and_drain(self):
        """A daemon joins; another hands over all it has, goes, and comes back with nothing; the first one hands over and goes."""
        old = self.pick()
        new = self.pool.add(f"x{next(self.joined)}")
        members = len(self.pool.up())
        self.measure("join", lambda: (new.start(), self.pool.settle(moved=False)), 1 / (members + 1))
        self.verify("join")
        self.measure("drain", lambda: self.hand_over(old, new), 1 / (members + 1))
        old.stop()
        old.forget_arena()
        old.start()
        self.settle("return after a drain")
        self.verify("return after a drain")
        self.hand_over(new, old)
        new.stop()
        del self.pool.nodes[new.name]
        self.settle("leave")
        self.verify("leave")

    def hand_over(self, node, asked):
        asked.drain(node.name)
        progress = eventually(lambda: (answer := asked.drain(node.name, ask=True)).done and answer, "the drain is done", SETTLE_S)
        self.say(f"   {node.name} handed over {progress.moved_keys} keys, {progress.moved_bytes / 1e6:.1f} MB, asked through "
                 f"{asked.name}")
        for kind, blocks in self.blocks():
            for block, place in zip(blocks, self.where(kind, blocks, asked)):
                if not block.dropped and not set(place.holders) - {node.name}:
                    self.problems.append(f"drain: {kind.name} {block.number} was not handed over: {list(place.holders)}")

    # ---- the network ----

    def apart(self, node, hosts, name, seconds=LEASE_S + 3):
        excuse = self.trouble(node)
        network = self.pool.network
        for host in hosts:
            network.part(node.host, host)
        self.say(f"   {node.name} does not hear {', '.join(host.name for host in hosts)}")
        time.sleep(seconds)
        self.sweep_except(node)
        for host in hosts:
            network.join(node.host, host)
        self.pool.settle(moved=False, timeout_s=SETTLE_S)
        self.calm(node, excuse)
        self.settle(name)
        self.verify(name)

    def sweep_except(self, node):
        """Everything can be read through the others."""
        self.load.hidden.add(node.name)
        self.sweep()
        self.load.hidden.discard(node.name)

    def others(self, node):
        return [other.host for other in self.pool.nodes.values() if other is not node]

    def part_from_peers(self):
        node = self.pick()
        self.apart(node, self.others(node), "no way to the others")

    def part_from_etcd(self):
        self.apart(self.pick(), [self.pool.etcd_host], "no way to etcd")

    def part_from_all(self):
        """Its cable is out."""
        node = self.pick()
        excuse = self.trouble(node)
        self.pool.network.unplug(node.host)
        self.say(f"   the cable of {node.name} is out")
        time.sleep(LEASE_S + 3)
        self.sweep_except(node)
        self.pool.network.plug(node.host)
        self.pool.settle(moved=False, timeout_s=SETTLE_S)
        self.calm(node, excuse)
        self.settle("cable out")
        self.verify("cable out")

    def lossy(self):
        """Packets of one host come late, and some not at all: slower, but nothing fails elsewhere."""
        node, loss, delay_ms = self.pick(), self.rng.choice((0.01, 0.05)), self.rng.choice((5, 25))
        excuse = self.trouble(node)
        self.pool.network.impair(node.host, loss, delay_ms, self.rng.randrange(1 << 30))
        self.say(f"   {node.name} loses {100 * loss:.0f} % of its packets, the others are {delay_ms} ms late each way")
        time.sleep(6)
        self.pool.network.repair(node.host)
        self.calm(node, excuse)
        self.settle("bad cable")
        self.verify("bad cable")

    # ---- etcd ----

    def stop_etcd(self):
        """etcd is killed, and started again later than any lease lasts: everybody goes on."""
        self.pool.etcd.kill()
        self.say("   etcd is down")
        time.sleep(LEASE_S + 2)
        self.sweep()
        self.pool.etcd.start()
        self.settle("etcd restarted")
        self.verify("etcd restarted")

    def freeze_etcd(self):
        """etcd's host is stopped, and goes on."""
        self.pool.etcd.pause()
        self.say("   etcd is stopped")
        time.sleep(LEASE_S + 2)
        self.sweep()
        self.pool.etcd.resume()
        self.settle("etcd stopped")
        self.verify("etcd stopped")

    def fill_etcd(self):
        """etcd's disk quota is used up: members stay members, and serve."""
        etcd = self.pool.etcd
        junk = os.path.join(self.pool.folder, "junk")
        with open(junk, "wb") as file:
            file.write(b"x" * (1 << 20))
        while "NOSPACE" not in etcd.control("alarm", "list"):
            with open(junk, "rb") as file, contextlib.suppress(subprocess.CalledProcessError):
                etcd.control_once("put", "/junk", stdin=file)
        self.say("   etcd's disk is full")
        time.sleep(LEASE_S + 1)
        if any(node.report().state != "member" for node in self.pool.up()):
            self.problems.append("full disk: a member is none any more")
        self.sweep()
        revision = int(etcd.control("get", "/junk", "-w", "fields").split('"Revision" : ')[1].split()[0])
        etcd.control("compaction", revision)
        etcd.control("defrag")
        etcd.control("alarm", "disarm")
        self.settle("full disk")
        self.verify("full disk")


def quiet_signals():
    """SIGTERM ends a run as Ctrl-C does, and Ctrl-C does even in the background: with everything torn down."""
    def end(*_):
        raise KeyboardInterrupt
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
