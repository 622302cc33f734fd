"""The quality bench's own arithmetic on small made-up data, without the model: bytes, baselines, attention, contexts, bars."""
import os
import random
import sys
import unittest

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from bench.quality import baselines, configurations, context, picture, results, shares, storage, wildcat
from bench.quality.kernels import Kernels
from bench.quality.model import Batch, DeviceCache, Model, Summary
from support.record import Section, attend
from support.runner import run

LAYERS, HEADS, GROUP, DIM, WINDOW = 2, 2, 3, 64, 16
RAW = 2 * DIM * 2  # bytes of a token's key and value as bf16, in one (layer, head)


needs_kernels = unittest.skipIf(os.environ.get("SANITIZER"), "Python cannot load a library that is built with a sanitizer")


def cache(tokens, seed=0, scale=1.0):
    """k, v [layers, heads, tokens, dim] and q of the newest 32 tokens, as a context has them."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, HEADS, tokens, DIM)
    k, v = (scale * rng.standard_normal(shape)).astype(np.float16), rng.standard_normal(shape).astype(np.float16)
    return k, v, rng.standard_normal((LAYERS, 32, HEADS * GROUP, DIM)).astype(np.float16)


def source(tokens=700, seed=0, scale=1.0):
    return baselines.Source(*cache(tokens, seed, scale), WINDOW, seed)


def section(summary, layer=0, head=0):
    """A section as the oracle reads it; den must be 1."""
    return Section(summary.k[layer, head], summary.v[layer, head], summary.logw[layer, head], None)


def error(summary, kept, queries, layer=0, head=0):
    """Relative error of attention with separate weights in numerator and denominator, in float64."""
    k, v = kept.k[layer * HEADS + head].astype(np.float64), kept.v[layer * HEADS + head].astype(np.float64)
    exact, _ = attend([Section(k, v, np.zeros(len(k)), None)], queries)
    weight = np.exp(queries @ summary.k[layer, head].T / np.sqrt(DIM) + summary.logw[layer, head])
    near = weight @ summary.v[layer, head] / (weight @ summary.den[layer, head])[:, None]
    return np.linalg.norm(near - exact) / np.linalg.norm(exact)


class Bytes(unittest.TestCase):
    @needs_kernels
    def test_a_section_costs_what_our_own_record_takes(self):
        k, v, _ = cache(320)
        for codec, bits in (("dense4", 4), ("dense8", 8), ("raw", storage.NATIVE)):
            record = Kernels().compress(k, v, codec)
            here = LAYERS * HEADS * storage.section_bytes(320, 320, DIM, bits)
            self.assertLessEqual(abs(len(record) - here), 128 + LAYERS * HEADS * (16 + 2 * 16), codec)

    @needs_kernels
    def test_the_quantiser_reads_back_what_our_own_does(self):
        k, v, _ = cache(320)
        summary = configurations.summary_of(Kernels(), [Kernels().compress(k, v, "dense4")])
        kept = source(320 + WINDOW)
        kept.k, kept.v = k.reshape(-1, 320, DIM).astype(np.float32), v.reshape(-1, 320, DIM).astype(np.float32)
        here = baselines.integers(kept, 4)
        for ours, other, part in ((summary.k, here.k, k), (summary.v, here.v, v)):
            step = (part.max() - part.min()) / 15
            self.assertLess(np.mean(np.abs(ours - other) > 0.01 * step), 0.01)  # a rounding that fell the other way
            self.assertLess(np.abs(ours - other).max(), 1.01 * step)

    def test_the_budget_is_used_up_and_never_exceeded(self):
        for bits in (3, 4, storage.NATIVE):
            for budget in (5000, 20000, 10 ** 9):
                m = storage.most_tokens(684, DIM, bits, budget, 2, 100)
                self.assertLessEqual(min(storage.section_bytes(684, m, DIM, bits, 2, 100), budget if m < 684 else 0), budget)
                if m < 684:
                    self.assertGreater(storage.section_bytes(684, m + 1, DIM, bits, 2, 100), budget)

    def test_every_baseline_keeps_to_its_bytes(self):
        kept = source()
        for rate in (4, 8):
            budget = kept.n * RAW // rate
            for name, method in baselines.BASELINES.items():
                for bits in (3, 4):
                    summary = method(kept, bits, budget)
                    self.assertLessEqual(summary.bytes, budget * LAYERS * HEADS, name)
                    self.assertGreater(summary.bytes, 0.85 * budget * LAYERS * HEADS, name)
                    self.assertEqual(summary.k.shape[:3], summary.logw.shape, name)
                    counted = storage.section_bytes(kept.n, summary.k.shape[2], DIM, bits) * LAYERS * HEADS
                    self.assertLessEqual(counted, summary.bytes, name)


class Baselines(unittest.TestCase):
    queries = np.random.default_rng(5).standard_normal((20, DIM))

    def kept_tokens(self, kept, summary):
        """Which tokens a summary with native bits holds, per section."""
        rows = summary.k.reshape(kept.sections, -1, DIM)
        return [{int(np.flatnonzero((kept.k[s] == row).all(1))[0]) for row in rows[s]} for s in range(kept.sections)]

    def test_all_keep_the_first_tokens(self):
        kept = source()
        for method in (baselines.uniform, baselines.streaming, baselines.keydiff, baselines.snapkv):
            for tokens in self.kept_tokens(kept, method(kept, storage.NATIVE, kept.n * RAW // 4)):
                self.assertTrue(set(range(baselines.SINK)) <= tokens)

    def test_uniform_samples_stand_for_all_tokens(self):
        kept = source()
        summary = baselines.uniform(kept, 4, kept.n * RAW // 8)
        for logw in summary.logw.reshape(kept.sections, -1):
            self.assertAlmostEqual(np.exp(logw).sum() / kept.n, 1, delta=0.01)

    def test_streaming_keeps_the_newest(self):
        kept = source()
        for tokens in self.kept_tokens(kept, baselines.streaming(kept, storage.NATIVE, kept.n * RAW // 4)):
            recent = tokens - set(range(baselines.SINK))
            self.assertEqual(recent, set(range(kept.n - len(recent), kept.n)))

    def test_keydiff_keeps_what_differs_from_the_mean(self):
        k, v, q = cache(700)
        k += np.float16(2)
        k[:, :, 333] = -k[:, :, 333]
        kept = baselines.Source(k, v, q, WINDOW, 0)
        for tokens in self.kept_tokens(kept, baselines.keydiff(kept, storage.NATIVE, kept.n * RAW // 16)):
            self.assertIn(333, tokens)

    def test_snapkv_keeps_what_the_newest_queries_see_and_its_neighbours(self):
        k, v, q = cache(700)
        q[:] = q[:, :1, :1]
        k[:, :, 333] = 3 * q[:, :1, 0]
        kept = baselines.Source(k, v, q, WINDOW, 0)
        for tokens in self.kept_tokens(kept, baselines.snapkv(kept, storage.NATIVE, kept.n * RAW // 16)):
            self.assertTrue(set(range(330, 337)) <= tokens)

    def test_votes_are_attention_of_the_newest_queries(self):
        k, _, q = cache(100)
        votes = baselines.observe(k, q).reshape(LAYERS, HEADS, 100)
        np.testing.assert_allclose(votes.sum(-1), 32 * GROUP, rtol=1e-4)
        expected = np.zeros(100)
        for j in range(GROUP):
            for t in range(32):
                seen = 100 - 31 + t
                score = k[1, 1, :seen].astype(np.float64) @ q[1, t, GROUP + j].astype(np.float64) / np.sqrt(DIM)
                expected[:seen] += np.exp(score) / np.exp(score).sum()
        np.testing.assert_allclose(votes[1, 1], expected, rtol=1e-3)

    def test_a_halving_keeps_half_and_stands_for_all(self):
        rng = np.random.default_rng(1)
        k, v = (rng.standard_normal((9, 128, DIM)).astype(np.float32) for _ in range(2))
        index, weight = baselines.balance_halve(rng, k, v)
        self.assertEqual(index.shape, (9, 64))
        self.assertTrue((np.diff(index) > 0).all())
        self.assertTrue(set(np.unique(weight)) <= {1, 2})
        self.assertTrue((weight.sum(1) <= 128).all() and (weight.sum(1) >= 64).all())

    def test_a_halving_balances_better_than_chance(self):
        """On pairs of equal tokens a walk keeps nearly one of each pair; chance keeps neither of a quarter of them."""
        rng = np.random.default_rng(2)
        k, v = (np.repeat(1.5 * rng.standard_normal((40, 64, DIM)), 2, 1).astype(np.float32) for _ in range(2))
        index, _ = baselines.balance_halve(rng, k, v)
        met = np.mean([len(set(row // 2)) for row in index]) / 64
        self.assertGreater(met, 0.9)

    def test_the_authors_rounds_fit_and_differ_by_one(self):
        rounds, _ = baselines.balance_rounds(source(4096 + WINDOW), 4, 4096 * RAW // 8)
        self.assertEqual(sorted(rounds, reverse=True), list(rounds))
        self.assertLessEqual(rounds.max() - rounds.min(), 1)

    def test_everything_kept_is_exact(self):
        kept = source()
        self.assertLess(error(baselines.integers(kept, storage.NATIVE), kept, self.queries), 1e-3)
        for method in (baselines.uniform, baselines.keydiff, baselines.authors_balance):
            self.assertLess(error(method(kept, storage.NATIVE, 2 * kept.n * RAW), kept, self.queries), 1e-3)


class WildCat(unittest.TestCase):
    def test_few_pivots_stand_for_clusters(self):
        k, v, q = cache(500, scale=1.5)
        centres = np.arange(500) % 20
        near = k[:, :, centres] + np.float16(0.05) * k
        kept = baselines.Source(near.astype(np.float16), v[:, :, centres], q, WINDOW, 0)
        queries = np.random.default_rng(5).standard_normal((20, DIM))
        budget = storage.section_bytes(kept.n, 92, DIM, storage.NATIVE, 2, 4 * DIM)
        method = wildcat.WildCat(kept, 92, tau=1.5)
        summary = method(storage.NATIVE, budget)
        self.assertEqual(summary.k.shape[2], 92)
        self.assertEqual(summary.bytes, budget * LAYERS * HEADS)
        self.assertLess(error(summary, kept, queries), 0.05)
        self.assertGreater(error(baselines.uniform(kept, storage.NATIVE, budget), kept, queries), 0.1)

    def test_pivots_are_distinct_and_nested(self):
        rng = np.random.default_rng(3)
        chosen = wildcat.pivots(np, rng, rng.standard_normal((300, DIM)).astype(np.float32), 200, DIM ** -0.5)
        self.assertEqual(len(set(chosen)), 200)


class Shares(unittest.TestCase):
    def test_they_go_by_the_root_of_the_loss_and_through_a_file(self):
        found = shares.from_losses(np.array([[0.04, 0.0001], [0.01, 0.0]]))
        self.assertEqual(found.tolist(), [[255, 13], [128, 1]])
        path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"bkv-quality-{os.getpid()}.json")
        shares.save(found, path)
        try:
            np.testing.assert_array_equal(shares.load(path), found)
        finally:
            os.unlink(path)

    @needs_kernels
    def test_the_head_with_more_gets_more(self):
        k, v, _ = cache(512)
        given = np.array([[255, 20], [20, 20]], np.uint8)
        record = Kernels(shares=given).compress(k, v, "balance", rate=16)
        kept = [len(section[2]) for heads in Kernels().sections(record) for section in heads]
        self.assertGreater(kept[0], 2 * max(kept[1:]))
        self.assertLessEqual(len(record), k.size * 2 * 2 // 16)


class Attention(unittest.TestCase):
    def test_prompts_share_a_cache_and_do_not_see_each_other(self):
        rng = np.random.default_rng(4)
        model = Model.__new__(Model)
        model.xp, model.chunk = np, 5
        lengths, heads = (7, 4), HEADS
        total = sum(lengths)
        q = rng.standard_normal((total, heads * GROUP, DIM)).astype(np.float32)
        k, v = (rng.standard_normal((heads, total, DIM)).astype(np.float32) for _ in range(2))
        shape = (1, heads, 30)
        logw = np.where(rng.random(shape) < 0.2, -1e4, rng.standard_normal(shape))
        stored = Summary(rng.standard_normal((*shape, DIM)), rng.standard_normal((*shape, DIM)), logw, 1.0 * (logw > -1e3), 0)
        window = [rng.standard_normal((heads, 6, DIM)).astype(np.float16) for _ in range(2)]
        model.segment = np.repeat([0, 1], lengths)
        out = model.attend(q, DeviceCache(np, stored, 0, *window), k, v)
        for row, (start, end) in enumerate([(0, 7)] * 7 + [(7, 11)] * 4):
            for j in range(heads * GROUP):
                h = j // GROUP
                there = logw[0, h] > -1e3
                parts = [Section(stored.k[0, h][there], stored.v[0, h][there], logw[0, h][there], None),
                         Section(window[0][h], window[1][h], np.zeros(6), None),
                         Section(k[h, start:row + 1], v[h, start:row + 1], np.zeros(row + 1 - start), None)]
                expected, _ = attend(parts, q[row, j][None])
                np.testing.assert_allclose(out[row, j], expected[0], atol=2e-5)

    def test_a_batch_judges_the_answers_alone(self):
        batch = Batch([([1, 2, 3], [4, 5]), ([6], [7])], 100)
        self.assertEqual(batch.ids, [1, 2, 3, 4, 6])
        self.assertEqual(list(batch.place), [100, 101, 102, 103, 100])
        self.assertEqual(list(batch.rows), [2, 3, 4])
        self.assertEqual(list(batch.targets), [4, 5, 7])
        self.assertEqual([batch.targets[span].tolist() for span in batch.spans], [[4, 5], [7]])

    @needs_kernels
    def test_our_records_come_back_as_one_cache(self):
        k, v, _ = cache(700)
        kernels = Kernels()
        summary = configurations.summary_of(kernels, kernels.compress_blocks(k, v, 256, "raw"))
        self.assertEqual([kernels.tokens(record) for record in kernels.compress_blocks(k, v, 256, "raw")], [256, 256, 188])
        np.testing.assert_array_equal(summary.k, k.astype(np.float32))
        np.testing.assert_array_equal(summary.v, v.astype(np.float32))

    @needs_kernels
    def test_folds_keep_their_budget(self):
        k, v, _ = cache(2048)
        kernels, budget = Kernels(), 2048 * RAW * LAYERS * HEADS // 16
        records = kernels.compress_blocks(k, v, 256, "dense4")
        for profile in (None, "auto:16", "512:4,:32"):
            folded = kernels.fold_prefix(records, budget, profile, 1)
            self.assertLessEqual(sum(len(record) for record in folded), budget)
            self.assertEqual(sum(kernels.tokens(record) for record in folded), 2048)
        self.assertGreater(len(folded), 1)


class Contexts(unittest.TestCase):
    class Letters:
        """A tokenizer whose tokens are characters."""

        @staticmethod
        def encode(text):
            return [ord(letter) for letter in text]

    def test_facts_are_hidden_whole_and_the_last_move_counts(self):
        text = "".join(random.Random(1).choice("abcdefgh ") for _ in range(60000))
        path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"bkv-quality-{os.getpid()}.txt")
        with open(path, "w", encoding="utf8") as file:
            file.write(text)
        try:
            story = context.Context(self.Letters, path, 4096, 3, 5)
            again = context.Context(self.Letters, path, 4096, 3, 5)
            other = context.Context(self.Letters, path, 4096, 4, 5)
            plain = context.Context(self.Letters, path, 4096, 3, 0)
        finally:
            os.unlink(path)
        self.assertEqual(story.ids, again.ids)
        self.assertNotEqual(story.ids, other.ids)
        self.assertEqual((len(story.ids), story.rest), (4096, []))
        self.assertIn("".join(map(chr, plain.ids + plain.rest)), text)
        self.assertEqual((len(plain.ids), len(plain.rest)), (4096, context.CONTINUE + 1))
        told = "".join(map(chr, story.ids))
        self.assertNotRegex(told[-context.RECENT:], "[A-Z]")
        for prompt, target in story.needles:
            name, code = "".join(map(chr, prompt)).split(" of ")[1].split("?")[0], "".join(map(chr, target)).strip()
            self.assertIn(context.NEEDLE.format(name=name, code=code), told)
        for prompt, target in story.babi:
            name, place = "".join(map(chr, prompt)).split(" is ")[1].split(" now")[0], "".join(map(chr, target))
            moves = [told[at:].split(".")[0] for at in range(len(told)) if told.startswith(f"\n{name} went to", at)]
            self.assertIn(len(moves), context.MOVES)
            self.assertTrue(moves[-1].endswith(place))


class Bars(unittest.TestCase):
    @staticmethod
    def sums(ours):
        """Two contexts of questions and two of text; "balance 16x" as given, beside one baseline of two widths.
        ours: (needles right of 4, NLL above exact)."""
        done = []

        def add(base, **columns):
            rows = [{"window": 64, "bytes": 100, "rate": 16.0, "nominal": 16,
                     "family": "balance" if name == "ours" else "KeyDiff", "ours": name == "ours",
                     "bits": {"ours": 0, "four": 4, "three": 3}[name], **row}
                    for name, row in columns.items()]
            done.append(((4096, "book.txt", 1, 4), base, rows))

        all_right = {"needle": [True] * 4, "babi": [True] * 4}
        for nll in (3.0, 3.4):
            add(all_right, ours={**all_right, "needle": [i < ours[0] for i in range(4)]}, four=all_right,
                three={**all_right, "needle": [False] * 4})
            text = {"nll": nll, "kl": 0.1, "error": [0.1, 0.3]}
            add({**text, "kl": 0.0, "error": [0.0, 0.0]}, ours={**text, "nll": nll + ours[1]}, four={**text, "nll": nll + 0.04},
                three={**text, "nll": nll + 0.03})
        return results.sum_up(done)

    def met(self, ours):
        rows = results.judge(self.sums(ours), [8, 16, 32])
        return {row["name"].split(": ", 1)[1].split(",")[0]: row["met"] for row in rows}

    def test_bars_are_met_or_not(self):
        good, bad = self.met((4, 0.02)), self.met((3, 0.05))
        self.assertTrue(all(good.values()), good)
        for name in ("needle", "NLL above exact", "needle against the best baseline", "NLL against the best baseline"):
            self.assertFalse(bad[name], name)
        self.assertTrue(bad["bAbI"])

    def test_sums(self):
        table = self.sums((3, 0.05))[4096, 64]
        self.assertEqual(table[0].family, "exact")
        self.assertEqual((len(table[0].lists["nll"]), table[0].needle), (2, 1.0))
        ours = results.find(table, "balance", 16)
        self.assertEqual((ours.needle, round(ours.above, 6), round(ours.error, 6), ours.rate), (0.75, 0.05, 0.2, 16.0))

    def test_a_picture_of_them_is_well_formed(self):
        from xml.dom import minidom
        path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"bkv-quality-{os.getpid()}.svg")
        picture.draw(self.sums((4, 0.02)), path)
        try:
            self.assertEqual(minidom.parse(path).documentElement.tagName, "svg")
        finally:
            os.unlink(path)


if __name__ == "__main__":
    run()
