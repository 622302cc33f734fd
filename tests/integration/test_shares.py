"""Shares: a spec says which heads a record's bytes go to. Over the wire, from the command line, and measured by calibrate."""
import json
import subprocess

from harness import Case, Code, CommandLineCase, HEADS, LAYERS, SPEC, TOKENS, key, np, payload, pb, record, run
from support import built, safetensors

SHARES = bytes([20, 40, 255, 40, 20, 1])


def kept(data):
    """Tokens of each section of a record, [layers][heads]."""
    got = record.Record(data)
    return np.array([[len(got.section(layer, head).k) for head in range(HEADS)] for layer in range(LAYERS)])


class Shares(Case):
    def test_they_are_part_of_the_spec(self):
        plain = self.client.open(**self.spec())
        shared = self.client.open(**self.spec(shares=SHARES))
        self.assertNotEqual(plain.spec_id, shared.spec_id)
        self.assertEqual((plain.spec.shares, shared.spec.shares), (b"", SHARES))
        self.assertEqual(self.client.open(**self.spec(shares=SHARES)).spec_id, shared.spec_id)
        self.assertNotEqual(self.client.open(**self.spec(shares=SHARES[::-1])).spec_id, shared.spec_id)
        equal = self.client.open(**self.spec(shares=bytes([7] * len(SHARES))))
        self.assertEqual((equal.spec_id, equal.spec.shares), (plain.spec_id, b""), "all alike is none")

    def spec(self, **changes):
        return {**SPEC, "model": "shares", **changes}

    def test_wrong_ones_are_refused_by_name(self):
        for shares, text in ((SHARES[:-1], "spec.shares: 5 bytes for 3 layers of 2 heads"), (SHARES + b"\1", "spec.shares: 7 "),
                             (b"\0" + SHARES[1:], "spec.shares: 0 for layer 0, head 0"),
                             (SHARES[:3] + b"\0" + SHARES[4:], "spec.shares: 0 for layer 1, head 1")):
            self.assert_error(Code.INVALID_ARGUMENT, text, self.client.open, **self.spec(shares=shares))

    def test_blocks_and_folds_go_by_them(self):
        plain, shared = self.open(model="shares-put"), self.open(model="shares-put", shares=SHARES)
        for rate in (0, 16):  # the spec's, and a Put's own
            counts = []
            for spec_id in (plain, shared):
                self.client.put(spec_id, key(rate), payload(1), TOKENS, rate=rate)
                counts.append(kept(self.client.get(spec_id, [key(rate)])[0]))
            equal, divided = counts
            self.assertLessEqual(equal.max() - equal.min(), 8)
            self.assertGreater(divided[1, 0], equal[1, 0])
            self.assertTrue(divided[1, 0] > divided[0, 1] > divided[0, 0] > divided[2, 1] >= 1, divided)
        keys = [key(100 + i) for i in range(4)]
        for i, one in enumerate(keys):
            self.client.put(shared, one, payload(i), TOKENS, position=i * TOKENS, codec=pb.CODEC_DENSE4)
        budget = 4 * TOKENS * LAYERS * HEADS * 96 * 2 // 12
        fold = self.client.fold(shared, keys, budget)
        self.assertLessEqual(len(fold), budget)
        divided = kept(fold)
        self.assertTrue(divided[1, 0] > divided[0, 1] > divided[0, 0] > divided[2, 1] >= 1, divided)


