"""What may go wrong at the other end of a connection, or between: each costs the requests under way at most. No call outlives its
deadline, others are served, no wrong byte comes, and nothing stays behind (VerbsCase looks after each test).
"""
import math
import subprocess
import threading
import time

from guest import BLOCK, SPEC, TOKENS, Client, VerbsCase, built, content, eventually, key, native, pb, resources, run
from harness import Code, Daemon, grpc
from support import wire

DEADLINE_S = 8
GRACE_S = 3  # of emulated machines
TYPED = (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE, Code.FAILED_PRECONDITION)


class FaultCase(VerbsCase):
    def setUp(self):
        super().setUp()
        self.spec_id = self.client.open(**SPEC).spec_id

    def block(self, name, session, **place):
        """A Put of what lies at the start of the session's window."""
        return pb.PutRequest(block=pb.PutBlock(spec_id=self.spec_id, key=bytes(key(name)), tokens=TOKENS, payload_bytes=BLOCK,
                                               place=pb.Place(session=session, **place)))

    def timed(self, call, *args, **kwargs):
        """The call's status, OK included; it must come by the deadline."""
        start, code = time.monotonic(), Code.OK
        try:
            call(*args, timeout=DEADLINE_S, **kwargs)
        except grpc.RpcError as error:
            code = error.code()
        self.assertLess(time.monotonic() - start, DEADLINE_S + GRACE_S)
        return code

    def put_place(self, name, session, **place):
        return self.timed(self.client.put_stream, [self.block(name, session, **place)])

    def detach(self, session):
        try:
            self.client.unary("Detach", pb.DetachRequest(session=session), pb.DetachResponse)
        except grpc.RpcError as error:
            self.assertEqual(error.code(), Code.FAILED_PRECONDITION)  # it had ended by itself

    def threads(self, ending, work, *arguments):
        """One for each argument; they go on until `ending`, at the latest that of the test."""
        threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
        for thread in threads:
            thread.start()
        self.addCleanup(self.join, ending, threads)
        return threads

    def join(self, ending, threads):
        ending.set()
        for thread in threads:
            thread.join(3 * (DEADLINE_S + GRACE_S))
            self.assertFalse(thread.is_alive())

    def others_are_served(self, first):
        """By RDMA, to the byte."""
        before = self.moved()
        client = self.native()
        client.put_names(first, first + 1)
        client.check(first, first + 1)
        client.drop([key(first), key(first + 1)])
        fetches, deliveries, _ = (now - then for now, then in zip(self.moved(), before))
        # The last puts of a client that was killed may be counted late.
        self.assertTrue(fetches >= 2 and deliveries == 2, (fetches, deliveries))


