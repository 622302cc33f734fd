"""Memory that is full, over its quota or damaged: the documented status, one log line, and everything else goes on."""
import mmap
import os
import struct
import time

from harness import (Case, Client, Code, Daemon, HEADS, KEY_DIM, LAYERS, SPEC, TOKENS, eventually, grpc, key, np, payload, pb,
                     record, run)


class Full(Case):
    options = dict(arena="32M", slab="8M", staging="32M")

    def test_full_arena_and_nothing_to_evict(self):
        spec_id = self.open(model="full", layers=8, kv_heads=8, codec=pb.CODEC_RAW)
        shape = dict(layers=8, heads=8)
        data, leases, lines = payload(0, **shape), [], len(self.failures())
        with self.assertRaises(grpc.RpcError) as caught:
            for number in range(100):
                self.client.put(spec_id, key(number), data, TOKENS)
                leases.append(self.client.pin(spec_id, [key(number)], 60000).lease)
        self.assert_status(caught.exception, Code.RESOURCE_EXHAUSTED, "arena")
        self.assertGreater(len(leases), 8)
        eventually(lambda: len(self.failures()) > lines, "a log line")
        self.assertEqual([line.get("status") for line in self.failures()[lines:]], ["RESOURCE_EXHAUSTED"])
        eventually(lambda: self.client.stats()["staging_bytes"] == 0, "nothing is half-stored")
        self.assertEqual(self.client.stats()["entries"], len(leases))
        self.assertEqual(self.client.lookup(spec_id, [key(n) for n in range(len(leases))]).prefix, len(leases))
        self.client.unpin(leases[3])
        self.client.put(spec_id, key(1000), data, TOKENS)
        states = self.client.lookup(spec_id, [key(n) for n in range(len(leases))]).states
        self.assertEqual([n for n, state in enumerate(states) if not state], [3], "only what was free to go went")

    def test_tenant_over_its_quota_evicts_its_own(self):
        with Daemon(arena="64M", slab="8M", tenant_quota="4M") as daemon, Client(daemon.target) as client:
            spec = {**SPEC, "layers": 8, "kv_heads": 8, "codec": pb.CODEC_RAW}
            quiet, loud = (client.open(**spec, tenant=name).spec_id for name in ("quiet", "loud"))
            client.put(quiet, key(0), payload(0, layers=8, heads=8), TOKENS)
            for number in range(1, 30):
                client.put(loud, key(number), payload(0, layers=8, heads=8), TOKENS)
            self.assertEqual(client.lookup(quiet, [key(0)]).prefix, 1)
            stats = client.stats()
            self.assertGreater(stats["evicted_quota_total"], 0)
            self.assertLessEqual(stats["slot_bytes"], 8 << 20)


class Corrupt(Case):
    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon(arena="32M", slab="8M")
        cls.addClassCleanup(cls.daemon.close)
        cls.daemon.options["arena_path"] = os.path.join(cls.daemon.folder, "arena")
        cls.daemon.start()

    def flip(self, spec_id, name, offset):
        """Changes one bit of the record of key(name), offset bytes from its start, in the arena's file."""
        with open(self.daemon.options["arena_path"], "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            at = -1
            while True:
                at = memory.find(key(name), at + 1)
                self.assertNotEqual(at, -1, "the record is in the arena")
                start = at - 24
                if memory[start:start + 4] == struct.pack("<I", record.MAGIC) and memory[at + 32:at + 48] == spec_id:
                    break
            memory[start + offset] ^= 0x10

    def test_corrupt_record(self):
        spec_id = self.open(model="corrupt", codec=pb.CODEC_DENSE8)
        names = {1: 700, 2: -1, 3: 90, 4: 130, 5: 17}  # in a plane, at the end, in the header, the directory, the checksum
        for name, offset in list(names.items()) + [(9, None)]:
            self.client.put(spec_id, key(name), payload(name), TOKENS)
        length = len(self.client.get(spec_id, [key(9)])[0])
        for name, offset in names.items():
            with self.subTest(f"byte {offset}"):
                lines, before = len(self.failures()), self.client.stats()
                self.flip(spec_id, name, offset % length)
                records, codes, messages, error = self.client.try_get(spec_id, [key(9), key(name)])
                self.assertEqual(codes, [0, Code.DATA_LOSS.value[0]])
                self.assertIsNone(records[1])
                self.assertTrue(messages[1])
                self.assertEqual(record.Record(records[0]).key, key(9), "the other record is delivered")
                self.assert_status(error, Code.DATA_LOSS, "keys")
                eventually(lambda: len(self.failures()) > lines, "a log line")
                time.sleep(0.05)
                self.assertEqual([line.get("status") for line in self.failures()[lines:]], ["DATA_LOSS"])
                self.assertEqual(self.failures()[-1]["level"], "error")
                self.assert_error(Code.NOT_FOUND, "keys", self.client.get, spec_id, [key(name)])
                after = self.client.stats()
                self.assertEqual(after["corrupt_total"], before["corrupt_total"] + 1)
                self.assertEqual(after["entries"], before["entries"] - 1)
                self.assertEqual(after["pinned"], 0)
                self.client.put(spec_id, key(name), payload(name), TOKENS)
                record.Record(self.client.get(spec_id, [key(name)])[0])

    def test_corrupt_name_is_a_miss(self):
        """Where the damage hits the spec id or the key in the header, nobody's record is left: a miss, never wrong bytes."""
        spec_id = self.open(model="corrupt-name", codec=pb.CODEC_RAW)
        for name, offset in ((31, 60), (32, 30)):
            self.client.put(spec_id, key(name), payload(name), TOKENS)
            self.flip(spec_id, name, offset)
            error = self.client.try_get(spec_id, [key(name)])[3]
            self.assertIn(error.code(), (Code.NOT_FOUND, Code.DATA_LOSS))
            self.assert_error(Code.NOT_FOUND, "keys", self.client.get, spec_id, [key(name)])

    def test_corrupt_record_is_neither_folded_nor_attended(self):
        spec_id = self.open(model="corrupt-2", codec=pb.CODEC_DENSE8)
        q = np.zeros((LAYERS, HEADS, 1, KEY_DIM), np.float32)
        for name, call in ((21, lambda keys: self.client.fold(spec_id, keys, 30000)),
                           (22, lambda keys: self.client.attend(spec_id, keys, q))):
            self.client.put(spec_id, key(name), payload(name), TOKENS)
            self.flip(spec_id, name, 900)
            self.assert_error(Code.DATA_LOSS, "keys", call, [key(name)])
            self.assert_error(Code.NOT_FOUND, "keys", call, [key(name)])


if __name__ == "__main__":
    run()
