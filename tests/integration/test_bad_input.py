"""Everything that a client can get wrong: one test for each kind. What memory can do is in test_bad_memory.py.

Each failure must end with its documented status and a message that names the field, leave exactly one log line and nothing
half-stored, and disturb nobody else: beside every test a neighbour reads and checks a record of its own all the time.
"""
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

from harness import (Case, Client, Code, Daemon, HEADS, KEY_DIM, LAYERS, SPEC, TOKENS, VALUE_DIM, eventually, grpc, key, np,
                     payload, pb, record, run, tensors, wire)

MESSAGE, BLOCK, BATCH, SPECS = 4 << 20, 12 << 20, 64, 400
OP_TIMEOUT_S = 8
SIZE = len(payload(0))
UNKNOWN = b"\xee" * 16
BUSY = ("staging_bytes", "jobs_queued", "jobs_running")
QUIET = ("entries", "resident_bytes", "slot_bytes", "leases", *BUSY)


class Neighbour:
    """Another client: gets one record, over and over, and compares every byte."""

    def __init__(self, target):
        self.client = Client(target)
        spec_id = self.client.open(**{**SPEC, "model": "neighbour", "codec": pb.CODEC_RAW}).spec_id
        self.client.put(spec_id, key(0), payload(0), TOKENS)
        self.want = self.client.get(spec_id, [key(0)])
        self.rounds, self.error, self.slowest = 0, None, 0.0
        self.spec_id, self.ending = spec_id, threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        while not self.ending.wait(0.01):
            started = time.monotonic()
            try:
                if self.client.get(self.spec_id, [key(0)], timeout=20) != self.want:
                    self.error = "wrong bytes"
            except grpc.RpcError as error:
                self.error = str(error)
            self.slowest = max(self.slowest, time.monotonic() - started)
            self.rounds += 1
            if self.error:
                return

    def close(self):
        self.ending.set()
        self.thread.join(10)
        self.client.close()


