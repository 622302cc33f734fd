"""Folds by age: what they promise to a stock gRPC client, what they cost, and the command line that asks for them."""
import json
import os
import subprocess

from harness import (Case, Code, CommandLineCase, HEADS, KEY_DIM, LAYERS, TOKENS, VALUE_DIM, key, np, payload, pb, record, run)
from support import built, safetensors

SANITIZED = bool(os.environ.get("SANITIZER"))
PROFILE = [(2 * TOKENS, 4), (6 * TOKENS, 8), (0, 24)]
TOKEN_BYTES = LAYERS * HEADS * (KEY_DIM + VALUE_DIM) * 2  # as bf16


class Folds(Case):
    options = {"backend": "ref"}  # to be compared with NumPy: other backends round the scores of Attend

    def put(self, spec_id, first, count):
        """Blocks named first.. from position 0 on; their keys."""
        for number in range(count):
            self.client.put(spec_id, key(first + number), payload(first + number), TOKENS, position=number * TOKENS,
                            codec=pb.CODEC_DENSE4)
        return [key(first + number) for number in range(count)]

    def check(self, records, blocks, budget):
        """Decoded records of a fold by age, after all that holds for any."""
        got = [record.Record(data) for data in records]
        self.assertLessEqual(sum(len(data) for data in records), budget)
        at = 0
        for one in got:
            self.assertEqual(one.position, at)
            self.assertTrue(one.flags & record.FOLD)
            at += one.tokens
        self.assertEqual(at, blocks * TOKENS)
        density = [len(one.data) / one.tokens for one in got]
        self.assertLess(density[0], min(density[-2:]), "newer tokens have more bytes")
        return got

    def test_one_record_for_each_band_within_the_budget(self):
        spec_id = self.open(model="bands")
        keys = self.put(spec_id, 1000, 16)
        for fields in ({"rate": 8}, {"rate": 16}, {"budget_bytes": 16 * TOKENS * TOKEN_BYTES // 12}, {}):
            budget = fields.get("budget_bytes") or 16 * TOKENS * TOKEN_BYTES // fields.get("rate", 4)
            records = self.client.bands(spec_id, keys, PROFILE, **fields)
            got = self.check(records, 16, budget)
            self.assertEqual(len(got), 3)
            for one, age in zip(got, (6, 2, 0)):  # a band ends at its age, or up to a quarter and a block further back
                end = 16 - (one.position + one.tokens) // TOKENS
                self.assertTrue(age <= end <= age * 1.25 + 1, f"{end} blocks for {age}")
            hits = self.client.stats()["fold_hits_total"]
            self.assertEqual(self.client.bands(spec_id, keys, PROFILE, **fields), records)
            self.assertEqual(self.client.stats()["fold_hits_total"], hits + 3)
            self.assertEqual(self.client.get(spec_id, [one.key for one in got]), records, "bands are stored like blocks")

    def test_attend_over_bands_is_attention_over_their_union(self):
        spec_id = self.open(model="bands-attend")
        keys = self.put(spec_id, 1100, 12)
        got = [record.Record(data) for data in self.client.bands(spec_id, keys, PROFILE, rate=8)]
        q = np.random.default_rng(1).normal(size=(LAYERS, HEADS, 3, KEY_DIM)).astype(np.float32)
        reply = self.client.attend(spec_id, [one.key for one in got], q)
        out = np.frombuffer(reply.output, "<f4").reshape(LAYERS, HEADS, 3, VALUE_DIM)
        for layer in range(LAYERS):
            for head in range(HEADS):
                want, _ = record.attend([one.section(layer, head) for one in got], q[layer, head])
                self.assertTrue(np.allclose(out[layer, head], want, rtol=2e-4, atol=2e-5))

    def test_only_says_what_there_is_without_data(self):
        spec_id = self.open(model="bands-no-data")
        keys = self.put(spec_id, 1200, 12)
        request = pb.FoldRequest(spec_id=spec_id, keys=keys, rate=8, no_data=True,
                                 profile=[pb.Band(age=age, rate=rate) for age, rate in PROFILE])
        chunks = list(self.client.records("Fold", request))
        self.assertEqual([chunk.index for chunk in chunks], [0, 1, 2])
        records = self.client.get(spec_id, [chunk.key for chunk in chunks])
        self.assertEqual([chunk.record_bytes for chunk in chunks], [len(data) for data in records])

    def test_an_appended_block_costs_little_and_gives_what_all_at_once_gives(self):
        grown, fresh = self.open(model="bands-grown"), self.open(model="bands-fresh")
        count, costs = 96 if SANITIZED else 120, []  # a fold takes long there
        keys = self.put(grown, 1300, count)
        for blocks in range(1, count + 1):
            before = self.client.stats()["fold_read_bytes_total"]
            records = self.client.bands(grown, keys[:blocks], PROFILE)
            costs.append(self.client.stats()["fold_read_bytes_total"] - before)
        blocks = self.client.get(grown, keys)
        size = sum(len(data) for data in blocks)
        self.check(records, count, size)
        # 3 blocks of the newest band, 8 of the next, at most 32 of the oldest's rest, now and then runs of 4,096 tokens or more.
        self.assertLess(np.median(costs[count // 2:]), 43 * len(blocks[0]))
        self.assertLess(sum(costs), count * (43 + 8) * len(blocks[0]))
        self.assertLess(sum(costs), size * count / 4)
        self.put(fresh, 1300, count)
        again = self.client.bands(fresh, keys, PROFILE)
        self.assertEqual(len(again), len(records))
        for one, other in zip(map(record.Record, records), map(record.Record, again)):
            for layer in range(LAYERS):
                for head in range(HEADS):
                    a, b = one.section(layer, head), other.section(layer, head)
                    self.assertTrue(np.array_equal(a.k, b.k) and np.array_equal(a.v, b.v) and np.array_equal(a.logw, b.logw))

    def test_what_is_not_a_profile_is_refused_by_name(self):
        spec_id = self.open(model="bands-bad")
        keys = self.put(spec_id, 1500, 4)
        cases = [("profile: 9", [(i + 1, 4) for i in range(8)] + [(0, 4)]), ("profile[0].rate", [(0, 0)]),
                 ("profile[0].rate", [(0, 0xFFFFFFFF)]), ("profile[0].age", [(TOKENS, 4)]), ("profile[0].age", [(0, 4), (0, 8)]),
                 ("profile[1].age", [(256, 4), (128, 8), (0, 16)]), ("profile[0].age", [(1 << 25, 4), (0, 8)]),
                 ("profile: 10000", [(i + 1, 4) for i in range(10000)])]
        for text, profile in cases:
            self.assert_error(Code.INVALID_ARGUMENT, text, self.client.bands, spec_id, keys, profile, rate=8)
        self.assert_error(Code.INVALID_ARGUMENT, "budget_bytes", self.client.bands, spec_id, keys, PROFILE, budget_bytes=999)
        self.assert_error(Code.INVALID_ARGUMENT, "rate", self.client.bands, spec_id, keys, PROFILE, budget_bytes=1 << 20, rate=8)
        self.assert_error(Code.INVALID_ARGUMENT, "rate", self.client.bands, spec_id, keys, PROFILE, rate=1025)
        self.assert_error(Code.NOT_FOUND, "keys[4]", self.client.bands, spec_id, keys + [key(1599)], PROFILE, rate=8)


class CommandLine(CommandLineCase):
    """bkv put, fold and summarize on a small trace."""

    def test_fold_and_summarize_agree(self):
        """The daemon's bands and those made off-line hold the same."""
        self.bkv("put", self.trace, "--codec", "dense8", "--window", 256, "--keys", self.path("keys.json"))
        made = self.bkv("fold", "--keys", self.path("keys.json"), "--rate", 16, "--profile", "512:4,:24", "--out",
                        self.path("fold.safetensors"))
        self.assertEqual(len(made["records"]), 2)
        self.assertGreaterEqual(made["raw_bytes"] / made["stored_bytes"], 16)
        done = subprocess.run([built("bin", "bkv"), "summarize", self.trace, self.path("off.safetensors"), "--rate", "16",
                               "--profile", "512:4,:24", "--window", "256"], capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        online, _ = safetensors.load(self.path("fold.safetensors"))
        offline, metadata = safetensors.load(self.path("off.safetensors"))
        self.assertEqual(metadata["profile"], "512:4,:24")
        spans = json.loads(metadata["records"])
        self.assertEqual([[r["position"], r["tokens"], r["bytes"]] for r in made["records"]], spans)
        for layer in [int(name[2:]) for name in online if name.startswith("k.")]:
            for head in range(online[f"k.{layer}"].shape[0]):
                stored = [t for t in range(len(online[f"index.{layer}"][head])) if online[f"index.{layer}"][head][t] >= 0]
                rows = slice(0, len(stored))
                for part in ("k", "v", "logw", "index"):
                    self.assertTrue(np.array_equal(online[f"{part}.{layer}"][head][rows],
                                                   offline[f"{part}.{layer}"][head][rows]), f"{part}.{layer} of head {head}")
            index = offline[f"index.{layer}"]
            for position, tokens, _ in spans:
                self.assertTrue(((index >= position) & (index < position + tokens)).any(), "index tells the bands apart")

    def test_what_goes_together_and_what_does_not(self):
        self.bkv("put", self.trace, "--codec", "dense4", "--window", 256, "--keys", self.path("keys.json"))
        keys = ("--keys", self.path("keys.json"))
        self.assertEqual(len(self.bkv("fold", *keys, "--rate", 16)["records"]), 1)
        self.assertEqual(len(self.bkv("fold", *keys, "--rate", 16, "--profile", "auto")["records"]), 2)
        self.assertEqual(len(self.bkv("fold", *keys, "--profile", "256:4,:8")["records"]), 2)
        self.assertEqual(len(self.bkv("fold", *keys, "--budget", "512K", "--profile", "256:4,:8")["records"]), 2)
        for words, text in (((), "--budget"), (("--profile", "auto"), "--rate"), (("--profile", "4:"), "profile"),
                            (("--profile", "64:4,32:8,:16"), "profile[1].age"), (("--rate", 0), "--rate")):
            self.assertIn(text, self.bkv("fold", *keys, *words, code=2)["error"]["message"])
        self.assertIn("--codec", self.bkv("summarize", self.trace, self.path("x"), "--profile", ":8", "--codec", "balance",
                                          code=2)["error"]["message"])


if __name__ == "__main__":
    run()
