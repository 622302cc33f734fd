"""Blocks in a pool of real daemons with a real etcd: a Put reaches its owners; crash, join, drain and restart move what they
must, and nothing else."""
import os
import unittest

import harness
from harness import Daemon, eventually, key, payload, pb, run, wire
from support import SLOWER
from support.etcd import Etcd, free_port

LEASE_S = 2
LONG_LEASE_S = 60  # of one that is to be back before it ends
PEER_TIMEOUT_S = 2
MOVED_S = 30.0 * SLOWER  # the longest that a repair of these few blocks may take on a busy machine
BLOCKS = 120


class Node:
    """A member, a client of its TCP port, which alone answers the Peer service, and one of its socket, which alone takes orders."""

    def __init__(self, name, etcd, delay, **options):
        self.name, port = name, free_port()
        self.daemon = Daemon(node=name, etcd=etcd.endpoint, tcp=f"127.0.0.1:{port}", repair_delay=delay,
                             peer_timeout=f"{PEER_TIMEOUT_S}s", **{"arena": "64M", "lease": f"{LEASE_S}s", **options})
        self.client, self.local = wire.Client(f"127.0.0.1:{port}"), wire.Client(self.daemon.target)

    def start(self):
        self.daemon.start()
        return self

    def have(self, names):
        """Which of the names (spec id and key) it holds itself."""
        request = wire.peer_pb.HaveRequest(names=b"".join(names))
        reply = self.client.unary(wire.PEER + "Have", request, wire.peer_pb.HaveResponse)
        return {name for name, size in zip(names, reply.bytes) if size > 0}

    def cluster(self):
        return self.client.unary("Cluster", pb.ClusterRequest(), pb.ClusterResponse)

    def members(self):
        reply = self.cluster()
        return sorted(member.id for member in reply.members) if reply.state == "member" else []

    def epoch_of(self, name):
        return {member.id: member.epoch for member in self.cluster().members}.get(name)

    def owners(self, spec_id, keys):
        reply = self.client.unary("Where", pb.WhereRequest(spec_id=spec_id, keys=keys), pb.WhereResponse)
        return [list(place.owners) for place in reply.keys]

    def stat(self, name):
        return self.client.stats()["cluster_" + name]

    def drain(self, member, ask=False):
        return self.local.unary("Drain", pb.DrainRequest(member=member, ask=ask), pb.DrainResponse)

    def close(self):
        self.client.close()
        self.local.close()
        self.daemon.close()


class Pool(unittest.TestCase):
    """Each test has an etcd and three nodes of its own."""

    delay = "1s"

    def setUp(self):
        self.etcd = Etcd()
        self.addCleanup(self.etcd.close)
        self.etcd.start()
        self.nodes = {}
        for name in ("a", "b", "c"):
            self.add(name)
        self.wait_for_members()
        self.spec_id = [node.client.open(**harness.SPEC).spec_id for node in self.nodes.values()][0]
        self.keys, self.names = [], []

    def add(self, name, **options):
        node = self.nodes[name] = Node(name, self.etcd, self.delay, **options)
        self.addCleanup(node.close)
        return node.start()

    def wait_for_members(self, timeout_s=20 * SLOWER):
        names = sorted(self.nodes)
        eventually(lambda: all(node.members() == names for node in self.nodes.values()), f"all see {names}", timeout_s)

    def kill_and_restart(self, node):
        """Long before its lease ends: all know of its new epoch, and nobody has missed it."""
        others = [other for other in self.nodes.values() if other is not node]
        epoch = others[0].epoch_of(node.name)
        node.daemon.kill()
        node.start()
        eventually(lambda: all(other.epoch_of(node.name) != epoch for other in others), "all see it again", LONG_LEASE_S / 2)
        self.wait_for_members()
        for other in others:
            self.assertNotIn(f"{node.name} is gone", other.daemon.log_text())

    def settle(self):
        """Until nothing is to be moved any more."""
        eventually(lambda: all(node.cluster().repair == "idle" for node in self.nodes.values()), "repair is done", MOVED_S)

    def put(self, node, first, count, replicas=2):
        for n in range(first, first + count):
            result = node.client.put(self.spec_id, key(n), payload(n % 7), harness.TOKENS).results[0]
            self.assertEqual(result.replicas, replicas, n)
            self.keys.append(key(n))
            self.names.append(self.spec_id + key(n))

    def owners(self):
        return next(iter(self.nodes.values())).owners(self.spec_id, self.keys)

    def missing(self):
        """Blocks that an owner lacks, as (node, name)."""
        have = {name: node.have(self.names) for name, node in self.nodes.items()}
        return [(owner, name) for name, owners in zip(self.names, self.owners()) for owner in owners if name not in have[owner]]

    def sent(self):
        return sum(node.stat("repair_sent_total") for node in self.nodes.values())