class Bad(Case):
    options = dict(max_message=MESSAGE, max_block=BLOCK, max_batch=BATCH, max_specs=SPECS, arena="64M", slab="8M",
                   staging="32M", op_timeout=f"{OP_TIMEOUT_S}s")

    def setUp(self):
        super().setUp()
        self.spec_id = self.open(model=self.id())
        self.neighbour = Neighbour(self.daemon.target)
        self.addCleanup(self.neighbour.close)
        self.quiet()

    def quiet(self):
        """Remembers what must be unchanged after the failure."""
        eventually(lambda: not any(self.gauges(*BUSY).values()), "nothing is under way")
        self.before = self.gauges(*QUIET)
        self.lines = len(self.failures())

    def unchanged(self):
        eventually(lambda: self.gauges(*QUIET) == self.before, f"back to {self.before}, is {self.gauges(*QUIET)}")
        eventually(lambda: self.client.stats()["pinned"] == 0, "no pin is left")
        rounds = self.neighbour.rounds
        eventually(lambda: self.neighbour.rounds > rounds or self.neighbour.error, "the neighbour goes on")
        self.assertIsNone(self.neighbour.error)
        self.assertLess(self.neighbour.slowest, OP_TIMEOUT_S - 2, "it waited for what the daemon waits for")

    def one_line(self, *statuses, error=None, text=""):
        """Exactly one log line since quiet(), with one of the statuses; the request id is the one that the client was told."""
        eventually(lambda: len(self.failures()) > self.lines, "a log line")
        time.sleep(0.05)
        lines = self.failures()[self.lines:]
        self.assertEqual(len(lines), 1, lines)
        self.assertIn(lines[0].get("status"), statuses, lines)
        self.assertIn(text, lines[0]["message"])
        if error is not None:
            told = dict(error.trailing_metadata() or ()).get("bkv-request-id")
            self.assertEqual(told, str(lines[0]["request"]))
            self.assertEqual(error.details(), lines[0]["message"])
        return lines[0]

    def refused(self, code, text, call, *args, **kwargs):
        """The whole of what one bad request must show."""
        self.quiet()
        error = self.assert_error(code, text, call, *args, **kwargs)
        self.one_line(code.name if code != Code.UNAVAILABLE else "BUSY", error=error)
        self.unchanged()

    def blocks(self, **changes):
        """A PutBlock of payload(1) with changes."""
        fields = dict(spec_id=self.spec_id, key=key(1), tokens=TOKENS, payload_bytes=SIZE)
        return pb.PutBlock(**{**fields, **changes})

    def put_block(self, data=None, **changes):
        return self.client.put_stream(wire.put_messages(self.blocks(**changes), payload(1) if data is None else data))

    # ---- names that are not known here ----

    def test_unknown_spec(self):
        c = self.client
        q = np.zeros((LAYERS, HEADS, 1, KEY_DIM), np.float32)
        for call, args in ((c.put, (key(1), payload(1), TOKENS)), (c.get, ([key(1)],)), (c.lookup, ([key(1)],)),
                           (c.fold, ([key(1)], 10000)), (c.attend, ([key(1)], q)), (c.pin, ([key(1)], 1000)),
                           (c.drop, ([key(1)],)), (c.warm, ([key(1)],))):
            with self.subTest(call.__name__):
                self.refused(Code.NOT_FOUND, "spec_id", call, UNKNOWN, *args)

    def test_unknown_key(self):
        c = self.client
        q = np.zeros((LAYERS, HEADS, 1, KEY_DIM), np.float32)
        for call, args in ((c.get, ()), (c.fold, (10000,)), (c.attend, (q,)), (c.pin, (1000,))):
            with self.subTest(call.__name__):
                self.refused(Code.NOT_FOUND, "keys", call, self.spec_id, [key(404)], *args)

    def test_a_gpu_cache_that_is_not_there(self):
        self.refused(Code.UNIMPLEMENTED, "compute.gpu_cache", self.client.warm, self.spec_id, [key(1)])
        self.refused(Code.INVALID_ARGUMENT, "keys", self.client.warm, self.spec_id, [])

    def test_key_of_another_spec(self):
        """A key that another tenant put is neither seen nor in the way."""
        other = self.open(model=self.id(), tenant="other")
        self.client.put(other, key(2), payload(2), TOKENS, codec=pb.CODEC_RAW)
        self.refused(Code.NOT_FOUND, "keys", self.client.get, self.spec_id, [key(2)])
        self.assertFalse(self.client.put(self.spec_id, key(2), payload(3), TOKENS, codec=pb.CODEC_RAW).results[0].duplicate)
        self.assertTrue(self.client.get(self.spec_id, [key(2)])[0].endswith(payload(3)))
        self.assertTrue(self.client.get(other, [key(2)])[0].endswith(payload(2)))

    # ---- sizes ----

    def test_wrong_sizes(self):
        c, spec = self.client, self.spec_id
        q = np.zeros((LAYERS, HEADS, 1, KEY_DIM), np.float32)
        c.put(spec, key(3), payload(3), TOKENS)
        attend = lambda **changes: c.unary("Attend", pb.AttendRequest(**{**dict(
            spec_id=spec, keys=[key(3)], query_heads=HEADS, queries=1, q=q.tobytes()), **changes}), pb.AttendResponse)
        cases = [
            ("spec_id", c.lookup, (spec[:15], [key(3)]), {}), ("spec_id", c.get, (spec + b"x", [key(3)]), {}),
            ("spec_id", self.put_block, (), dict(spec_id=b"")), ("key", self.put_block, (), dict(key=key(1)[:31])),
            ("keys[1]", c.lookup, (spec, [key(1), b"short"]), {}), ("keys[0]", c.get, (spec, [b""]), {}),
            ("keys", c.fold, (spec, [], 9000), {}),
            ("tokens", self.put_block, (), dict(tokens=0)), ("tokens", self.put_block, (), dict(tokens=TOKENS + 1)),
            ("payload_bytes", self.put_block, (), dict(payload_bytes=SIZE - 1)),
            ("payload_bytes", self.put_block, (), dict(payload_bytes=SIZE + 2)),
            ("payload_bytes", self.put_block, (), dict(payload_bytes=0)),
            ("payload_bytes", self.put_block, (), dict(payload_bytes=1 << 63)),
            ("payload_bytes", self.put_block, (), dict(tokens=TOKENS - 1)),
            ("position", self.put_block, (), dict(position=(1 << 64) - 5)),
            ("codec", self.put_block, (), dict(codec=77)), ("rate", self.put_block, (), dict(rate=65)),
            ("q", attend, (), dict(q=q.tobytes()[:-4])), ("q", attend, (), dict(q=b"")),
            ("query_heads", attend, (), dict(query_heads=HEADS + 1)), ("queries", attend, (), dict(queries=0)),
            ("queries", attend, (), dict(queries=0xFFFFFFFF)), ("first_layer", attend, (), dict(first_layer=LAYERS)),
            ("layers", attend, (), dict(layers=LAYERS + 1)), ("scale", attend, (), dict(scale=float("nan"))),
            ("q", attend, (), dict(q=np.full_like(q, np.inf).tobytes())),
            ("first_layer", c.get, (spec, [key(3)]), dict(first_layer=LAYERS)),
            ("layers", c.get, (spec, [key(3)]), dict(layers=LAYERS + 1)),
            ("first_head", c.get, (spec, [key(3)]), dict(first_head=HEADS)),
            ("heads", c.get, (spec, [key(3)]), dict(first_head=1, heads=0xFFFFFFFF)),
            ("budget", c.fold, (spec, [key(3)], 0), {}), ("budget", c.fold, (spec, [key(3)], 200), {}),
            ("ttl_ms", c.pin, (spec, [key(3)], 0), {}), ("ttl_ms", c.pin, (spec, [key(3)], 3600001), {}),
        ]
        for field, call, args, changes in cases:
            with self.subTest(f"{field} {call.__name__} {list(changes)} {args[1:]}"):
                self.refused(Code.INVALID_ARGUMENT, field, call, *args, **changes)

    def test_blocks_that_do_not_follow_one_another_do_not_fold(self):
        for number in (5, 6):
            self.client.put(self.spec_id, key(number), payload(number), TOKENS, position=TOKENS * number)
        self.refused(Code.INVALID_ARGUMENT, "position", self.client.fold, self.spec_id, [key(6), key(5)], 20000)

    def test_zero_and_absurd_dimensions(self):
        huge = 0xFFFFFFFF
        cases = [("layers", 0), ("layers", 1025), ("layers", huge), ("kv_heads", 0), ("kv_heads", 1025), ("kv_heads", huge),
                 ("key_dim", 0), ("key_dim", 4), ("key_dim", 65), ("key_dim", 1032), ("key_dim", huge), ("value_dim", 7),
                 ("value_dim", huge), ("block_tokens", 65537), ("block_tokens", huge), ("dtype", 0), ("dtype", 9),
                 ("codec", 9), ("rate", 1), ("rate", 65), ("rate", huge), ("tp_rank", 1), ("model", ""), ("model", "x" * 257),
                 ("tenant", "t" * 65)]
        for field, value in cases:
            with self.subTest(f"{field} {str(value)[:12]}"):
                self.refused(Code.INVALID_ARGUMENT, "spec." + field, self.open, **{field: value})
        with self.subTest("all at their limit"):
            self.refused(Code.INVALID_ARGUMENT, "spec.", self.open, layers=1024, kv_heads=1024, key_dim=1024, value_dim=1024,
                         block_tokens=65536)
        with self.subTest("no spec"):
            self.refused(Code.INVALID_ARGUMENT, "spec", self.client.unary, "Open", pb.OpenRequest(), pb.OpenResponse)

    def test_too_many_specs(self):
        with Daemon(max_specs=4) as daemon, Client(daemon.target) as client:
            for number in range(4):
                client.open(**{**SPEC, "model": str(number)})
            self.assert_error(Code.RESOURCE_EXHAUSTED, "spec", client.open, **{**SPEC, "model": "one more"})
            client.open(**{**SPEC, "model": "0"})

    # ---- numbers ----

    def test_nan_and_infinity_in_keys_and_values(self):
        for codec in (pb.CODEC_RAW, pb.CODEC_DENSE8, pb.CODEC_DENSE4, pb.CODEC_BALANCE):
            for which, value in (("k", np.nan), ("v", np.inf), ("k", -np.inf), ("v", np.nan)):
                k, v = tensors(1)
                (k if which == "k" else v)[1, 1, 77, 5] = value
                with self.subTest(f"codec {codec}, {value} in {which}"):
                    data = record.payload(k, v, record.BF16)
                    self.refused(Code.INVALID_ARGUMENT, "layer 1", self.put_block, data, codec=codec)
        self.assertEqual(self.client.lookup(self.spec_id, [key(1)]).prefix, 0)

    def test_wrong_checksum(self):
        self.refused(Code.INVALID_ARGUMENT, "checksum", self.put_block, checksum=1, has_checksum=True)
        self.refused(Code.INVALID_ARGUMENT, "checksum", self.put_block, checksum=1, has_checksum=True, codec=pb.CODEC_RAW)

    # ---- messages ----

    def test_truncated_message(self):
        spec = pb.OpenRequest(spec=pb.Spec(**SPEC)).SerializeToString()
        lookup = pb.LookupRequest(spec_id=self.spec_id, keys=[key(1)]).SerializeToString()
        cuts = [("Open", pb.OpenResponse, spec[:cut]) for cut in (1, 2, len(spec) // 2, len(spec) - 1)]
        for method, reply, raw in (*cuts, ("Lookup", pb.LookupResponse, lookup[:-1])):
            with self.subTest(f"{method} cut to {len(raw)}"):
                self.refused(Code.INVALID_ARGUMENT, "request", self.client.unary, method, None, reply, raw=raw)
        put = pb.PutRequest(block=self.blocks(), data=payload(1)).SerializeToString()
        for cut in (1, 30, len(put) - 1):
            with self.subTest(f"Put cut to {cut}"):
                self.refused(Code.INVALID_ARGUMENT, "request", self.client.put_stream, [put[:cut]], raw=True)

    def test_bytes_that_are_no_message(self):
        noise = np.random.default_rng(1).integers(0, 256, 5000, np.uint8).tobytes()
        for raw in (b"\xff" * 40, b"\x00", b"\x0b\x0b\x0b", noise):
            for method, reply in (("Open", pb.OpenResponse), ("Attend", pb.AttendResponse), ("Lookup", pb.LookupResponse)):
                with self.subTest(f"{method} {raw[:4]}"):
                    self.refused(Code.INVALID_ARGUMENT, "request", self.client.unary, method, None, reply, raw=raw)
            with self.subTest(f"Put {raw[:4]}"):
                self.refused(Code.INVALID_ARGUMENT, "request", self.client.put_stream, [raw], raw=True)

    def test_oversized_message(self):
        """gRPC itself answers this one, with its own words and both sizes; the log line is the daemon's."""
        first, large = (pb.PutRequest(block=self.blocks(), data=bytes(n)).SerializeToString() for n in (1, MESSAGE))
        lookup = (self.client.unary, "Lookup", None, pb.LookupResponse)
        for call, args, options in (("Lookup", lookup, dict(raw=bytes(MESSAGE + 1))),
                                    ("Put", (self.client.put_stream, [large]), dict(raw=True)),
                                    ("Put, later", (self.client.put_stream, [first, large]), dict(raw=True))):
            with self.subTest(call):
                self.quiet()
                self.assert_error(Code.RESOURCE_EXHAUSTED, "larger than max", *args, **options)
                self.one_line("RESOURCE_EXHAUSTED", text="max_message")
                self.unchanged()

    def test_oversized_block_and_batch(self):
        big = self.open(model="big", layers=64, kv_heads=16, codec=pb.CODEC_RAW)
        size = 64 * 16 * TOKENS * (KEY_DIM + VALUE_DIM) * 2
        block = pb.PutBlock(spec_id=big, key=key(1), tokens=TOKENS, payload_bytes=size)
        self.refused(Code.RESOURCE_EXHAUSTED, "payload_bytes", self.client.put_stream, [pb.PutRequest(block=block)])
        for call in (self.client.lookup, self.client.get, self.client.drop):
            with self.subTest(call.__name__):
                self.refused(Code.RESOURCE_EXHAUSTED, "keys", call, self.spec_id, [key(n) for n in range(BATCH + 1)])

    def test_block_larger_than_a_slab(self):
        big = self.open(model="slab", layers=40, kv_heads=10, codec=pb.CODEC_RAW)
        data = bytes(40 * 10 * TOKENS * (KEY_DIM + VALUE_DIM) * 2)
        self.assertTrue(8 << 20 < len(data) < BLOCK)
        self.refused(Code.RESOURCE_EXHAUSTED, "slab", self.client.put, big, key(1), data, TOKENS)

    def test_compressed_message(self):
        """The daemon takes no compressed messages, a few bytes of which may unfold to gigabytes; it says so."""
        call = self.client.channel.unary_unary(wire.SERVICE + "Lookup", pb.LookupRequest.SerializeToString,
                                               pb.LookupResponse.FromString)
        request = pb.LookupRequest(spec_id=self.spec_id, keys=[key(1)] * 60)
        self.refused(Code.UNIMPLEMENTED, "compress", call, request, timeout=5, compression=grpc.Compression.Gzip)

    # ---- streams ----

    def test_data_before_any_block(self):
        self.refused(Code.INVALID_ARGUMENT, "block", self.client.put_stream, [pb.PutRequest(data=b"xx")])

    def test_nothing_asked_is_nothing_done(self):
        self.quiet()
        self.assertEqual(len(self.client.put_stream([]).results), 0)
        self.assertEqual(self.client.get(self.spec_id, []), [])
        self.assertEqual(self.client.lookup(self.spec_id, []).prefix, 0)
        self.assertEqual(self.client.drop(self.spec_id, []), 0)
        self.unchanged()

    def test_next_block_before_the_last_is_complete(self):
        messages = [pb.PutRequest(block=self.blocks(), data=payload(1)[:100]), pb.PutRequest(block=self.blocks(key=key(2)))]
        self.refused(Code.INVALID_ARGUMENT, "payload_bytes", self.client.put_stream, messages)

    def test_stream_that_ends_within_a_block(self):
        for codec in (pb.CODEC_RAW, pb.CODEC_BALANCE):
            messages = [pb.PutRequest(block=self.blocks(codec=codec), data=payload(1)[:-1])]
            self.refused(Code.INVALID_ARGUMENT, "payload_bytes", self.client.put_stream, messages)
        self.assertEqual(self.client.lookup(self.spec_id, [key(1)]).prefix, 0)

    def cut(self, end, *statuses):
        """A stream that stays open within a block, until end(call) cuts it."""
        for codec in (pb.CODEC_RAW, pb.CODEC_BALANCE):
            self.quiet()
            client, hold = self.connect(), threading.Event()

            def messages():
                yield pb.PutRequest(block=self.blocks(codec=codec), data=payload(1)[:SIZE // 2])
                hold.wait(10)

            call = client.channel.stream_unary(wire.SERVICE + "Put", pb.PutRequest.SerializeToString,
                                               pb.PutResponse.FromString).future(messages(), timeout=10)
            eventually(lambda: self.gauges(*QUIET) != self.before, "the block has begun")
            end(client, call)
            self.one_line(*statuses)
            hold.set()
            self.unchanged()
        self.assertEqual(self.client.lookup(self.spec_id, [key(1)]).prefix, 0)

    def test_stream_cut_by_cancelling(self):
        self.cut(lambda client, call: call.cancel(), "CANCELLED")

    def test_stream_cut_by_closing_the_connection(self):
        self.cut(lambda client, call: client.close(), "CANCELLED")

    def test_stream_cut_by_a_client_that_is_killed(self):
        self.quiet()
        script = ("import sys, time; sys.path.insert(0, sys.argv[1])\n"
                  "from support.wire import Client, pb\n"
                  "def messages():\n"
                  "    yield pb.PutRequest(block=pb.PutBlock.FromString(bytes.fromhex(sys.argv[3])), data=bytes(999))\n"
                  "    time.sleep(30)\n"
                  "Client(sys.argv[2]).put_stream(messages(), timeout=30)\n")
        folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
        child = subprocess.Popen([sys.executable, "-c", script, folder, self.daemon.target,
                                  self.blocks().SerializeToString().hex()])
        self.addCleanup(child.wait)
        eventually(lambda: self.gauges(*QUIET) != self.before, "the block has begun", 15)
        child.send_signal(signal.SIGKILL)
        self.one_line("CANCELLED")
        self.unchanged()

    def test_one_bad_block_leaves_those_before_it(self):
        good, bad = self.blocks(key=key(7)), self.blocks(key=key(8), tokens=1)
        messages = [*wire.put_messages(good, payload(7)), *wire.put_messages(bad, payload(8))]
        error = self.assert_error(Code.INVALID_ARGUMENT, "payload_bytes", self.client.put_stream, messages)
        self.one_line("INVALID_ARGUMENT", error=error)
        eventually(lambda: list(self.client.lookup(self.spec_id, [key(7), key(8)]).states) == [1, 0], "the first block stays")

    # ---- lengths that lie ----

    def test_more_data_than_payload_bytes_says(self):
        for extra in (b"x", payload(2)):
            messages = [pb.PutRequest(block=self.blocks(), data=payload(1) + extra)]
            self.refused(Code.INVALID_ARGUMENT, "payload_bytes", self.client.put_stream, messages)

    def test_field_length_that_lies(self):
        """Protobuf: a `data` field that says to be longer than its message."""
        block = pb.PutRequest(block=self.blocks()).SerializeToString()
        for said in (b"\x7a\x64", b"\x7a\xff\xff\xff\xff\x0f", b"\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"):
            self.refused(Code.INVALID_ARGUMENT, "request", self.client.put_stream, [block + said + b"short"], raw=True)

    def test_frame_length_that_lies(self):
        """HTTP/2: a gRPC frame that says 1,000 bytes, of which 10 come before the stream ends; sent by hand."""
        self.quiet()
        path = b"/balancekv.v1.BalanceKV/Lookup"
        text = lambda value: bytes([len(value)]) + value
        head = (b"\x83\x86" + b"\x04" + text(path) + b"\x01" + text(b"localhost") +
                b"\x00" + text(b"content-type") + text(b"application/grpc") + b"\x00" + text(b"te") + text(b"trailers"))
        data = b"\x00" + struct.pack(">I", 1000) + bytes(10)
        frame = lambda kind, flags, stream, body: struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(
            ">I", stream) + body
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(5)
            raw.connect(self.daemon.socket)
            raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, head) + frame(0, 1, 1, data))
            self.assertTrue(raw.recv(100))
            self.one_line("INVALID_ARGUMENT", "CANCELLED", "RESOURCE_EXHAUSTED")
        self.unchanged()

    def test_bytes_that_are_not_http2(self):
        for noise in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 64, b""):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.settimeout(5)
                raw.connect(self.daemon.socket)
                try:
                    raw.sendall(noise)
                    raw.recv(100)
                except OSError:
                    pass
        self.unchanged()

    # ---- the same again ----

    def test_duplicate_put_keeps_the_first(self):
        first = self.client.put(self.spec_id, key(20), payload(20), TOKENS).results[0]
        self.quiet()
        before = self.client.get(self.spec_id, [key(20)])
        for data in (payload(20), payload(21)):
            again = self.client.put(self.spec_id, key(20), data, TOKENS).results[0]
            self.assertTrue(again.duplicate)
            self.assertEqual(again.stored_bytes, first.stored_bytes)
        self.assertEqual(self.client.get(self.spec_id, [key(20)]), before)
        self.unchanged()
        self.assertEqual(len(self.failures()), self.lines, "a duplicate is a success")

    def test_duplicate_puts_at_the_same_time(self):
        results, clients = [], [self.connect() for _ in range(8)]

        def put(client):
            results.append(client.put(self.spec_id, key(22), payload(22), TOKENS, codec=pb.CODEC_RAW).results[0].duplicate)

        threads = [threading.Thread(target=put, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        self.assertEqual(sorted(results), [False] + [True] * 7)
        self.assertTrue(self.client.get(self.spec_id, [key(22)])[0].endswith(payload(22)))
        eventually(lambda: self.gauges("entries")["entries"] == self.before["entries"] + 1, "one record")

    # ---- time ----

    def test_expired_deadline(self):
        """The client's deadline passes within a block; the daemon ends the call by itself, too."""
        def messages():
            yield pb.PutRequest(block=self.blocks(), data=payload(1)[:100])
            time.sleep(4)

        self.quiet()
        self.assert_error(Code.DEADLINE_EXCEEDED, "", self.client.put_stream, messages(), timeout=1.5)
        self.one_line("DEADLINE_EXCEEDED", text="deadline")
        self.unchanged()

    def test_call_without_a_deadline_ends_all_the_same(self):
        hold = threading.Event()

        def messages():
            yield pb.PutRequest(block=self.blocks(), data=payload(1)[:100])
            hold.wait(3 * OP_TIMEOUT_S)

        self.quiet()
        started = time.monotonic()
        self.assert_error(Code.DEADLINE_EXCEEDED, "deadline", self.client.put_stream, messages(), timeout=None)
        hold.set()
        self.assertTrue(OP_TIMEOUT_S - 1 < time.monotonic() - started < 2 * OP_TIMEOUT_S)
        self.one_line("DEADLINE_EXCEEDED", text="deadline")
        self.unchanged()

    def test_client_that_stops_reading(self):
        """Far more than sockets and windows hold is asked for and not read."""
        large = self.open(model="stops", layers=20, kv_heads=8, codec=pb.CODEC_RAW)
        data = bytes(20 * 8 * TOKENS * (KEY_DIM + VALUE_DIM) * 2)
        self.client.put(large, key(1), data, TOKENS)
        self.quiet()
        rss = self.daemon.rss()
        sleeper = self.connect()
        stream = sleeper.records("Get", pb.GetRequest(spec_id=large, keys=[key(1)] * BATCH), timeout=4)
        time.sleep(2)
        self.assertLess(self.daemon.rss() - rss, 32 << 20, "what is not read is not buffered")
        self.assertEqual(self.client.lookup(large, [key(1)]).prefix, 1)
        self.one_line("DEADLINE_EXCEEDED", text="deadline")
        self.assert_error(Code.DEADLINE_EXCEEDED, "", lambda: list(stream))
        self.unchanged()


if __name__ == "__main__":
    run()
