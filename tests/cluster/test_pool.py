"""A pool at peace: what one daemon was given all others answer for; who owns what; who may be a member. What happens when things
break is run.py's."""
import collections
import unittest

import grpc
import network
from ledger import KINDS, Block
from pool import LEASE_S, Pool, eventually

from support import runner

Code = grpc.StatusCode
RED, LARGE, SUMMARY = KINDS[0], KINDS[2], KINDS[3]
SERVING, NOT_SERVING = 1, 2


def put(node, block, **fields):
    block.spec_id = node.client.open(**block.kind.spec).spec_id
    return node.client.put(block.spec_id, block.key, block.payload(), block.kind.tokens, position=block.position,
                           **fields).results[0]


def get(node, blocks):
    """Records of blocks of one kind, None for a miss."""
    spec_id = node.client.open(**blocks[0].kind.spec).spec_id
    return node.client.try_get(spec_id, [block.key for block in blocks])[0]


class PoolCase(unittest.TestCase):
    nodes, options = 3, {}

    @classmethod
    def setUpClass(cls):
        why = network.why_not()
        if why:
            raise unittest.SkipTest(why)
        cls.pool = Pool(cls.nodes, **cls.options)
        cls.addClassCleanup(cls.pool.close)
        cls.configure()
        cls.pool.start()
        cls.numbers = iter(range(1, 1 << 30))

    @classmethod
    def configure(cls):
        """What differs between the nodes, before they start."""

    def blocks(self, count, kind=RED):
        return [Block(kind, next(self.numbers), 1) for _ in range(count)]

    def node(self, name):
        return self.pool.nodes[name]


class Together(PoolCase):
    def test_what_one_was_given_all_have(self):
        for kind in KINDS:
            for block in self.blocks(4, kind):
                with self.subTest(kind.name):
                    self.assertEqual(put(self.node("n1"), block).replicas, 2)
                    records = {get(node, [block])[0] for node in self.pool.up()}
                    self.assertEqual(len(records), 1)
                    if kind is not SUMMARY:
                        self.assertTrue(records.pop().endswith(block.payload()))

    def test_every_block_is_with_its_owners_and_nobody_else(self):
        blocks = self.blocks(30)
        for turn, block in enumerate(blocks):
            put(self.node(f"n{1 + turn % 3}"), block)
        for place in self.node("n1").where(blocks[0].spec_id, [block.key for block in blocks]):
            self.assertEqual(len(place.owners), 2)
            self.assertLessEqual(set(place.owners), set(place.holders))
        views = {tuple(tuple(place.owners) for place in node.where(b"", [block.key for block in blocks]))
                 for node in self.pool.up()}
        self.assertEqual(len(views), 1, "daemons disagree about owners")

    def test_one_batch_from_everywhere(self):
        blocks = self.blocks(64)
        for turn, block in enumerate(blocks):
            put(self.node(f"n{1 + turn % 3}"), block)
        absent = self.blocks(8)
        for node in self.pool.up():
            mixed = blocks[:32] + absent + blocks[32:]
            records = get(node, mixed)
            for block, record in zip(mixed, records):
                self.assertEqual(record is None, block in absent)
                self.assertTrue(record is None or record.endswith(block.payload()))
            states = node.client.lookup(blocks[0].spec_id, [block.key for block in mixed])
            self.assertEqual(states.prefix, 32)
            self.assertEqual(list(states.states), [0 if block in absent else 1 for block in mixed])

    def test_put_again_elsewhere_is_a_duplicate(self):
        block = self.blocks(1)[0]
        place = self.node("n1").where(b"", [block.key])[0]
        first, second = (self.node(name) for name in place.owners)
        self.assertFalse(put(first, block).duplicate)
        again = put(second, block)
        self.assertTrue(again.duplicate)
        self.assertEqual(again.replicas, 2)

    def test_dropped_anywhere_is_gone_everywhere(self):
        blocks = self.blocks(12)
        for block in blocks:
            put(self.node("n1"), block)
        for node in self.pool.up():  # copies, too
            get(node, blocks)
            get(node, blocks)
        self.assertEqual(self.node("n2").client.drop(blocks[0].spec_id, [block.key for block in blocks]), 12)
        for node in self.pool.up():
            self.assertEqual(get(node, blocks), [None] * 12, node.name)

    def test_a_time_to_live_ends_everywhere(self):
        blocks = self.blocks(12)
        for block in blocks:
            put(self.node("n1"), block, ttl_ms=1500)
        for node in self.pool.up():
            get(node, blocks)
            get(node, blocks)
        eventually(lambda: all(get(node, blocks) == [None] * 12 for node in self.pool.up()), "they are gone", 4)

    def test_what_is_read_often_stays_near(self):
        blocks = self.blocks(20, LARGE)
        for block in blocks:
            put(self.node("n1"), block)
        where = self.node("n1").where(blocks[0].spec_id, [block.key for block in blocks])
        far = {name: [block for block, place in zip(blocks, where) if name not in place.holders] for name in ("n2", "n3")}
        name = max(far, key=lambda name: len(far[name]))
        self.assertTrue(far[name])
        node, before = self.node(name), self.node(name).metrics()
        for _ in range(4):
            get(node, far[name])
        after = node.metrics()
        fetched = after["cluster_remote_hits_total"] - before["cluster_remote_hits_total"]
        self.assertEqual(fetched, 2 * len(far[name]), "each was fetched twice, and then it stayed")

    def test_folds_attention_and_pins_over_others_blocks(self):
        blocks = self.blocks(4)
        for turn, block in enumerate(blocks):
            put(self.node(f"n{1 + turn % 3}"), block)
        keys = [block.key for block in blocks]
        folds = {node.client.fold(blocks[0].spec_id, keys, 16384) for node in self.pool.up()
                 if node.client.open(**RED.spec)}
        self.assertEqual(len(folds), 1, "a fold depends on where it is made")
        for node in self.pool.up():
            lease = node.client.pin(blocks[0].spec_id, keys, 5000).lease
            self.assertEqual(node.metrics()["leases"], 1)
            node.client.unpin(lease)

    def test_who_knows_whom(self):
        report = self.node("n2").report()
        self.assertEqual((report.self, report.state, report.replicas), ("n2", "member", 2))
        self.assertEqual([member.id for member in report.members], ["n1", "n2", "n3"])
        self.assertEqual(report.members[0].addresses, [f"{self.node('n1').host.address}:7420"])
        self.assertEqual(self.node("n2").client.health("balancekv.cluster"), SERVING)


