"""Every operation, used by a stock gRPC client (grpcio) that knows only proto/*.proto.

What comes back is read by an independent decoder (support/record.py) and compared with NumPy in float64.
"""
import os
import subprocess

from harness import (Case, Client, Code, Daemon, HEADS, KEY_DIM, LAYERS, SPEC, TOKENS, VALUE_DIM, eventually, grpc, key, np,
                     payload, pb, record, run, tensors, wire)

DTYPES = {pb.DTYPE_BF16: record.BF16, pb.DTYPE_FP16: record.FP16, pb.DTYPE_FP32: record.FP32}


class Operations(Case):
    def put(self, spec_id, name, seed=None, tokens=TOKENS, dtype=record.BF16, **fields):
        data = payload(name if seed is None else seed, dtype, tokens=tokens)
        return self.client.put(spec_id, key(name), data, tokens, **fields)

    def sections(self, data):
        """{(layer, head): decoded section}."""
        got = record.Record(data)
        return {(l, h): got.section(l, h) for l in range(got.layers) for h in range(got.heads)}

    def test_open_answers_limits_and_the_same_id_for_the_same_spec(self):
        first = self.client.open(**SPEC)
        self.assertEqual(len(first.spec_id), 16)
        self.assertEqual(first.spec_id, self.client.open(**SPEC).spec_id)
        self.assertNotEqual(first.spec_id, self.client.open(**{**SPEC, "tenant": "other"}).spec_id)
        self.assertIn("inline", first.transports)
        self.assertGreater(first.max_message_bytes, 0)
        self.assertGreater(first.max_block_bytes, 0)
        self.assertGreater(first.max_batch, 0)
        self.assertNotEqual(first.boot_epoch, 0)
        self.assertTrue(first.backend)

    def test_open_fills_defaults_in_and_takes_them_spelled_out(self):
        short = self.client.open(model="m", layers=2, kv_heads=1, key_dim=64, dtype=pb.DTYPE_FP16)
        spec = short.spec
        self.assertEqual((spec.value_dim, spec.block_tokens, spec.tp_size, spec.codec, spec.rate, spec.sink_tokens),
                         (64, 256, 1, pb.CODEC_BALANCE, 16, 32))
        long = self.client.open(model="m", layers=2, kv_heads=1, key_dim=64, value_dim=64, dtype=pb.DTYPE_FP16,
                                block_tokens=256, tp_size=1, codec=pb.CODEC_BALANCE, rate=16, sink_tokens=32)
        self.assertEqual(short.spec_id, long.spec_id)

    def test_raw_comes_back_bit_for_bit_in_every_dtype(self):
        for number, (dtype, kind) in enumerate(DTYPES.items()):
            spec_id = self.open(dtype=dtype, codec=pb.CODEC_RAW)
            data = payload(number, kind)
            self.client.put(spec_id, key(number), data, TOKENS)
            got = record.Record(self.client.get(spec_id, [key(number)])[0])
            self.assertEqual((got.codec, got.dtype, got.tokens, got.key), (record.RAW, kind, TOKENS, key(number)))
            self.assertEqual(got.spec_id, spec_id)
            k, v = tensors(number)
            for (layer, head), section in self.sections(got.data).items():
                want = record.to_float(record.from_float(k[layer, head], kind), kind)
                self.assertTrue(np.array_equal(section.k.ravel(), want.ravel()))
                want = record.to_float(record.from_float(v[layer, head], kind), kind)
                self.assertTrue(np.array_equal(section.v.ravel(), want.ravel()))
            self.assertTrue(got.data.endswith(data), "a raw record ends with the payload")

    def test_dense_codecs_keep_every_token_within_a_quantisation_step(self):
        for codec, steps in ((pb.CODEC_DENSE8, 255), (pb.CODEC_DENSE4, 15)):
            spec_id = self.open(codec=codec)
            self.put(spec_id, 10, codec=codec)
            k, v = tensors(10)
            for (layer, head), section in self.sections(self.client.get(spec_id, [key(10)])[0]).items():
                self.assertTrue(np.array_equal(section.index, np.arange(TOKENS)))
                self.assertTrue((section.logw == 0).all())
                span = np.ptp(k[layer, head], axis=0)
                self.assertTrue((np.abs(section.k - k[layer, head]) <= span / steps * 0.75 + 0.02).all())
                span = np.ptp(v[layer, head], axis=1)[:, None]
                self.assertTrue((np.abs(section.v - v[layer, head]) <= span / steps * 0.75 + 0.02).all())

    def test_balance_keeps_its_rate_its_sink_and_its_total_weight(self):
        for rate in (8, 16, 32):
            spec_id = self.open(rate=rate)
            result = self.put(spec_id, 20 + rate, position=0).results[0]
            data = self.client.get(spec_id, [key(20 + rate)])[0]
            self.assertEqual(result.stored_bytes, len(data))
            raw = 2 * LAYERS * HEADS * TOKENS * (KEY_DIM + VALUE_DIM)
            self.assertGreaterEqual(raw / len(data), rate)
            for section in self.sections(data).values():
                self.assertLess(len(section.index), TOKENS)
                self.assertTrue((section.logw >= -0.01).all(), "no token counts less than itself")
                if rate == 8:
                    self.assertTrue(set(range(SPEC["sink_tokens"])) <= set(section.index.tolist()))
                    self.assertAlmostEqual(float(np.exp(section.logw).sum()) / TOKENS, 1, delta=0.15)

    def test_put_in_one_message_in_chunks_and_with_an_empty_first_message_is_the_same(self):
        data, seen = payload(30), []
        for number, (chunk, first) in enumerate([(1 << 20, True), (1000, True), (4096, False), (1, True)]):
            spec_id = self.open(codec=pb.CODEC_DENSE4, model=f"chunks-{number}")
            if chunk == 1:  # one byte in the first message, the rest in one other
                block = pb.PutBlock(spec_id=spec_id, key=key(30), tokens=TOKENS, payload_bytes=len(data))
                self.client.put_stream([pb.PutRequest(block=block, data=data[:1]), pb.PutRequest(data=data[1:])])
            else:
                self.client.put(spec_id, key(30), data, TOKENS, chunk=chunk, first=first)
            seen.append(record.Record(self.client.get(spec_id, [key(30)])[0]).data[128:])
        self.assertEqual(len(set(seen)), 1)

    def test_several_blocks_in_one_stream_are_answered_in_order(self):
        spec_id = self.open(model="several")
        messages, lengths = [], [TOKENS, TOKENS, 50, TOKENS]
        for number, tokens in enumerate(lengths):
            data = payload(40 + number, tokens=tokens)
            block = pb.PutBlock(spec_id=spec_id, key=key(40 + number), position=number * TOKENS, tokens=tokens,
                                payload_bytes=len(data), codec=pb.CODEC_RAW if number % 2 else 0)
            messages += wire.put_messages(block, data, chunk=30000)
        results = self.client.put_stream(messages).results
        self.assertEqual([r.key for r in results], [key(40 + n) for n in range(4)])
        self.assertFalse(any(r.duplicate for r in results))
        for number, data in enumerate(self.client.get(spec_id, [key(40 + n) for n in range(4)])):
            got = record.Record(data)
            self.assertEqual((got.key, got.tokens, got.position), (key(40 + number), lengths[number], number * TOKENS))
            self.assertEqual(got.codec, record.RAW if number % 2 else record.BALANCE)

    def test_checksum_that_matches_is_taken(self):
        spec_id = self.open(model="checksum")
        data = payload(45)
        self.client.put(spec_id, key(45), data, TOKENS, checksum=record.xxh3(data), has_checksum=True)
        self.assertEqual(self.client.lookup(spec_id, [key(45)]).prefix, 1)

    def test_lookup_finds_the_leading_run_and_each_state(self):
        spec_id = self.open(model="lookup")
        keys = [wire.key_next(spec_id, None, range(TOKENS))]
        for block in range(1, 5):
            keys.append(wire.key_next(spec_id, keys[-1], range(block * TOKENS, (block + 1) * TOKENS)))
        for block in (0, 1, 3):
            self.client.put(spec_id, keys[block], payload(50), TOKENS, position=block * TOKENS)
        reply = self.client.lookup(spec_id, keys)
        self.assertEqual(reply.prefix, 2)
        self.assertEqual(list(reply.states), [1, 1, 0, 1, 0])
        self.assertEqual(self.client.lookup(self.open(model="another"), keys).prefix, 0)

    def test_get_of_layer_and_head_ranges_equals_that_part_of_the_whole(self):
        for codec in (pb.CODEC_RAW, pb.CODEC_DENSE4, pb.CODEC_BALANCE):
            spec_id = self.open(model=f"ranges-{codec}", codec=codec)
            self.put(spec_id, 60)
            whole = self.sections(self.client.get(spec_id, [key(60)])[0])
            for first_layer, layers, first_head, heads in ((1, 1, 0, 1), (0, 2, 1, 1), (2, 0, 0, 0), (0, 0, 1, 0)):
                data = self.client.get(spec_id, [key(60)], first_layer=first_layer, layers=layers, first_head=first_head,
                                       heads=heads)[0]
                got = record.Record(data)
                self.assertTrue(got.flags & record.SLICE)
                self.assertEqual((got.first_layer, got.first_head), (first_layer, first_head))
                self.assertEqual((got.layers, got.heads), (layers or LAYERS - first_layer, heads or HEADS - first_head))
                for (layer, head), section in self.sections(data).items():
                    want = whole[first_layer + layer, first_head + head]
                    for name in ("k", "v", "logw", "index"):
                        self.assertTrue(np.array_equal(getattr(section, name), getattr(want, name)), name)

    def test_get_reports_missing_keys_and_delivers_the_others(self):
        spec_id = self.open(model="partial")
        self.put(spec_id, 70)
        self.put(spec_id, 71)
        records, codes, messages, error = self.client.try_get(spec_id, [key(70), key(999), key(71)])
        self.assertEqual(codes, [0, Code.NOT_FOUND.value[0], 0])
        self.assertTrue(messages[1])
        self.assert_status(error, Code.NOT_FOUND, "key")
        self.assertEqual([record.Record(records[i]).key for i in (0, 2)], [key(70), key(71)])

    def test_a_record_larger_than_a_message_comes_in_chunks(self):
        spec_id = self.open(model="large", layers=16, kv_heads=8, codec=pb.CODEC_RAW, dtype=pb.DTYPE_FP32)
        data = payload(75, record.FP32, layers=16, heads=8)
        self.client.put(spec_id, key(75), data, TOKENS)
        chunks = list(self.client.records("Get", pb.GetRequest(spec_id=spec_id, keys=[key(75)])))
        self.assertGreater(len(chunks), 1)
        self.assertEqual(chunks[0].record_bytes, sum(len(c.data) for c in chunks))
        self.assertTrue(b"".join(c.data for c in chunks).endswith(data))

    def test_fold_stays_within_its_budget_and_is_found_again(self):
        spec_id = self.open(model="fold")
        keys = [key(80 + n) for n in range(4)]
        for number in range(4):
            self.put(spec_id, 80 + number, position=number * TOKENS, codec=pb.CODEC_DENSE4)
        sizes = []
        for budget in (1 << 20, 30000, 15000, 9000):
            data = self.client.fold(spec_id, keys, budget)
            self.assertLessEqual(len(data), budget)
            got = record.Record(data)
            self.assertTrue(got.flags & record.FOLD)
            self.assertEqual((got.tokens, got.position), (4 * TOKENS, 0))
            for section in self.sections(data).values():
                self.assertGreater(len(section.index), 0)
            again = self.client.fold(spec_id, keys, budget)
            self.assertEqual(again, data)
            self.assertEqual(self.client.get(spec_id, [got.key])[0], data, "a fold is stored like a block")
            sizes.append(len(data))
        self.assertEqual(sizes, sorted(sizes, reverse=True))
        self.assertGreaterEqual(self.client.stats()["fold_hits_total"], 4)

    def test_fold_without_data_only_makes_and_stores_it(self):
        spec_id = self.open(model="fold-no-data")
        for number in range(2):
            self.put(spec_id, 85 + number, position=number * TOKENS)
        request = pb.FoldRequest(spec_id=spec_id, keys=[key(85), key(86)], budget_bytes=20000, no_data=True)
        chunks = list(self.client.records("Fold", request))
        self.assertEqual(len(chunks), 1)
        self.assertEqual(chunks[0].data, b"")
        self.assertEqual(len(self.client.get(spec_id, [chunks[0].key])[0]), chunks[0].record_bytes)

    def test_attend_equals_numpy_over_the_decoded_records(self):
        heads, queries = 3 * HEADS, 5
        rng = np.random.default_rng(90)
        for codec in (pb.CODEC_RAW, pb.CODEC_DENSE8, pb.CODEC_BALANCE):
            spec_id = self.open(model=f"attend-{codec}", codec=codec)
            keys = [key(90), key(91)]
            for number, name in enumerate((90, 91)):
                self.put(spec_id, name, position=number * TOKENS)
            blocks = [self.sections(data) for data in self.client.get(spec_id, keys)]
            for first, layers, scale in ((0, LAYERS, 0.0), (1, 1, 0.25)):
                q = rng.normal(size=(layers, heads, queries, KEY_DIM)).astype(np.float32)
                reply = self.client.attend(spec_id, keys, q, layers=layers, first_layer=first, scale=scale)
                out = np.frombuffer(reply.output, "<f4").reshape(layers, heads, queries, VALUE_DIM)
                lse = np.frombuffer(reply.lse, "<f4").reshape(layers, heads, queries)
                for layer in range(layers):
                    for head in range(heads):
                        sections = [b[first + layer, head // 3] for b in blocks]
                        want, want_lse = record.attend(sections, q[layer, head], scale or None)
                        self.assertTrue(np.linalg.norm(out[layer, head] - want) <= 1e-3 * np.linalg.norm(want))
                        self.assertTrue(np.allclose(lse[layer, head], want_lse, rtol=2e-5, atol=2e-5))

    def test_pin_holds_a_lease_and_unpin_ends_it(self):
        spec_id = self.open(model="pin")
        self.put(spec_id, 100)
        before = self.client.stats()["leases"]
        lease = self.client.pin(spec_id, [key(100)], 60000).lease
        self.assertEqual(self.client.stats()["leases"], before + 1)
        self.client.unpin(lease)
        self.assertEqual(self.client.stats()["leases"], before)
        self.assert_error(Code.NOT_FOUND, "lease", self.client.unpin, lease)
        self.assert_error(Code.NOT_FOUND, "key", self.client.pin, spec_id, [key(100), key(999)], 60000)
        self.assertEqual(self.client.stats()["leases"], before)

    def test_a_lease_ends_by_itself(self):
        spec_id = self.open(model="lease-end")
        self.put(spec_id, 101)
        before = self.client.stats()["leases"]
        self.client.pin(spec_id, [key(101)], 200)
        eventually(lambda: self.client.stats()["leases"] == before, "the lease's end")

    def test_drop_forgets_and_counts(self):
        spec_id = self.open(model="drop")
        for name in (110, 111):
            self.put(spec_id, name)
        self.assertEqual(self.client.drop(spec_id, [key(110), key(999), key(111)]), 2)
        self.assertEqual(self.client.drop(spec_id, [key(110)]), 0)
        self.assertEqual(list(self.client.lookup(spec_id, [key(110), key(111)]).states), [0, 0])
        self.assert_error(Code.NOT_FOUND, "key", self.client.get, spec_id, [key(110)])

    def test_time_to_live(self):
        spec_id = self.open(model="ttl")
        self.put(spec_id, 115, ttl_ms=300)
        self.assertEqual(self.client.lookup(spec_id, [key(115)]).prefix, 1)
        eventually(lambda: self.client.lookup(spec_id, [key(115)]).prefix == 0, "the block's end of life")

    def test_stats_count_what_happened(self):
        spec_id = self.open(model="stats", codec=pb.CODEC_DENSE4)
        before = self.client.stats()
        stored = self.put(spec_id, 120).results[0].stored_bytes
        self.client.get(spec_id, [key(120)])
        after = self.client.stats()
        grown = {name: after[name] - before[name] for name in after if name}
        self.assertEqual(grown["put_blocks_total"], 1)
        self.assertEqual(grown["entries"], 1)
        self.assertEqual(grown["get_records_total"], 1)
        self.assertEqual(grown["stored_bytes_total"], stored)
        self.assertEqual(grown["raw_bytes_total"], len(payload(120)))
        self.assertGreaterEqual(grown["hits_total"], 1)
        reply = after[""]
        self.assertTrue(reply.version and reply.backend)
        self.assertFalse(reply.draining)
        self.assertTrue(all(m.help and m.name.startswith("balancekv_") for m in reply.metrics))

    def test_health_check_and_watch(self):
        self.assertEqual(self.client.health(""), 1)
        self.assertEqual(self.client.health("balancekv.v1.BalanceKV"), 1)
        self.assert_error(Code.NOT_FOUND, "service", self.client.health, "no.such.Service")
        watch = self.client.watch("")
        self.assertEqual(next(watch).status, 1)
        watch.cancel()
        watch = self.client.watch("no.such.Service")
        self.assertEqual(next(watch).status, 3)
        watch.cancel()

    def test_an_unknown_method_is_unimplemented(self):
        self.assert_error(Code.UNIMPLEMENTED, "", self.client.unary, wire.SERVICE + "Nothing", pb.StatsRequest(),
                          pb.StatsResponse)

    def test_tcp_serves_what_the_socket_serves(self):
        spec_id = self.open(model="tcp")
        with Client(f"127.0.0.1:{self.daemon.port()}") as other:
            other.put(spec_id, key(130), payload(130), TOKENS)
            self.assertEqual(other.get(spec_id, [key(130)]), self.client.get(spec_id, [key(130)]))


def make_certificates(folder):
    """A CA, a daemon's and a client's certificate, and a stranger's of another CA, by the openssl command."""
    def openssl(*words):
        subprocess.run(["openssl", *words], check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    with open(os.path.join(folder, "names"), "w", encoding="ascii") as file:
        file.write("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for ca in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj",
                f"/CN=test {ca}", "-keyout", ca + ".key", "-out", ca + ".pem")
    for name, ca in (("daemon", "ca"), ("client", "ca"), ("stranger", "other")):
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}", "-keyout",
                name + ".key", "-out", name + ".csr")
        openssl("x509", "-req", "-days", "2", "-in", name + ".csr", "-CA", ca + ".pem", "-CAkey", ca + ".key",
                "-CAcreateserial", "-extfile", "names", "-out", name + ".pem")


class Tls(Case):
    """TLS and mTLS on TCP; the unix socket stays plain."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon()
        cls.addClassCleanup(cls.daemon.close)
        cls.folder = cls.daemon.folder
        make_certificates(cls.folder)
        cls.daemon.options.update(tls_cert=cls.path("daemon.pem"), tls_key=cls.path("daemon.key"))
        cls.daemon.start(tls_client_ca=cls.path("ca.pem"))

    @classmethod
    def path(cls, name):
        return os.path.join(cls.folder, name)

    def read(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def secure(self, ca="ca", own=None):
        chain = (self.read(own + ".key"), self.read(own + ".pem")) if own else (None, None)
        client = Client(f"127.0.0.1:{self.daemon.port()}", grpc.ssl_channel_credentials(self.read(ca + ".pem"), *chain))
        self.addCleanup(client.close)
        return client

    def test_a_client_with_a_certificate_is_served(self):
        client = self.secure(own="client")
        spec_id = client.open(**SPEC).spec_id
        client.put(spec_id, key(1), payload(1), TOKENS)
        self.assertEqual(client.get(spec_id, [key(1)]), self.client.get(spec_id, [key(1)]))

    def test_others_are_refused(self):
        for what, make in (("no certificate", lambda: self.secure()), ("a stranger's", lambda: self.secure(own="stranger")),
                           ("a daemon unknown to the client", lambda: self.secure(ca="other", own="client")),
                           ("plain text", lambda: Client(f"127.0.0.1:{self.daemon.port()}"))):
            with self.subTest(what):
                self.assert_error(Code.UNAVAILABLE, "", make().health, timeout=5)
        self.assertEqual(self.client.health(), 1)

    def test_tls_without_client_certificates(self):
        self.daemon.stop()
        self.daemon.start()
        self.assertEqual(self.secure().health(), 1)
        self.daemon.stop()
        self.daemon.start(tls_client_ca=self.path("ca.pem"))


if __name__ == "__main__":
    run()
