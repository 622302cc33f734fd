#!/usr/bin/env python3
"""What a pool costs against a daemon alone, and what distance costs a Get. Prints a table, writes build/bench/bench-cluster.json.

    bench.py [--blocks 96] [--rounds 5] [--gets 1000]

Throughput per core. One daemon alone and three in a pool do the same work for the same generator: its threads put blocks and get
records, four in flight. All daemons of a side share one CPU, the generator has the other, and what counts is the payload that is
served in a CPU second of the daemons, by their own account in /proc: so it does not matter how many of them share the CPU, nor
what else this machine does. Sides alternate, and the median of the rounds is what counts. Blocks are a worker's usual ones: bf16
for `balance` at rate 16, and each is put once and read four times. In the pool R = 2: each block is put at any daemon, compressed
there, and given to two. Reads go either to any daemon, or to one that holds the block, as a client that routes by key does.

Latency. One Get at a time at one daemon, of records that are here and of records that are at another. What distance may cost is
one bare round trip, which the daemon measures itself (its small questions to that peer); and as on one machine this is mostly the
work of waking processes, the same over a cable that holds every packet back for some milliseconds. Then one of the two owners is
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
from pool import Pool, eventually

from support import native, report
from support.wire import pb

LAYERS, HEADS, DIM, TOKENS, RATE = 8, 4, 128, 256, 16
SPEC = dict(model="bench@1", layers=LAYERS, kv_heads=HEADS, key_dim=DIM, dtype=pb.DTYPE_BF16, block_tokens=TOKENS,
            codec=pb.CODEC_BALANCE, rate=RATE)
BLOCK = LAYERS * HEADS * TOKENS * 2 * DIM * 2  # 4 MiB, of which 256 KiB are kept
READS = 4  # of each block
THREADS = 4
DAEMON_CPU, OWN_CPU = 0, 1
DELAY_MS = 10
SLOW_MS = 100


def key(number):
    return native.Key(*(b"bench-%d-" % number).ljust(32, b"."))


def payload():
    """One block's K and V; all blocks are put with these bytes, under keys of their own."""
    import numpy as np
    values = np.random.default_rng(1).normal(size=BLOCK // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


class Side:
    """Daemons and a generator's connections to them."""

    def __init__(self, pool, nodes):
        self.pool, self.nodes, self.numbers = pool, nodes, iter(range(1 << 40))
        self.clients = [[native.Client(node.target, transport="inline", **SPEC) for node in nodes] for _ in range(THREADS)]
        self.content, self.lock = payload(), threading.Lock()

    def close(self):
        for clients in self.clients:
            for client in clients:
                client.close()

    def cpu_s(self):
        return sum(node.cpu_s() for node in self.nodes)

    def timed(self, work, items):
        """work(thread's clients, item) for all items by all threads: (CPU seconds of the daemons, seconds)."""
        queue, wrong = list(items), []

        def worker(clients):
            try:
                while queue:
                    work(clients, queue.pop())
            except (IndexError, native.Failure) as error:
                if isinstance(error, native.Failure):
                    wrong.append(error)

        threads = [threading.Thread(target=worker, args=(clients,)) for clients in self.clients]
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
        return self.timed(lambda clients, n: clients[n % len(clients)].put([(key(n), 0, TOKENS, self.content, 0, 0)]), numbers)

    def get(self, numbers, places):
        """places: which of the nodes each is asked for at."""
        def one(clients, n):
            client = clients[places[n]]
            client.free(client.get_raw([key(n)]))
        return self.timed(one, [n for n in numbers for _ in range(READS)])

    def drop(self, numbers):
        self.clients[0][0].drop([key(n) for n in numbers])

    def anywhere(self, numbers):
        return {n: (n * 7919) % len(self.nodes) for n in numbers}

    def routed(self, numbers):
        """The first owner of each."""
        if len(self.nodes) == 1:
            return {n: 0 for n in numbers}
        names = {node.name: place for place, node in enumerate(self.nodes)}
        spec_id = bytes(self.clients[0][0].spec_id)
        return {n: names[where.owners[0]] for n, where in
                zip(numbers, self.nodes[0].where(spec_id, [bytes(key(n)) for n in numbers]))}


def round_of(side, blocks):
    """{what: (payload bytes a CPU second, payload bytes a second)}."""
    numbers = [next(side.numbers) for _ in range(blocks)]
    figures = {}

    def count(name, reads, cpu_s, took):
        figures[name] = (reads * BLOCK / cpu_s, reads * BLOCK / took, cpu_s, took)

    count("put", blocks, *side.put(numbers))
    count("get, at any", READS * blocks, *side.get(numbers, side.anywhere(numbers)))
    count("get, routed by key", READS * blocks, *side.get(numbers, side.routed(numbers)))
    for name in ("at any", "routed by key"):
        together = [figures["put"], figures[f"get, {name}"]]
        figures[f"put once, get {READS} times, {name}"] = (
            (1 + READS) * blocks * BLOCK / sum(f[2] for f in together),
            (1 + READS) * blocks * BLOCK / sum(f[3] for f in together))
    side.drop(numbers)
    return figures


def throughput(rows, rounds, blocks):
    """One daemon alone, which has a network and a folder as the pool's have, against three."""
    pin = ["taskset", "-c", str(DAEMON_CPU)]
    with Pool(4, repair_delay="60s", arena="512M", staging="64M", level="warn") as pool:
        lone = pool.nodes["n4"]
        lone.options.update(etcd="")
        for node in pool.nodes.values():
            node.prefix += pin
            node.start()
        trio = [pool.nodes[name] for name in ("n1", "n2", "n3")]
        pool.settle(trio, moved=False)
        os.sched_setaffinity(0, {OWN_CPU})
        sides = {"alone": Side(pool, [lone]), "pool": Side(pool, trio)}
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
        alone, pooled = (statistics.median(f[what][0] for f in figures[name]) for name in ("alone", "pool"))
        bar = 0.8 if what.startswith("put once") else None
        rows.append(report.row(f"{what}: 3 daemons, of a CPU second", pooled / 1e9, "GB", alone / 1e9, bar))
    for name in sides:
        rows.append(report.row(f"put at any, {name}, 1 CPU", statistics.median(f["put"][1] for f in figures[name]) / 1e9, "GB/s"))


class Distance:
    """Records that n1 has, and such that it must get from n2 or n3."""

    def __init__(self, pool, blocks):
        self.pool, self.asked = pool, pool.nodes["n1"]
        self.client = native.Client(self.asked.target, transport="inline", **SPEC)
        content = payload()
        numbers = range(blocks)
        self.client.put([(key(n), 0, TOKENS, content, 0, 0) for n in numbers])
        where = dict(zip(numbers, self.asked.where(bytes(self.client.spec_id), [bytes(key(n)) for n in numbers])))
        self.here = [n for n in numbers if "n1" in where[n].owners]
        self.there = [n for n in numbers if "n1" not in where[n].owners]

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

    def round_trip(self):
        """As the daemon asked measures it."""
        found = [m.latency_us for m in self.asked.report().members if m.id != "n1" and m.latency_us]
        return statistics.mean(found) / 1e6


def latency(rows, count):
    with Pool(3, repair_delay="60s", hot_copies="0", arena="256M", level="warn") as pool:
        pool.start()
        distance = Distance(pool, 60)
        distance.compare(count // 10)
        here, there = distance.compare(count)
        trip = distance.round_trip()
        near, far = statistics.median(here), statistics.median(there)
        rows += [report.row("Get p50 at hand", 1e6 * near, "us"), report.row("a bare round trip to a peer", 1e6 * trip, "us"),
                 report.row("Get p50 from a peer", 1e6 * far, "us", 1e6 * (near + trip))]
        slow_network(rows, pool, distance, max(40, count // 20))
        slow_owner(rows, pool, distance, max(60, count // 10), far)


def slow_network(rows, pool, distance, count):
    """All of n1's packets are held back: a Get from a peer may cost one round trip more, and not two."""
    pool.network.impair(distance.asked.host, 0, DELAY_MS)
    eventually(lambda: distance.compare(4) and distance.round_trip() > DELAY_MS / 1000, "n1 has noticed its distance", 20)
    here, there = distance.compare(count)
    more = statistics.median(there) - statistics.median(here)
    rows.append(report.row(f"a Get from a peer {2 * DELAY_MS} ms away adds", 1e3 * more, "ms", 1e3 * distance.round_trip(), 1.1,
                           at_least=False))
    pool.network.repair(distance.asked.host)
    eventually(lambda: distance.compare(20) and distance.round_trip() < DELAY_MS / 1000, "n1 is near again", 20)


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
    options = parser.parse_args()
    quiet_signals()
    why = network.why_not()
    if why:
        print(f"bench-cluster: SKIPPED, nothing of the cluster was measured: {why}")
        return 0
    rows = []
    latency(rows, options.gets)
    throughput(rows, options.rounds, options.blocks)
    return 0 if report.finish("bench-cluster", rows) else 1


if __name__ == "__main__":
    sys.exit(main())
