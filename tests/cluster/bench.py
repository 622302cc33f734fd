#!/usr/bin/env python3
"""What a pool costs against a daemon alone, and what distance costs a Get. Prints a table, writes build/bench/bench-cluster.json.

    bench.py [--blocks 96] [--rounds 5] [--gets 1000] [--replicas 2]

Throughput per core. One daemon alone and three in a pool do the same work for the same generator: four threads that put blocks
and get records, one at a time. All daemons of a side share one CPU, the generator has the other, and what counts is the
payload that is served in a CPU second of the daemons, by the kernel's account: so it is fair that three of them have one CPU, and
what else this machine does matters little. Their memory has been touched before, as that of a daemon that has run for a while has.
Sides alternate, and the median of the rounds is taken. Blocks are a worker's usual
ones: bf16 for `balance` at rate 16, and each is put once and read four times. In the pool each block is put at any daemon,
compressed there, and given to its owners. Reads go either to any daemon, or by a client that routes by key. A pool of one shows
what is owed to the threads of a cluster alone.

Latency. One Get at a time at one daemon, of records that are here and of records that are at another. What distance may cost is
one bare round trip, which the daemon measures itself (its small questions to that peer). On one machine that is mostly the work of
waking processes, and a record of 256 KiB has to be carried once more besides; so the bar is for the same over a cable that holds
every packet back for some milliseconds: what counts there is how often something has to cross it. Then one of the two owners is
made slow, and the daemon has to ask the other one.
"""
import argparse
import os
import statistics
import sys
import threading
import time

import network
from faults import quiet_signals
from pool import PORT, Pool, eventually

from support import native, report
from support.wire import pb

LAYERS, HEADS, DIM, TOKENS, RATE = 8, 4, 128, 256, 16
SPEC = dict(model="bench@1", layers=LAYERS, kv_heads=HEADS, key_dim=DIM, dtype=pb.DTYPE_BF16, block_tokens=TOKENS,
            codec=pb.CODEC_BALANCE, rate=RATE)
BLOCK = LAYERS * HEADS * TOKENS * 2 * DIM * 2  # 4 MiB, of which 256 KiB are kept
READS = 4  # of each block
THREADS = 4
DAEMON_CPU, OWN_CPU = 0, 1
DELAY_MS = 20
SLOW_MS = 100


def key(number):
    return native.Key(*(b"bench-%d-" % number).ljust(32, b"."))