class Members(PoolCase):
    """Who is one, and with what share."""

    nodes = 5

    @classmethod
    def configure(cls):
        for name, options in {"n1": {"domain": "east", "weight": 100}, "n2": {"domain": "east", "weight": 100},
                              "n3": {"domain": "west", "weight": 100}, "n4": {"domain": "west", "weight": 100},
                              "n5": {"owns": "no", "domain": "north"}}.items():
            cls.pool.nodes[name].options.update(options)

    def test_replicas_lie_in_different_domains_and_shares_follow_weights(self):
        keys = [block.key for block in self.blocks(2000)]
        places = self.node("n3").where(b"", keys)
        load = collections.Counter()
        for place in places:
            load.update(place.owners)
            self.assertEqual(len({self.node(name).options["domain"] for name in place.owners}), 2)
        self.assertEqual(set(load), {"n1", "n2", "n3", "n4"})
        for name, count in load.items():
            self.assertLess(abs(count - 1000), 120, name)

    def test_one_that_owns_nothing_serves_its_host(self):
        node, blocks = self.node("n5"), self.blocks(10)
        for block in blocks:
            self.assertEqual(put(node, block).replicas, 2)
        for block, record in zip(blocks, get(node, blocks)):
            self.assertTrue(record.endswith(block.payload()))

    def test_etcd_loses_everything(self):
        keys = [block.key for block in self.blocks(200)]
        before = [list(place.owners) for place in self.node("n1").where(b"", keys)]
        self.pool.etcd.kill()
        self.pool.etcd.wipe()
        self.pool.etcd.start()
        self.pool.settle(moved=False)
        self.assertEqual([list(place.owners) for place in self.node("n1").where(b"", keys)], before)

    def test_a_second_daemon_of_a_name_waits(self):
        twin = self.pool.add("twin", node="n2")
        self.addCleanup(self.pool.nodes.pop, "twin")
        self.addCleanup(twin.close)
        twin.start()
        eventually(lambda: twin.report().state == "blocked", "it says so", 5)
        self.assertIn("n2", twin.report().trouble)
        self.assertEqual(twin.client.health("balancekv.cluster"), NOT_SERVING)
        self.node("n2").stop()
        eventually(lambda: twin.report().state == "member", "it takes the place", LEASE_S + 3)
        twin.stop()
        self.node("n2").start()
        self.pool.settle([self.node(f"n{n}") for n in range(1, 6)], moved=False)

    def test_one_that_starts_before_etcd_joins_later(self):
        self.pool.etcd.kill()
        late = self.pool.add("late")
        self.addCleanup(self.pool.nodes.pop, "late")
        self.addCleanup(late.close)
        late.start()
        block = self.blocks(1)[0]
        self.assertEqual(put(late, block).replicas, 0)
        self.assertEqual(late.report().state, "joining")
        self.assertEqual(late.client.health(""), SERVING)
        self.assertEqual(late.client.health("balancekv.cluster"), NOT_SERVING)
        self.pool.etcd.start()
        self.pool.settle()
        eventually(lambda: get(self.node("n1"), [block])[0], "what it was given meanwhile is everybody's", 10)
        late.stop()


if __name__ == "__main__":
    runner.run()