class Moves(Pool):
    def test_a_put_reaches_all_owners_before_it_is_answered(self):
        self.put(self.nodes["a"], 0, BLOCKS // 2)
        self.put(self.nodes["b"], BLOCKS // 2, BLOCKS // 2)
        self.assertEqual(self.missing(), [])
        self.assertEqual(self.nodes["a"].stat("placed_total"), BLOCKS // 2)
        again = self.nodes["c"].client.put(self.spec_id, key(0), payload(0), harness.TOKENS).results[0]
        self.assertEqual(again.replicas, 2)
        self.settle()
        self.assertEqual(self.sent(), 0, "what was put in a settled pool moved again")

    def test_a_crash_costs_its_blocks_replicas_and_repair_brings_them_back(self):
        self.put(self.nodes["a"], 0, BLOCKS)
        lost = sum("b" in owners for owners in self.owners())
        before = self.sent() - self.nodes["b"].stat("repair_sent_total")
        self.nodes["b"].daemon.kill()
        self.nodes.pop("b")
        short = [self.nodes["a"].client.put(self.spec_id, key(n), payload(n % 7), harness.TOKENS).results[0].replicas
                 for n in range(BLOCKS, BLOCKS + 20)]
        self.assertIn(1, short, "nobody noticed that b is gone")
        self.keys += [key(n) for n in range(BLOCKS, BLOCKS + 20)]
        self.names += [self.spec_id + key(n) for n in range(BLOCKS, BLOCKS + 20)]
        self.wait_for_members()
        eventually(lambda: self.missing() == [], "every owner has its blocks", MOVED_S)
        self.settle()
        sent = self.sent() - before
        self.assertLessEqual(sent, lost + 40, f"{lost} replicas were lost, and {sent} records sent")

    def test_one_killed_that_is_back_at_once_without_its_memory_gets_it_again(self):
        node = self.add("d", lease=f"{LONG_LEASE_S}s")
        self.wait_for_members()
        self.put(self.nodes["a"], 0, BLOCKS)
        self.settle()
        self.assertGreater(len(node.have(self.names)), BLOCKS // 5)
        self.kill_and_restart(node)
        eventually(lambda: self.missing() == [], "every owner has its blocks", MOVED_S)

    def test_a_newcomer_gets_its_share_and_no_more(self):
        self.put(self.nodes["a"], 0, BLOCKS)
        self.settle()
        before = self.sent()
        self.add("d")
        self.wait_for_members()
        eventually(lambda: self.missing() == [], "the newcomer has its blocks", MOVED_S)
        self.settle()
        share = sum("d" in owners for owners in self.owners())
        sent = self.sent() - before
        print(f"   newcomer: its share is {share} of {2 * BLOCKS} replicas, {sent:.0f} records were sent")
        self.assertLessEqual(sent, 1.3 * share)
        self.assertGreater(share, BLOCKS // 5)

    def test_a_member_that_drains_hands_all_over(self):
        self.put(self.nodes["a"], 0, BLOCKS)
        self.settle()
        self.assertTrue(self.nodes["a"].drain("c").draining)
        eventually(lambda: self.nodes["a"].drain("c", ask=True).done, "c has handed over", MOVED_S)
        self.assertEqual(self.nodes["a"].drain("c", ask=True).left_keys, 0)
        eventually(lambda: all("c" not in owners for owners in self.owners()), "a knows as well that c drains")
        self.assertEqual(self.missing(), [])
        self.nodes["c"].daemon.stop()
        self.nodes.pop("c")
        self.wait_for_members()
        self.assertEqual(self.missing(), [])
        got = self.nodes["a"].client.get(self.spec_id, self.keys)
        self.assertTrue(all(got), "a block went with the member that drained")


class Restart(Pool):
    delay = f"{6 * SLOWER}s"

    def restart_moves_nothing(self, restart, **options):
        """A member whose arena outlives it; restart(node) ends it and starts it again."""
        node = self.add("d", arena_path=os.path.join(self.nodes["a"].daemon.folder, "arena-d"), **options)
        self.wait_for_members()
        self.put(self.nodes["a"], 0, BLOCKS)
        held = node.have(self.names)
        self.assertGreater(len(held), BLOCKS // 5)
        self.settle()
        before = self.sent() - node.stat("repair_sent_total")
        restart(node)
        self.assertEqual(node.have(self.names), held)
        self.settle()
        self.assertEqual(self.sent() - before, 0)
        self.assertEqual(self.missing(), [])

    def test_a_restart_within_the_delay_moves_nothing(self):
        def stop_and_start(node):
            node.daemon.stop()
            node.start()
            self.wait_for_members()
        self.restart_moves_nothing(stop_and_start)

    def test_one_killed_that_is_back_at_once_with_its_memory_moves_nothing(self):
        self.restart_moves_nothing(self.kill_and_restart, lease=f"{LONG_LEASE_S}s")


if __name__ == "__main__":
    run()