def payload():
    """One block's K and V; all blocks are put with these bytes, under keys of their own."""
    import numpy as np
    values = np.random.default_rng(1).normal(size=BLOCK // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def connect(node, **options):
    """Over TCP, as from another host: the same for both sides, and for clients that go to whom they are told to."""
    return native.Client(f"{node.host.address}:{PORT}", transport="inline", **options, **SPEC)


class Side:
    """Daemons and a generator's connections to them."""

    def __init__(self, nodes):
        self.nodes, self.numbers = nodes, iter(range(1 << 40))
        threads = range(THREADS)
        self.clients = [[connect(node) for node in nodes] for _ in threads]
        self.routers = [[connect(nodes[0], route=True)] for _ in threads] if len(nodes) > 1 else self.clients
        self.content, self.lock = payload(), threading.Lock()

    def close(self):
        for client in {client for clients in self.clients + self.routers for client in clients}:
            client.close()

    def cpu_s(self):
        return sum(node.cpu_s() for node in self.nodes)

    def timed(self, clients, work, items):
        """work(a thread's clients, item) for all items by all threads: (CPU seconds of the daemons, seconds)."""
        queue, wrong = list(items), []

        def worker(clients):
            try:
                while queue:
                    work(clients, queue.pop())
            except (IndexError, native.Failure) as error:
                if isinstance(error, native.Failure):
                    wrong.append(error)

        threads = [threading.Thread(target=worker, args=(own,)) for own in clients]
        before, began = self.cpu_s(), time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wrong:
            raise wrong[0]
        took = time.monotonic() - began
        return max(self.cpu_s() - before, 1e-9), took

    def put(self, numbers):
        def one(own, n):
            own[n % len(own)].put([(key(n), 0, TOKENS, self.content, 0, 0)])
        return self.timed(self.clients, one, numbers)

    def get(self, clients, numbers):
        """At any of the nodes that the clients speak to."""
        def one(own, item):
            turn, n = item
            client = own[(turn + n) % len(own)]
            client.free(client.get_raw([key(n)]))
        return self.timed(clients, one, [(turn, n) for n in numbers for turn in range(READS)])

    def drop(self, numbers):
        self.clients[0][0].drop([key(n) for n in numbers])


def round_of(side, blocks):
    """{what: (payload bytes a CPU second, payload bytes a second)}."""
    numbers = [next(side.numbers) for _ in range(blocks)]
    figures = {}

    def count(name, reads, cpu_s, took):
        figures[name] = (reads * BLOCK / cpu_s, reads * BLOCK / took, cpu_s, took)

    count("put", blocks, *side.put(numbers))
    count("get, at any", READS * blocks, *side.get(side.clients, numbers))
    count("get, routed by key", READS * blocks, *side.get(side.routers, numbers))
    for name in ("at any", "routed by key"):
        together = [figures["put"], figures[f"get, {name}"]]
        figures[f"put once, get {READS} times, {name}"] = (
            (1 + READS) * blocks * BLOCK / sum(f[2] for f in together),
            (1 + READS) * blocks * BLOCK / sum(f[3] for f in together))
    side.drop(numbers)
    return figures


def throughput(rows, rounds, blocks, replicas):
    """One daemon alone, which has a network and a folder as the pool's have, and a pool of one, against three."""
    pin = ["taskset", "-c", str(DAEMON_CPU)]
    with Pool(5, repair_delay="60s", arena="512M", staging="64M", prefault="yes", level="warn", replicas=replicas) as pool:
        pool.nodes["n4"].options.update(etcd="")
        pool.nodes["n5"].options.update(cluster_name="one")
        for node in pool.nodes.values():
            node.prefix += pin
            node.start()
        trio = [pool.nodes[name] for name in ("n1", "n2", "n3")]
        pool.settle(trio, moved=False)
        os.sched_setaffinity(0, {OWN_CPU})
        sides = {"alone": Side([pool.nodes["n4"]]), "one": Side([pool.nodes["n5"]]), "pool": Side(trio)}
        figures = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, side in sides.items():
                found = round_of(side, blocks if number else 8)
                if number:  # the first one warms up
                    figures[name].append(found)
        for side in sides.values():
            side.close()
        os.sched_setaffinity(0, {DAEMON_CPU, OWN_CPU})
    for what in figures["alone"][0]:
        alone, one, pooled = (statistics.median(f[what][0] for f in figures[name]) / 1e9 for name in sides)
        bar = 0.8 if what.startswith("put once") else None
        rows.append(report.row(f"{what}: pool of 1, of a CPU second", one, "GB", alone))
        rows.append(report.row(f"{what}: pool of 3, of a CPU second", pooled, "GB", alone, bar))
    for name in sides:
        rows.append(report.row(f"put at any, {name}, 1 CPU", statistics.median(f["put"][1] for f in figures[name]) / 1e9, "GB/s"))


class Distance:
    """Records that n1 has, and such that it must get from n2 or n3."""

    def __init__(self, pool, blocks):
        self.pool, self.asked = pool, pool.nodes["n1"]
        self.client, content = connect(self.asked), payload()
        clients = {node.name: connect(node) for node in pool.nodes.values()}
        where = self.asked.where(b"", [bytes(key(n)) for n in range(blocks)])
        for number, place in enumerate(where):  # who puts a block keeps it, too: that must be an owner
            clients[place.owners[0]].put([(key(number), 0, TOKENS, content, 0, 0)])
        self.here = [n for n, place in enumerate(where) if "n1" in place.owners]
        self.there = [n for n, place in enumerate(where) if "n1" not in place.owners]

    def time(self, number):
        began = time.perf_counter()
        records = self.client.get_raw([key(number)])
        took = time.perf_counter() - began
        self.client.free(records)
        return took

    def compare(self, count):
        """Interleaved: (times of records here, of records elsewhere), in seconds."""
        here, there = [], []
        for turn in range(count):
            here.append(self.time(self.here[turn % len(self.here)]))
            there.append(self.time(self.there[turn % len(self.there)]))
        return here, there

    def round_trip(self, questions=100):
        """As the daemon asked measures it, with questions about a key that is nowhere."""
        spec_id = self.asked.client.open(**SPEC).spec_id
        for number in range(questions):
            self.asked.client.lookup(spec_id, [bytes(key((1 << 30) + number))])
        found = [m.latency_us for m in self.asked.report().members if m.id != "n1" and m.latency_us]
        return statistics.mean(found) / 1e6


def latency(rows, count):
    with Pool(3, repair_delay="60s", hot_copies="0", arena="256M", level="warn") as pool:
        pool.start(moved=False)
        distance = Distance(pool, 60)
        distance.compare(count // 10)
        here, there = distance.compare(count)
        trip = distance.round_trip()
        near, far = statistics.median(here), statistics.median(there)
        rows += [report.row("Get p50 at hand", 1e6 * near, "us"), report.row("a bare round trip to a peer", 1e6 * trip, "us"),
                 report.row("Get p50 from a peer, against both", 1e6 * far, "us", 1e6 * (near + trip)),
                 report.row("Get p50 from a peer, against two at hand", 1e6 * far, "us", 2e6 * near)]
        slow_network(rows, pool, distance, max(40, count // 20))
        slow_owner(rows, pool, distance, max(60, count // 4), far)


def slow_network(rows, pool, distance, count):
    """All of n1's packets are held back: a Get from a peer may cost one round trip more, and not two."""
    pool.network.impair(distance.asked.host, 0, DELAY_MS)
    distance.compare(4)
    here, there = distance.compare(count)
    more = statistics.median(there) - statistics.median(here)
    rows.append(report.row(f"a Get from a peer {2 * DELAY_MS} ms away adds", 1e3 * more, "ms", 1e3 * distance.round_trip(), 1.1,
                           at_least=False))
    pool.network.repair(distance.asked.host)
    eventually(lambda: distance.round_trip() < DELAY_MS / 1000, "n1 is near again", 20)


def slow_owner(rows, pool, distance, count, far):
    """n2 is slow, n3 is not: both own what n1 does not."""
    pool.network.impair(pool.nodes["n2"].host, 0, SLOW_MS / 2)
    first, began = [], time.monotonic()
    while time.monotonic() - began < 1:
        first += distance.compare(1)[1]
    _, there = distance.compare(count)
    pool.network.repair(pool.nodes["n2"].host)
    there.sort()
    rows += [report.row(f"one owner {SLOW_MS} ms slow: the first Gets, most", 1e3 * max(first), "ms", SLOW_MS),
             report.row(f"one owner {SLOW_MS} ms slow: Get p50", 1e3 * statistics.median(there), "ms", 1e3 * far),
             report.row(f"one owner {SLOW_MS} ms slow: Get p99", 1e3 * there[int(0.99 * len(there))], "ms", SLOW_MS, 0.5,
                        at_least=False)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=96, help="of a round of throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gets", type=int, default=1000, help="of the comparison of latencies")
    parser.add_argument("--replicas", type=int, default=2)
    options = parser.parse_args()
    quiet_signals()
    why = network.why_not()
    if why:
        print(f"bench-cluster: SKIPPED, nothing of the cluster was measured: {why}")
        return 0
    network.move_in()
    rows = []
    latency(rows, options.gets)
    throughput(rows, options.rounds, options.blocks, options.replicas)
    return 0 if report.finish("bench-cluster", rows) else 1


if __name__ == "__main__":
    sys.exit(main())