class Ends(FaultCase):
    """Clients that die, lie or change their mind."""

    def test_killed_in_mid_transfer(self):
        for kill in range(3):
            before = self.moved()
            client = subprocess.Popen([built("bin", "bkv"), "--endpoint", self.address, "bench", "--transport", "verbs",
                                       "--verbs-device", "rxe1", "--parallel", "16", "--blocks", "4096", "--layers", "2"],
                                      stdout=subprocess.DEVNULL)
            try:
                eventually(lambda: client.poll() is not None or self.moved()[0] >= before[0] + 8, "transfers of the client", 20)
                self.assertIsNone(client.poll(), "the client has ended by itself")
            finally:
                client.kill()
                client.wait()
            self.others_are_served(1000 + 10 * kill)

    def test_stale_key(self):
        """A window that is no longer registered, or under another key."""
        peer = self.peer()
        session = peer.attach(self.client).session
        peer.window[:BLOCK] = bytearray(content(1))
        self.assertEqual(self.put_place(1, session), Code.OK)
        self.assertTrue(self.client.get(self.spec_id, [bytes(key(1))])[0].endswith(content(1)))
        for name, word in ((2, "deregister"), (3, "reregister")):
            peer.tell(word)
            self.assertIn(self.put_place(name, session), TYPED)
            self.assertEqual(self.client.lookup(self.spec_id, [bytes(key(name))]).prefix, 0)
        self.detach(session)
        self.others_are_served(1100)

    def test_deregistered_in_mid_transfer(self):
        """Sixteen fetches at once, and the window goes: each is the payload or an error."""
        peer = self.peer()
        session = peer.attach(self.client).session
        peer.window[:BLOCK] = bytearray(content(1))
        put = self.client.channel.stream_unary(wire.SERVICE + "Put", pb.PutRequest.SerializeToString, pb.PutResponse.FromString)
        names = range(20, 36)
        calls = [put.future(iter([self.block(name, session)]), timeout=DEADLINE_S) for name in names]
        eventually(lambda: any(call.done() for call in calls), "the first fetch", DEADLINE_S)
        peer.tell("deregister")
        start = time.monotonic()
        codes = [call.code() for call in calls]
        self.assertLess(time.monotonic() - start, DEADLINE_S + GRACE_S)
        self.assertIn(Code.OK, codes)
        for name, code in zip(names, codes):
            self.assertIn(code, (Code.OK, *TYPED))
            if code == Code.OK:
                self.assertTrue(self.client.get(self.spec_id, [bytes(key(name))])[0].endswith(content(1)))
        self.detach(session)
        self.others_are_served(1200)

    def test_deaf(self):
        """A queue pair that answers nothing any more: fetches and deliveries end by themselves, before the deadline."""
        peer = self.peer()
        session = peer.attach(self.client).session
        self.client.put(self.spec_id, bytes(key(1)), content(1), TOKENS)
        peer.tell("deaf")
        start = time.monotonic()
        self.assertIn(self.put_place(2, session), (Code.UNAVAILABLE, Code.FAILED_PRECONDITION))
        self.assertLess(time.monotonic() - start, DEADLINE_S / 2)
        other = self.peer()
        session = other.attach(self.client).session
        other.tell("deaf")
        place = pb.Place(session=session, bytes=2 * BLOCK)
        records, codes, _, error = self.client.try_get(self.spec_id, [bytes(key(1))], timeout=DEADLINE_S, place=place)
        if error is None:
            self.assertTrue(records[0].endswith(content(1)))  # it came inline instead
        else:
            self.assertIn(error.code(), TYPED, codes)
        self.others_are_served(1300)

    def test_aborted(self):
        """A hundred Puts that are cancelled at any moment, then one that is not."""
        peer = self.peer()
        session = peer.attach(self.client).session
        peer.window[:BLOCK] = bytearray(content(1))
        put = self.client.channel.stream_unary(wire.SERVICE + "Put", pb.PutRequest.SerializeToString, pb.PutResponse.FromString)
        for i in range(100):
            call = put.future(iter([self.block(100 + i, session)]), timeout=DEADLINE_S)
            time.sleep(i % 10 * 0.001)
            call.cancel()
        self.assertEqual(self.put_place(300, session), Code.OK)
        self.assertTrue(self.client.get(self.spec_id, [bytes(key(300))])[0].endswith(content(1)))
        self.detach(session)
        names = [bytes(key(100 + i)) for i in range(100)] + [bytes(key(300))]
        eventually(lambda: self.client.stats()["pinned"] == 0, "no pin is left")
        self.client.drop(self.spec_id, names)

    def test_places_outside(self):
        peer = self.peer()
        session = peer.attach(self.client).session
        end = len(peer.window)
        peer.window[end - BLOCK:] = bytearray(content(1))
        for offset in (end - BLOCK + 64, end, 1 << 63, (1 << 64) - 64, 1):
            self.assertEqual(self.put_place(1, session, offset=offset), Code.INVALID_ARGUMENT, offset)
        self.assertEqual(self.put_place(1, session, offset=end - BLOCK), Code.OK)
        self.assertTrue(self.client.get(self.spec_id, [bytes(key(1))])[0].endswith(content(1)))
        self.client.drop(self.spec_id, [bytes(key(1))])
        self.detach(session)


class Descriptions(FaultCase):
    """What a client says of its end."""

    def test_garbage(self):
        peer = self.peer()
        for field, values in (("queue_pair", (0, 1, 1 << 24, (1 << 32) - 1)), ("packet", (1 << 24,)),
                              ("gid", (b"", bytes(15), bytes(16), bytes(17), b"\xff" * 16)), ("lid", (5,)),
                              ("mtu", (0, 255, 1500, 1 << 31)), ("reads", (256,)), ("bytes", (0, (1 << 64) - 1))):
            for value in values:
                with self.subTest(field=field, value=value):
                    self.assert_error(Code.INVALID_ARGUMENT, "verbs." + field, self.client.unary, "Attach",
                                      peer.offer(**{field: value}), pb.AttachResponse)
        self.assertEqual(resources("rxe0"), self.level["rxe0"])

    def test_lies(self):
        """Well-formed, but not true: the connection comes to nothing, by the deadline."""
        nobody = bytes(10) + b"\xff\xff" + bytes((10, 77, 0, 99))
        for name, lie in enumerate((dict(queue_pair=0xfffff0), dict(gid=nobody), dict(key=1), dict(address=1 << 20))):
            with self.subTest(lie=lie):
                peer, start = self.peer(), time.monotonic()
                try:
                    session = peer.attach(self.client, **lie).session
                    self.assertIn(self.put_place(name, session), TYPED)
                    self.detach(session)
                except grpc.RpcError as error:
                    self.assertEqual(error.code(), Code.FAILED_PRECONDITION)
                self.assertLess(time.monotonic() - start, DEADLINE_S + GRACE_S)
        self.others_are_served(1400)


