"""Reading from a pool of real daemons with a real etcd: what was put at one is found, got, folded, attended over, pinned and
dropped at any other, and looks the same from each; with one standing still, one dead, and one that has hardly any room."""
import time
import unittest

import grpc
import harness
from harness import Code, HEADS, KEY_DIM, LAYERS, TOKENS, VALUE_DIM, eventually, key, np, payload, pb, record, run
from support.window import Window
from test_cluster_moves import PEER_TIMEOUT_S, Pool

RAW_BYTES = LAYERS * HEADS * TOKENS * (KEY_DIM + VALUE_DIM) * 2


class Reads(Pool):
    delay = "2s"

    def put_blocks(self, count, first=0, **fields):
        """Blocks of one sequence, put at `a`; their keys."""
        for n in range(count):
            self.nodes["a"].client.put(self.spec_id, key(first + n), payload(first + n), TOKENS, position=n * TOKENS, **fields)
        keys = [key(first + n) for n in range(count)]
        self.keys += keys
        self.names += [self.spec_id + one for one in keys]
        return keys

    def strangers(self, keys):
        """{node: those of the keys that it neither owns nor has put}."""
        owners = self.nodes["a"].owners(self.spec_id, keys)
        return {name: [one for one, own in zip(keys, owners) if name not in own] for name in self.nodes if name != "a"}

    def assert_unpinned(self):
        for node in self.nodes.values():
            eventually(lambda: node.client.stats()["pinned"] == 0, "nothing is pinned")

    # ---- Lookup, Get ----

    def test_lookup_says_the_same_everywhere(self):
        keys = self.put_blocks(40)
        asked = keys[:30] + [key(9999)] + keys[30:]
        for node in self.nodes.values():
            reply = node.client.lookup(self.spec_id, asked)
            self.assertEqual(reply.prefix, 30)
            self.assertEqual([i for i, state in enumerate(reply.states) if state == pb.KEY_ABSENT], [30])
            self.assertEqual(len(node.client.lookup(self.spec_id, []).states), 0)

    def test_get_gives_the_same_bytes_everywhere_over_several_windows(self):
        keys = self.put_blocks(150)
        asked = keys[::-1] + [key(9999), keys[3], keys[3]]
        want = {one: data for one, data in zip(keys, self.nodes["a"].client.get(self.spec_id, keys))}
        for node in self.nodes.values():
            got, codes, _, error = node.client.try_get(self.spec_id, asked)
            self.assertEqual(got, [want.get(one) for one in asked])
            self.assertEqual([i for i, code in enumerate(codes) if code], [150])
            self.assertEqual((error.code(), codes[150]), (Code.NOT_FOUND, Code.NOT_FOUND.value[0]))
            self.assertIn("keys[150]", error.details())
        self.assert_unpinned()

    def test_one_question_to_an_owner_brings_a_whole_window(self):
        keys = self.put_blocks(60)
        for name, theirs in self.strangers(keys).items():
            self.assertGreater(len(theirs), 5)
            node = self.nodes[name]
            before = node.stat("peer_calls_total"), node.stat("peer_fetched_total")
            node.client.get(self.spec_id, theirs)
            self.assertEqual(node.stat("peer_fetched_total") - before[1], len(theirs))
            self.assertLessEqual(node.stat("peer_calls_total") - before[0], 4, "two owners, and perhaps a hedge to each")

    def test_a_member_may_have_smaller_limits_than_the_others(self):
        self.add("d", max_batch=8)
        self.wait_for_members()
        self.settle()
        keys = self.put_blocks(60)
        theirs = [one for one in keys if self.nodes["d"].have([self.spec_id + one])]
        self.assertGreater(len(theirs), 16, "d owns more than it takes in one call")
        want = self.nodes["a"].client.get(self.spec_id, keys)
        for name in ("b", "c"):  # one of them has to ask d, the other owner being the third
            self.assertEqual(self.nodes[name].client.get(self.spec_id, keys), want)
            self.assertEqual(self.nodes[name].client.lookup(self.spec_id, keys).prefix, len(keys))
        with self.assertRaises(grpc.RpcError) as caught:
            self.nodes["d"].client.get(self.spec_id, keys[:9])
        self.assertEqual(caught.exception.code(), Code.RESOURCE_EXHAUSTED)
        self.assertEqual(self.nodes["a"].client.drop(self.spec_id, keys), 60)
        self.assertEqual(self.nodes["d"].have(self.names), set())

    def test_nobody_is_asked_for_what_is_here(self):
        keys = self.put_blocks(30)
        for name, theirs in self.strangers(keys).items():
            node, own = self.nodes[name], [one for one in keys if one not in theirs]
            before = node.stat("peer_calls_total")
            node.client.get(self.spec_id, own)
            self.assertEqual(node.client.lookup(self.spec_id, own).prefix, len(own))
            self.assertEqual(node.stat("peer_calls_total"), before)

    def test_a_copy_leaves_after_its_use_unless_it_is_read_often(self):
        keys = self.put_blocks(30)
        name, theirs = max(self.strangers(keys).items(), key=lambda item: len(item[1]))
        node, names = self.nodes[name], {self.spec_id + one for one in theirs}
        for reads in (1, 2):
            node.client.get(self.spec_id, theirs)
            want = names if reads == 2 else set()
            eventually(lambda: node.have(self.names) & names == want, f"copies after {reads} reads")
        self.assertGreaterEqual(node.client.stats()["copies"], len(theirs))
        self.assertEqual(node.stat("hot_copies_total"), len(theirs))
        self.assertEqual(self.missing(), [], "an owner has lost its record")

    def test_parts_of_records(self):
        keys = self.put_blocks(12)
        some = {"first_layer": 1, "layers": 1, "heads": 1}
        want = self.nodes["a"].client.get(self.spec_id, keys, **some)
        for node in self.nodes.values():
            self.assertEqual(node.client.get(self.spec_id, keys, **some), want)
        self.assert_unpinned()

    def test_by_shared_memory(self):
        keys = self.put_blocks(100)
        want = self.nodes["a"].client.get(self.spec_id, keys)
        for node in self.nodes.values():
            window = Window(node.local, node.daemon.socket, 8 << 20)
            self.addCleanup(window.close)
            placed = window.get(self.spec_id, keys)
            self.assertEqual([data for data, _ in placed], want)
            self.assertTrue(all(at is not None for _, at in placed))
        self.assert_unpinned()

    # ---- Fold, Attend, Pin, Drop ----

    def test_fold_and_attend_give_the_same_everywhere(self):
        keys = self.put_blocks(16, codec=pb.CODEC_DENSE4)
        q = np.random.default_rng(1).normal(size=(LAYERS, HEADS, 2, KEY_DIM)).astype(np.float32)
        folds = [node.client.fold(self.spec_id, keys, 60000) for node in self.nodes.values()]
        bands = [node.client.bands(self.spec_id, keys, [(4 * TOKENS, 4), (0, 16)]) for node in self.nodes.values()]
        outputs = [node.client.attend(self.spec_id, keys, q).output for node in self.nodes.values()]
        self.assertTrue(folds[0] == folds[1] == folds[2] and bands[0] == bands[1] == bands[2])
        self.assertEqual(record.Record(folds[0]).tokens, 16 * TOKENS)
        self.assertTrue(outputs[0] == outputs[1] == outputs[2])
        self.assert_unpinned()
        # What is not there is missed by name.
        for call in (lambda c: c.fold(self.spec_id, keys[:2] + [key(9999)], 60000),
                     lambda c: c.attend(self.spec_id, keys[:2] + [key(9999)], q)):
            with self.assertRaises(grpc.RpcError) as caught:
                call(self.nodes["b"].client)
            self.assertEqual(caught.exception.code(), Code.NOT_FOUND)
            self.assertIn("keys[2]", caught.exception.details())
        self.assert_unpinned()

    def test_pin_brings_and_keeps(self):
        keys = self.put_blocks(20)
        for node in self.nodes.values():
            lease = node.client.pin(self.spec_id, keys, 60000).lease
            self.assertEqual(len(node.have(self.names)), 20)
            node.client.get(self.spec_id, keys)
            self.assertEqual(len(node.have(self.names)), 20)
            node.client.unpin(lease)
            with self.assertRaises(grpc.RpcError) as caught:
                node.client.pin(self.spec_id, keys + [key(9999)], 60000)
            self.assertEqual(caught.exception.code(), Code.NOT_FOUND)
            self.assertIn("keys[20]", caught.exception.details())
        self.assert_unpinned()

    def test_drop_forgets_everywhere(self):
        keys = self.put_blocks(20)
        for _ in range(2):  # copies at b
            self.nodes["b"].client.get(self.spec_id, keys)
        self.assertEqual(self.nodes["c"].client.drop(self.spec_id, keys[:15] + [key(9999)]), 15)
        for node in self.nodes.values():
            self.assertEqual(node.have(self.names), {self.spec_id + one for one in keys[15:]} & node.have(self.names))
            self.assertEqual([state for state in node.client.lookup(self.spec_id, keys).states].count(pb.KEY_RESIDENT), 5)
        self.assertEqual(self.nodes["a"].client.drop(self.spec_id, keys[:15]), 0)

    # ---- trouble ----

    def test_one_that_stands_still_is_gone_round(self):
        keys = self.put_blocks(60)
        want = self.nodes["a"].client.get(self.spec_id, keys)
        self.settle()  # before, a Lookup waits for all who may have it
        self.nodes["b"].daemon.freeze()
        try:
            took = []
            for name in ("a", "c") * 4:
                began = time.monotonic()
                self.assertEqual(self.nodes[name].client.get(self.spec_id, keys), want)
                self.assertEqual(self.nodes[name].client.lookup(self.spec_id, [key(9000 + n) for n in range(50)]).prefix, 0)
                took.append(time.monotonic() - began)
            took.sort()
            print(f"   with one of three stopped: a Get and a Lookup took {took[len(took) // 2] * 1000:.0f} ms, "
                  f"{took[-1] * 1000:.0f} ms at most")
            # Each of the two may wait for its timeout once, should the lease end meanwhile: then blocks are to be moved, and a
            # Lookup waits for all who may have them, until b is known to be silent.
            self.assertLess(took[len(took) // 2], 0.8 * PEER_TIMEOUT_S)
            self.assertLess(took[-1], PEER_TIMEOUT_S + 1.0)
        finally:
            self.nodes["b"].daemon.thaw()

    def test_with_all_others_standing_still_a_call_ends_in_time(self):
        keys = self.put_blocks(60)
        theirs = self.strangers(keys)["c"]
        for name in ("a", "b"):
            self.nodes[name].daemon.freeze()
        try:
            began = time.monotonic()
            _, _, _, error = self.nodes["c"].client.try_get(self.spec_id, theirs, timeout=0.5)
            self.assertEqual(error.code(), Code.DEADLINE_EXCEEDED)
            self.assertLess(time.monotonic() - began, 0.9 * PEER_TIMEOUT_S)
            _, codes, _, error = self.nodes["c"].client.try_get(self.spec_id, keys, timeout=30)
            self.assertEqual(error.code(), Code.UNAVAILABLE)
            self.assertEqual({one for one, code in zip(keys, codes) if code}, set(theirs), "what is here comes all the same")
            self.assertLess(time.monotonic() - began, 15.0)
        finally:
            for name in ("a", "b"):
                self.nodes[name].daemon.thaw()
        self.assert_unpinned()

    def test_one_that_dies_costs_nothing(self):
        keys = self.put_blocks(60)
        want = self.nodes["a"].client.get(self.spec_id, keys)
        self.nodes["b"].daemon.kill()
        self.nodes.pop("b")
        end = time.monotonic() + 10  # past its lease and the repair
        while time.monotonic() < end:
            for node in self.nodes.values():
                self.assertEqual(node.client.get(self.spec_id, keys), want)
                self.assertEqual(node.client.lookup(self.spec_id, keys).prefix, len(keys))

    def test_a_node_with_hardly_any_room_serves_what_it_cannot_hold(self):
        keys = self.put_blocks(150, codec=pb.CODEC_RAW)
        node = self.add("d", owns="no", arena="8M", slab="2M")
        self.wait_for_members()
        node.client.open(**harness.SPEC)
        self.assertGreater(150 * RAW_BYTES, 2 * (8 << 20))
        want = self.nodes["a"].client.get(self.spec_id, keys)
        self.assertEqual(node.client.get(self.spec_id, keys), want)
        self.assertEqual(node.client.lookup(self.spec_id, keys).prefix, 150)
        q = np.zeros((LAYERS, HEADS, 1, KEY_DIM), np.float32)
        with self.assertRaises(grpc.RpcError) as caught:  # all at once is too much
            node.client.attend(self.spec_id, keys, q)
        self.assertEqual(caught.exception.code(), Code.RESOURCE_EXHAUSTED)
        node.client.attend(self.spec_id, keys[:20], q)
        self.assert_unpinned()


if __name__ == "__main__":
    run()