class CommandLine(CommandLineCase):
    """bkv calibrate, and --shares of put, summarize and those that read the keys file."""

    timeout_s = 120

    def local(self, *words, code=0):
        done = subprocess.run([built("bin", "bkv"), *map(str, words), "--json"], capture_output=True, text=True, timeout=120)
        self.assertEqual(done.returncode, code, done.stderr)
        return json.loads(done.stdout if code == 0 else done.stderr)

    def write(self, **fields):
        with open(self.path("shares.json"), "w", encoding="utf8") as file:
            json.dump(fields, file)
        return self.path("shares.json")

    def errors(self, name, last):
        """What calibrate measures, in float64 and from the tensors that summarize writes."""
        exact, _ = safetensors.load(self.trace)
        small, _ = safetensors.load(name)
        found = []
        for layer in (1, 3, 5, 7):
            k, v, q = (exact[f"{part}.{layer}"].astype(np.float64) for part in "kvq")
            q, group = q[:, -last:], len(q) // len(k)
            change, whole = np.zeros(len(k)), 0
            for head, row in ((h, r) for h in range(len(k)) for r in range(group)):
                mine = q[head * group + row]
                outs = []
                for keys, values, logw in ((k[head], v[head], np.zeros(len(k[head]))),
                                           tuple(small[f"{part}.{layer}"][head].astype(np.float64) for part in ("k", "v", "logw"))):
                    keys, values, logw = (part[logw > -np.inf] for part in (keys, values, logw))
                    score = mine @ keys.T / np.sqrt(keys.shape[1]) + logw
                    score[:, -last:][np.triu_indices(last, 1)] = -np.inf
                    weight = np.exp(score - score.max(1, keepdims=True))
                    outs.append(weight @ values / weight.sum(1, keepdims=True))
                change[head] += ((outs[1] - outs[0]) ** 2).sum()
                whole += (outs[0] ** 2).sum()
            found += list(change / whole)
        return np.array(found)

    def test_calibrate_measures_what_a_head_alone_costs(self):
        got = self.local("calibrate", self.trace, "--last", 100, "--rate", 20, "--out", self.path("shares.json"))
        self.local("summarize", self.trace, self.path("small"), "--rate", 20, "--window", 100)
        want = self.errors(self.path("small"), 100)
        self.assertTrue(np.allclose(got["errors"], want, rtol=0.03), (got["errors"], want))
        self.assertEqual((got["layers"], got["heads"], max(got["shares"])), (4, 2, 255))
        self.assertTrue(np.allclose(np.array(got["shares"]) / 255, want / want.max(), atol=0.03))
        with open(self.path("shares.json"), encoding="utf8") as file:
            self.assertEqual(json.load(file), got)
        twice = self.local("calibrate", self.trace, self.trace, "--last", 100, "--rate", 20)
        self.assertTrue(np.allclose(twice["errors"], got["errors"]), "a mean over the traces")

    def test_summarize_goes_by_them_and_keeps_the_rate(self):
        shares = self.write(layers=4, heads=2, shares=[0.5, 0.25, 0.5, 2, 0.5, 0.5, 0.01, 0.5])
        counts = []
        for name, words in (("equal", ()), ("divided", ("--shares", shares))):
            made = self.local("summarize", self.trace, self.path(name), "--rate", 16, "--window", 64, *words)
            self.assertGreaterEqual(made["rate"], 16)
            self.assertLess(made["rate"], 16.2)
            tensors, _ = safetensors.load(self.path(name))
            counts.append([int((tensors[f"index.{layer}"][head] >= 0).sum()) - 64 for layer in (1, 3, 5, 7) for head in (0, 1)])
        equal, divided = counts
        self.assertTrue(divided[3] > divided[0] > divided[1] > divided[6] > 0, divided)
        self.assertTrue(divided[3] > equal[3] and divided[6] < equal[6], (equal, divided))

    def test_a_keys_file_carries_them(self):
        shares = self.write(layers=4, heads=2, shares=[1, 1, 1, 8, 1, 1, 1, 1])
        keys = self.path("keys.json")
        put = self.bkv("put", self.trace, "--window", 256, "--keys", keys, "--shares", shares)
        self.assertEqual(put["spec"]["shares"], [32, 32, 32, 255, 32, 32, 32, 32])
        self.assertNotEqual(put["spec_id"], self.bkv("put", self.trace, "--window", 256)["spec_id"])
        self.bkv("lookup", "--keys", keys)
        self.bkv("get", "--keys", keys, "--out", self.path("got"))
        tensors, _ = safetensors.load(self.path("got"))
        self.assertGreater((tensors["index.3"][1] >= 0).sum(), 2 * (tensors["index.3"][0] >= 0).sum())
        self.local("summarize", self.trace, self.path("off"), "--window", 256, "--shares", shares)
        off, _ = safetensors.load(self.path("off"))
        stored = int((tensors["index.3"][1] >= 0).sum())
        self.assertTrue(np.array_equal(off["k.3"][1][:stored], tensors["k.3"][1][:stored]), "the daemon's blocks are summarize's")
        self.assertIn("--shares", self.bkv("get", "--keys", keys, "--shares", shares, code=2)["error"]["message"])

    def test_what_is_wrong_is_named(self):
        cases = [(dict(heads=2, shares=[1] * 8), "layers: missing"), (dict(layers=2, heads=4, shares=[1] * 8), "layers: 2"),
                 (dict(layers=4, heads=2, shares=[1] * 7), "shares: "), (dict(layers=4, heads=2, shares=[1] * 7 + [0]), "shares[7]")]
        for fields, text in cases:
            shares = self.write(**fields)
            refused = (self.bkv("put", self.trace, "--shares", shares, code=1),
                       self.local("summarize", self.trace, self.path("out"), "--shares", shares, code=1))
            for one in refused:
                self.assertIn(f"shares.json: {text}", one["error"]["message"])
        self.assertIn("--last", self.local("calibrate", self.trace, "--last", 0, code=2)["error"]["message"])
        self.assertIn("q.1.shape: 256 queries", self.local("calibrate", self.trace, "--last", 257, code=1)["error"]["message"])
        tensors, _ = safetensors.load(self.trace)
        safetensors.save(self.path("mute.safetensors"), {name: part for name, part in tensors.items() if name != "q.5"}, {})
        self.assertIn("mute.safetensors: q.5: missing",
                      self.local("calibrate", self.path("mute.safetensors"), code=1)["error"]["message"])
        safetensors.save(self.path("part.safetensors"), {name: part for name, part in tensors.items() if name[2:] in "135"}, {})
        self.assertIn("part.safetensors: k.N", self.local("calibrate", self.trace, self.path("part.safetensors"),
                                                          code=1)["error"]["message"])


if __name__ == "__main__":
    run()