class Limits(FaultCase):
    options = {**FaultCase.options, "verbs_sessions": "3", "idle": "1m"}

    def test_sessions_are_bounded(self):
        peers = [self.peer() for _ in range(4)]
        sessions = [peer.attach(self.client).session for peer in peers[:3]]
        self.assert_error(Code.RESOURCE_EXHAUSTED, "verbs", self.client.unary, "Attach", peers[3].offer(), pb.AttachResponse)
        self.detach(sessions.pop())
        sessions.append(peers[3].attach(self.client).session)
        for session in sessions:
            self.detach(session)


class Between(FaultCase):
    """The cable."""

    def link(self, state):
        subprocess.run(["ip", "link", "set", "veth0", state], check=True)

    def test_down_and_up(self):
        """The NIC goes while transfers are under way: they end, in success or by the deadline; calls go inline meanwhile, and by
        RDMA again afterwards."""
        self.addCleanup(self.link, "up")
        client, ending, results, down = self.native("auto", timeout_ms=DEADLINE_S * 1000), threading.Event(), [], [math.inf]

        def work(first):
            turn = 0
            while not ending.is_set():
                name, start, result = first + turn % 20, time.monotonic(), "OK"
                try:
                    client.put_names(name)
                    client.check(name)
                except (native.Failure, AssertionError) as error:
                    result = str(error)
                results.append((result, time.monotonic() - start, start > down[0]))
                turn += 1
        threads = self.threads(ending, work, 500, 600, 700, 800)
        eventually(lambda: len(results) > 8, "transfers", 20)
        self.link("down")
        down[0] = time.monotonic()
        eventually(lambda: sum(after for _, _, after in results) > 8, "calls without the link", 2 * DEADLINE_S)
        self.join(ending, threads)
        for result, took_s, after in results:
            self.assertTrue(result == "OK" or not after and result.startswith(("DEADLINE_EXCEEDED", "BUSY")), result)
            self.assertLess(took_s, 2 * DEADLINE_S + GRACE_S)  # a put and a get
        self.link("up")
        before = self.moved()

        def again():
            client.put_names(900)
            client.drop([key(900)])
            return self.moved()[0] > before[0]
        eventually(again, "RDMA in use again", 15)
        self.others_are_served(1500)


class Daemons(FaultCase):
    """The daemon itself."""

    def test_killed_and_started_again(self):
        daemon = Daemon(**self.options)
        self.addCleanup(daemon.close)
        daemon.start()
        daemon.options["tcp"] = address = f"127.0.0.1:{daemon.port()}"
        client = Client(address)
        self.addCleanup(client.close)
        client.put_names(1, 2)
        ending, results = threading.Event(), []

        def work(name):
            while not ending.is_set():
                start, result = time.monotonic(), "OK"
                try:
                    client.put_names(name)
                    client.check(name)
                    client.drop([key(name)])
                except (native.Failure, AssertionError) as error:
                    result = str(error)
                results.append((result, time.monotonic() - start))
        threads = self.threads(ending, work, 3)
        time.sleep(0.3)
        daemon.kill()
        eventually(lambda: resources("rxe0") == self.level["rxe0"], "nothing of the dead daemon's is left")
        daemon.start()
        time.sleep(1)
        self.join(ending, threads)
        for result, took_s in results:
            self.assertTrue(result.startswith(("OK", "NOT_FOUND", "DEADLINE_EXCEEDED", "BUSY")), result)
            self.assertLess(took_s, 3 * (DEADLINE_S + GRACE_S))  # a put, a get and a drop
        client.put_names(1, 2)
        client.check(1, 2)
        eventually(lambda: resources("rxe1")["mr"] == 1, "the client keeps one window: the dead daemon's is no longer registered")
        with wire.Client(daemon.target) as asking:
            self.assertGreater(asking.stats()["fetches_total"], 0, "RDMA is not in use again")


if __name__ == "__main__":
    run()
