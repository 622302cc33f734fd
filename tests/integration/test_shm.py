"""Shared memory, from a stock gRPC client with nothing but socket and mmap: what goes by place is what goes by messages, byte for
byte; what a place may name; and that a hostile client harms itself alone."""
import ctypes
import fcntl
import os
import threading

from harness import Case, Client, Code, HEADS, LAYERS, TOKENS, eventually, grpc, key, payload, pb, record, run
from support import window as shm
from support.window import Connection, Window, attach, detach

WINDOW = 4 << 20
RAW = payload(1)
LARGE = dict(layers=16, heads=8)
LARGE_RAW = payload(2, **LARGE)  # its record is copied by a compute thread, smaller ones by gRPC's
RECORDS = 4 << 20  # offset of a window's second half
F_ADD_SEALS, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, KEEP_SIZE, PUNCH_HOLE = 1033, 8, 16, 1, 2


class ShmCase(Case):
    def window(self, size=WINDOW, client=None):
        """Of the test's client, or of another's."""
        one = Window(client or self.client, self.daemon.socket, size)
        self.addCleanup(one.close)
        return one

    def large(self, **changes):
        return self.open(model="large", layers=LARGE["layers"], kv_heads=LARGE["heads"], **changes)


class Moves(ShmCase):
    def test_offered_to_local_peers_alone(self):
        answers = [self.client.open(**dict(model="offered", layers=1, kv_heads=1, key_dim=8, dtype=pb.DTYPE_BF16)).transports,
                   self.client.stats()[""].transports]
        for names in answers:
            self.assertIn("shm", names)
            self.assertEqual(names[-1], "inline")
        with Client(f"127.0.0.1:{self.daemon.port()}") as remote:
            self.assertNotIn("shm", remote.stats()[""].transports)
            self.assert_error(Code.UNIMPLEMENTED, "shm", attach, remote, WINDOW)

    def test_a_block_by_place_is_the_block_by_messages(self):
        window = self.window()
        for codec in (pb.CODEC_RAW, pb.CODEC_DENSE8, pb.CODEC_DENSE4, pb.CODEC_BALANCE):
            with self.subTest(codec=codec):
                spec_id = self.open(model=f"same-{codec}", codec=codec)
                reply = window.put(spec_id, key(1), RAW, TOKENS, offset=192)
                self.assertFalse(reply.results[0].duplicate)
                by_place = self.client.get(spec_id, [key(1)])[0]
                self.assertEqual(reply.results[0].stored_bytes, len(by_place))
                self.client.drop(spec_id, [key(1)])
                self.client.put(spec_id, key(1), RAW, TOKENS)
                self.assertEqual(self.client.get(spec_id, [key(1)])[0], by_place)
                (placed, offset), = window.get(spec_id, [key(1)], offset=64)
                self.assertEqual((placed, offset), (by_place, 64))
                if codec == pb.CODEC_RAW:
                    self.assertTrue(placed.endswith(RAW))

    def test_several_blocks_of_one_call_by_place_and_by_messages(self):
        spec_id, window = self.open(model="mixed", codec=pb.CODEC_RAW), self.window()
        parts = [payload(n) for n in range(6)]
        requests, at = [], 0
        for number, data in enumerate(parts):
            block = pb.PutBlock(spec_id=spec_id, key=key(number), tokens=TOKENS, payload_bytes=len(data))
            if number % 2 == 0:
                window.memory[at:at + len(data)] = data
                block.place.CopyFrom(window.place(at, len(data)))
                at += -(-len(data) // 64) * 64
                requests.append(pb.PutRequest(block=block))
            else:
                requests += [pb.PutRequest(block=block), pb.PutRequest(data=data)]
        reply = self.client.put_stream(requests)
        self.assertEqual([result.key for result in reply.results], [key(n) for n in range(6)])
        for number, got in enumerate(self.client.get(spec_id, [key(n) for n in range(6)])):
            self.assertTrue(got.endswith(parts[number]), f"block {number}")

    def test_records_are_packed_one_after_the_other(self):
        spec_id, large_id, window = self.open(model="packed"), self.large(), self.window()
        for number in range(5):
            window.put(spec_id, key(number), payload(number), TOKENS)
        window.put(large_id, key(9), LARGE_RAW, TOKENS, codec=pb.CODEC_RAW)
        keys = [key(n) for n in range(5)]
        inline = self.client.get(spec_id, keys)
        window.memory[:] = b"\xee" * window.bytes
        placed = window.get(spec_id, keys, offset=128)
        self.assertEqual([data for data, _ in placed], inline)
        at = 128
        for data, offset in placed:
            self.assertEqual(offset, at)
            end = -(-(at + len(data)) // 64) * 64
            self.assertEqual(window.memory[at + len(data):end], b"\xee" * (end - at - len(data)), "no more than the record")
            at = end
        self.assertEqual(window.memory[at:], b"\xee" * (window.bytes - at))
        self.assertEqual(window.memory[:128], b"\xee" * 128)
        (data, offset), = window.get(large_id, [key(9)])
        self.assertEqual(offset, 0)
        self.assertTrue(data.endswith(LARGE_RAW))

    def test_slices_folds_and_bands(self):
        spec_id, window = self.open(model="fold", codec=pb.CODEC_DENSE8), self.window()
        keys = [key(n) for n in range(4)]
        for number, name in enumerate(keys):
            window.put(spec_id, name, payload(number), TOKENS, position=number * TOKENS)
        some = dict(first_layer=1, layers=LAYERS - 1, first_head=1, heads=HEADS - 1)
        self.assertEqual([data for data, _ in window.get(spec_id, keys, **some)], self.client.get(spec_id, keys, **some))
        (folded, offset), = window.fold(spec_id, keys, budget_bytes=40000)
        self.assertEqual(offset, 0)
        self.assertEqual(folded, self.client.fold(spec_id, keys, 40000))
        bands = [pb.Band(age=TOKENS, rate=4), pb.Band(age=0, rate=16)]
        placed = window.fold(spec_id, keys, profile=bands)
        self.assertGreater(len(placed), 1)
        self.assertTrue(all(at is not None for _, at in placed))
        self.assertEqual([data for data, _ in placed], self.client.bands(spec_id, keys, [(TOKENS, 4), (0, 16)]))
        self.assertEqual(self.client.stats()["pinned"], 0)

    def test_what_does_not_fit_comes_as_data(self):
        spec_id, window = self.open(model="small", codec=pb.CODEC_RAW), self.window(size=131072)
        self.assertEqual(window.bytes, 131072)
        self.assertGreater(len(RAW), window.bytes)
        self.client.put(spec_id, key(1), RAW, TOKENS)
        self.client.put(spec_id, key(2), RAW, TOKENS, codec=pb.CODEC_DENSE4)
        self.client.put(spec_id, key(3), RAW, TOKENS, codec=pb.CODEC_DENSE4)
        keys = [key(2), key(1), key(3)]
        inline = self.client.get(spec_id, keys)
        self.assertLess(len(inline[0]) + len(inline[2]) + 64, window.bytes)
        placed = window.get(spec_id, keys)
        self.assertEqual([data for data, _ in placed], inline)
        self.assertEqual([at is not None for _, at in placed], [True, False, True], "the middle one has no room")
        self.assertEqual([data for data, at in window.get(spec_id, keys, size=0)], inline)
        exact = window.get(spec_id, [key(2)], offset=64, size=len(inline[0]))
        self.assertEqual(exact, [(inline[0], 64)])
        self.assertEqual(window.get(spec_id, [key(2)], offset=64, size=len(inline[0]) - 1), [(inline[0], None)])

    def test_missing_keys_take_no_room(self):
        spec_id, window = self.open(model="missing"), self.window()
        window.put(spec_id, key(1), RAW, TOKENS)
        window.put(spec_id, key(3), RAW, TOKENS)
        request = pb.GetRequest(spec_id=spec_id, keys=[key(0), key(1), key(2), key(3)], place=window.place(0, window.bytes))
        codes, error = {}, None
        try:
            for chunk in self.client.records("Get", request):
                codes[chunk.index] = chunk.code or chunk.place_offset
        except grpc.RpcError as caught:
            error = caught
        self.assert_status(error, Code.NOT_FOUND, "keys[0]")
        length = len(self.client.get(spec_id, [key(1)])[0])
        self.assertEqual(codes, {0: 5, 1: 0, 2: 5, 3: -(-length // 64) * 64})

    def test_checksums_are_verified(self):
        spec_id, window = self.open(model="sum", codec=pb.CODEC_RAW), self.window()
        good = record.xxh3(RAW)
        self.assert_error(Code.INVALID_ARGUMENT, "block[0].checksum", window.put, spec_id, key(1), RAW, TOKENS, has_checksum=True,
                          checksum=good ^ 1)
        self.assertEqual(self.client.lookup(spec_id, [key(1)]).prefix, 0)
        window.put(spec_id, key(1), RAW, TOKENS, has_checksum=True, checksum=good)
        self.assertTrue(window.put(spec_id, key(1), b"\xff" * len(RAW), TOKENS).results[0].duplicate, "the first one wins")
        self.assertTrue(self.client.get(spec_id, [key(1)])[0].endswith(RAW))

    def test_two_clients_at_once(self):
        spec_ids = [self.open(model=f"two-{n}", codec=pb.CODEC_RAW) for n in range(2)]
        wrong = []

        def work(number):
            with Client(self.daemon.target) as client:
                window = Window(client, self.daemon.socket, WINDOW)
                try:
                    for turn in range(40):
                        data = payload(100 * number + turn % 5)
                        window.put(spec_ids[number], key(turn), data, TOKENS, offset=turn % 3 * (1 << 20))
                        (got, at), = window.get(spec_ids[number], [key(turn)], offset=3 << 20)
                        if at != 3 << 20 or not got.endswith(data):
                            wrong.append((number, turn))
                finally:
                    window.close()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(wrong, [])


class Refused(ShmCase):
    def test_places_that_are_not_ones(self):
        spec_id, window = self.open(model="refused", codec=pb.CODEC_RAW), self.window()
        session, size = window.session, len(RAW)
        last = (window.bytes - size) // 64 * 64
        other = bytes(16)
        payloads = [
            (Code.INVALID_ARGUMENT, "place.session", pb.Place()),
            (Code.INVALID_ARGUMENT, "place.session", pb.Place(session=session[:15])),
            (Code.INVALID_ARGUMENT, "place.session", pb.Place(session=session + b"x")),
            (Code.FAILED_PRECONDITION, "place.session", pb.Place(session=other)),
            (Code.INVALID_ARGUMENT, "place.offset", window.place(1)),
            (Code.INVALID_ARGUMENT, "place.offset", window.place(32)),
            (Code.INVALID_ARGUMENT, "place.offset", window.place(window.bytes + 64)),
            (Code.INVALID_ARGUMENT, "place.offset", window.place(2 ** 64 - 64)),
            (Code.INVALID_ARGUMENT, "place.offset", window.place((2 ** 64 - size) // 64 * 64)),
            (Code.INVALID_ARGUMENT, "place.offset", window.place(2 ** 63, size)),
            (Code.INVALID_ARGUMENT, "place.bytes", window.place(window.bytes)),
            (Code.INVALID_ARGUMENT, "place.bytes", window.place(last + 64)),
            (Code.INVALID_ARGUMENT, "place.bytes", window.place(0, size - 1)),
            (Code.INVALID_ARGUMENT, "place.bytes", window.place(0, 2 ** 64 - 1)),
            (Code.INVALID_ARGUMENT, "place.event", pb.Place(session=session, event=bytes(64))),
            (Code.INVALID_ARGUMENT, "place.layout", pb.Place(session=session, layout=pb.DeviceLayout(
                keys=[0] * LAYERS, values=[0] * LAYERS, token_stride=128, head_stride=128 * TOKENS))),
        ]
        for number, (code, field, place) in enumerate(payloads):
            with self.subTest(put=number):
                self.assert_error(code, field, window.put_there, spec_id, key(1), size, TOKENS, place)
        self.assertEqual(self.client.lookup(spec_id, [key(1)]).prefix, 0)
        window.put(spec_id, key(1), RAW, TOKENS, offset=last)
        rooms = [
            (Code.INVALID_ARGUMENT, "place.session", pb.Place(bytes=64)),
            (Code.FAILED_PRECONDITION, "place.session", pb.Place(session=other, bytes=64)),
            (Code.INVALID_ARGUMENT, "place.offset", window.place(63, 64)),
            (Code.INVALID_ARGUMENT, "place.", window.place(2 ** 64 - 64, 128)),
            (Code.INVALID_ARGUMENT, "place.bytes", window.place(0, window.bytes + 1)),
            (Code.INVALID_ARGUMENT, "place.bytes", window.place(64, 2 ** 64 - 64)),
            (Code.INVALID_ARGUMENT, "place.bytes", window.place(64, window.bytes)),
        ]
        for number, (code, field, room) in enumerate(rooms):
            with self.subTest(get=number):
                self.assert_error(code, field, self.client.get, spec_id, [key(1)], place=room)
                self.assert_error(code, field, self.client.fold, spec_id, [key(1)], 30000, place=room)
        self.assertEqual(len(window.get(spec_id, [key(1)])), 1, "none of it harmed the session")
        self.assertEqual(self.client.stats()["pinned"], 0)

    def test_a_place_and_data_are_one_too_many(self):
        spec_id, window = self.open(model="both", codec=pb.CODEC_RAW), self.window()
        block = pb.PutBlock(spec_id=spec_id, key=key(1), tokens=TOKENS, payload_bytes=len(RAW), place=window.place())
        self.assert_error(Code.INVALID_ARGUMENT, "data", self.client.put_stream, [pb.PutRequest(block=block, data=b"x")])
        self.assert_error(Code.INVALID_ARGUMENT, "data", self.client.put_stream,
                          [pb.PutRequest(block=block), pb.PutRequest(data=RAW)])
        self.assertEqual(self.client.stats()["staging_bytes"], 0)

    def test_attach_and_detach(self):
        for size in (0, 1, 65535):
            self.assert_error(Code.INVALID_ARGUMENT, "shm.bytes", attach, self.client, size)
        for request in (pb.AttachRequest(), pb.AttachRequest(shm=pb.ShmWindow(bytes=WINDOW), verbs=pb.VerbsWindow())):
            self.assert_error(Code.INVALID_ARGUMENT, "", attach, self.client, 0, raw=request)
        reply = attach(self.client, 2 ** 64 - 1)
        self.assertEqual(reply.bytes, 256 << 20, "transport.shm_window")
        self.assertEqual(reply.idle_ms, 300000)
        self.assertEqual(len(reply.session), 16)
        detach(self.client, reply.session)
        self.assert_error(Code.FAILED_PRECONDITION, "session", detach, self.client, reply.session)
        self.assert_error(Code.INVALID_ARGUMENT, "session", detach, self.client, b"short")
        connection = Connection(self.daemon.socket)
        self.assertEqual(connection.ask(shm.TAKE, reply.session).status, Code.FAILED_PRECONDITION.value[0])
        self.assertIsNone(connection.receive(), "and closes")
        connection.close()

    def test_all_that_is_shared(self):
        sessions = [attach(self.client, 256 << 20).session for _ in range(4)]  # transport.shm = 1G
        self.assert_error(Code.RESOURCE_EXHAUSTED, "transport.shm", attach, self.client, 65536)
        for session in sessions:
            detach(self.client, session)
        self.assertEqual(self.client.stats()["shm_window_bytes"], 0)


class Idle(ShmCase):
    options = dict(idle="500ms", max_sessions="3", shm="16M", shm_window="8M")

    def test_sessions_that_nobody_uses_end(self):
        window, idle = self.window(), attach(self.client, 65536).session
        self.assertEqual(attach(self.client, 65536).idle_ms, 500)
        self.assert_error(Code.RESOURCE_EXHAUSTED, "max_sessions", attach, self.client, 65536)
        eventually(lambda: self.client.stats()["sessions"] == 1, "all but the held one end")
        self.assertEqual(self.client.stats()["sessions_idle_total"], 2)
        self.assert_error(Code.FAILED_PRECONDITION, "session", detach, self.client, idle)
        spec_id = self.open()
        window.put(spec_id, key(1), RAW, TOKENS)
        detach(self.client, window.session)
        self.assert_error(Code.FAILED_PRECONDITION, "place.session", window.put, spec_id, key(2), RAW, TOKENS)
        self.assertIsNone(window.connection.receive(), "whose session has ended is disconnected")
        self.assertEqual(self.client.stats()["sessions_lost_total"], 0)


class Hostile(ShmCase):
    def test_a_window_that_changes_while_it_is_read(self):
        """Every record is some state of the window that was looked at once: its checksum holds and the daemon lives."""
        spec_id, window = self.large(codec=pb.CODEC_RAW), self.window(8 << 20)
        size, ending, numbers = len(LARGE_RAW), threading.Event(), [b"\x80\x3f" * 4096, b"\x00\x40" * 4096, b"\x40\x40" * 4096]
        window.memory[:size] = LARGE_RAW

        def scribble():
            turn = 0
            while not ending.is_set():
                at = turn * 77777 % (size - 8192) & ~1
                window.memory[at:at + 8192] = window.memory[RECORDS + at:RECORDS + at + 8192] = numbers[turn % 3]
                turn += 1

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            for number in range(30):
                codec = (pb.CODEC_RAW, pb.CODEC_RAW, pb.CODEC_DENSE8)[number % 3]
                window.put_there(spec_id, key(number), size, TOKENS, window.place(), codec=codec)
                got = self.client.get(spec_id, [key(number)])[0]
                self.assertEqual(record.Record(got).key, key(number))  # which verifies the checksum
                (_, at), = window.get(spec_id, [key(number)], offset=RECORDS)
                self.assertEqual(at, RECORDS, "into a window that it writes to")
        finally:
            ending.set()
            thread.join(10)
        self.assertEqual(self.client.stats()["corrupt_total"], 0)

    def test_a_window_keeps_its_size_and_its_daemon(self):
        spec_id, window = self.open(model="size", codec=pb.CODEC_RAW), self.window()
        for size in (0, 4096, window.bytes - 4096, window.bytes + 4096):
            with self.assertRaises(PermissionError):
                os.ftruncate(window.fd, size)
        for seal in (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE):
            with self.assertRaises(PermissionError):
                fcntl.fcntl(window.fd, F_ADD_SEALS, seal)
        window.memory[:len(RAW)] = RAW
        fallocate = ctypes.CDLL(None).fallocate
        self.assertEqual(fallocate(window.fd, KEEP_SIZE | PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(window.bytes)), 0)
        window.put_there(spec_id, key(1), len(RAW), TOKENS, window.place())
        self.assertTrue(self.client.get(spec_id, [key(1)])[0].endswith(bytes(len(RAW))), "pages given back read as zeros")

    def test_nothing_of_others_is_in_reach(self):
        """A window is a file of its own: not the arena, not another's, and nothing that was there before."""
        spec_id, secret = self.open(model="secret", codec=pb.CODEC_RAW), b"\x11\x3f" * 8192
        first = self.window()
        first.memory[:len(secret)] = secret
        second = self.window()
        self.assertNotEqual(os.fstat(first.fd).st_ino, os.fstat(second.fd).st_ino)
        self.assertEqual(second.memory[:], bytes(second.bytes))
        first.put(spec_id, key(1), RAW, TOKENS)
        second.put(spec_id, key(2), payload(5), TOKENS)
        self.assertEqual(second.memory.find(secret[:64]), -1)
        first.close()
        eventually(lambda: self.client.stats()["sessions"] == 1, "the first one's session ends")
        self.assertEqual(self.window().memory[:], bytes(WINDOW), "a new window is empty")
        self.assertIsNone(second.connection.ask(shm.TAKE, first.session), "a connection has one session, and asks once")


if __name__ == "__main__":
    run()
