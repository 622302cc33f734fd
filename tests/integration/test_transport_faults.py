"""Clients that die, stall, give up and flood, with shared memory: nothing hangs beyond its deadline, and afterwards all is at its
level again: pins, sessions, windows, staging, descriptors, mappings, memory."""
import os
import signal
import subprocess
import sys
import threading
import time

from harness import Case, Client, Code, Daemon, TOKENS, eventually, grpc, key, payload, pb, run
from support import window as shm, wire
from support.window import Connection, Window, attach, detach

WINDOW = 8 << 20
LARGE = dict(layers=16, heads=8)
LARGE_RAW = payload(2, **LARGE)
HALF = WINDOW // 2
GROWTH = 32 << 20  # of anonymous memory: staging, which is kept once it was used, and allocators; a leak would be more
SANITIZED = bool(os.environ.get("SANITIZER"))
ABORTED = 60 if os.environ.get("SANITIZER") == "tsan" else 1000  # whose copies take twenty times as long
OP_TIMEOUT_S = 6


class FaultCase(Case):
    options = dict(op_timeout=f"{OP_TIMEOUT_S}s", level="error", staging="16M")

    def setUp(self):
        super().setUp()
        self.spec_id = self.open(model="large", layers=LARGE["layers"], kv_heads=LARGE["heads"], codec=pb.CODEC_RAW)
        self.client.put(self.spec_id, key(0), LARGE_RAW, TOKENS)
        window = self.window()  # so that everything has been used once
        window.put(self.spec_id, key(1), LARGE_RAW, TOKENS)
        window.get(self.spec_id, [key(0)])
        window.close()
        self.before = self.level()

    def window(self, size=WINDOW):
        one = Window(self.client, self.daemon.socket, size)
        self.addCleanup(one.close)
        return one

    def anonymous(self):
        with open(f"/proc/{self.daemon.process.pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

    def mapped_windows(self):
        with open(f"/proc/{self.daemon.process.pid}/maps", encoding="ascii") as file:
            return sum("balancekv-window" in line for line in file)

    def held(self):
        """What a transfer or a session holds; all of it must go."""
        stats = self.client.stats()
        return {**{name: stats[name] for name in ("sessions", "shm_window_bytes", "pinned", "staging_bytes", "jobs_queued",
                                                  "jobs_running")},
                "calls_open": stats["calls_open"] - 1, "mapped": self.mapped_windows()}

    def level(self):
        eventually(lambda: not any(self.held().values()), f"nothing held: {self.held()}")
        return dict(fds=self.daemon.fds(), anonymous=self.anonymous())

    def assert_level(self):
        """All as in setUp, and it still serves."""
        try:
            eventually(lambda: not any(self.held().values()), "nothing is held")
            eventually(lambda: self.daemon.fds() <= self.before["fds"], "descriptors are closed")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.held()}, {self.daemon.fds()} descriptors, were {self.before['fds']}") from None
        if not SANITIZED:
            self.assertLess(self.anonymous() - self.before["anonymous"], GROWTH, "memory")
        window = self.window()
        window.put(self.spec_id, key(0), LARGE_RAW, TOKENS)  # the load may have driven it out
        (got, at), = window.get(self.spec_id, [key(0)])
        self.assertEqual(at, 0)
        self.assertTrue(got.endswith(LARGE_RAW))
        window.close()


def child_main(target, socket_path, spec_id):
    """A worker that puts and gets by place until it is killed; says so once it does."""
    client = Client(target)
    window = Window(client, socket_path, WINDOW)
    window.memory[:len(LARGE_RAW)] = LARGE_RAW
    names = [key(os.getpid() * 100 + n) for n in range(4)]
    for name in names:
        window.put_there(spec_id, name, len(LARGE_RAW), TOKENS, window.place())
    print("going", flush=True)
    threads = [threading.Thread(target=child_gets, args=(window, spec_id, names)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while True:
        client.drop(spec_id, names[:2])
        for name in names[:2]:
            window.put_there(spec_id, name, len(LARGE_RAW), TOKENS, window.place())


def child_gets(window, spec_id, names):
    while True:
        window.get(spec_id, names[2:], offset=HALF, size=HALF)


class Killed(FaultCase):
    def test_a_client_that_is_killed_within_transfers(self):
        children = []
        for _ in range(3):
            words = [sys.executable, __file__, "--child", self.daemon.target, self.daemon.socket, self.spec_id.hex()]
            children.append(subprocess.Popen(words, stdout=subprocess.PIPE))
        for number, child in enumerate(children):
            self.assertEqual(child.stdout.readline(), b"going\n")
            time.sleep(0.02 * number)
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
        self.assert_level()
        self.assertGreaterEqual(self.client.stats()["sessions_lost_total"], 3)
        self.assertEqual(self.client.stats()["corrupt_total"], 0)

    def test_a_connection_that_breaks_within_transfers(self):
        """The session ends under a call of its own: the transfer finishes, the call gets its answer, the next one is refused."""
        for turn in range(20):
            window = self.window()
            window.memory[:len(LARGE_RAW)] = LARGE_RAW
            block = pb.PutBlock(spec_id=self.spec_id, key=key(1000 + turn), tokens=TOKENS, payload_bytes=len(LARGE_RAW),
                                place=window.place())
            call = self.client.channel.stream_unary(wire.SERVICE + "Put", pb.PutRequest.SerializeToString,
                                                    pb.PutResponse.FromString)
            pending = call.future(iter([pb.PutRequest(block=block)]), timeout=20)
            if turn % 2:
                time.sleep(0.002 * (turn % 5))
            window.connection.close()
            error = pending.exception()
            if error is not None:
                self.assert_status(error, Code.FAILED_PRECONDITION, "place.session")
            else:
                self.assertTrue(self.client.get(self.spec_id, [key(1000 + turn)])[0].endswith(LARGE_RAW))
            eventually(lambda: self.client.stats()["sessions"] == 0, "the session ends")
            self.client.drop(self.spec_id, [key(1000 + turn)])
        self.assert_level()


def silence(event):
    """A stream of requests that never comes."""
    event.wait(10)
    yield from ()


class GivenUp(FaultCase):
    def test_a_slow_reader(self):
        """Readers that read nothing, by place and by messages in one answer, until the daemon's op_timeout ends them."""
        window, small = self.window(), self.open(model="many", codec=pb.CODEC_DENSE4)
        names = [key(n) for n in range(512)]
        data = payload(3)
        window.memory[:len(data)] = data
        for at in range(0, len(names), 64):
            self.client.put_stream([pb.PutRequest(block=pb.PutBlock(spec_id=small, key=name, tokens=TOKENS,
                                                                    payload_bytes=len(data), place=window.place()))
                                    for name in names[at:at + 64]])
        streams = [self.client.records("Get", pb.GetRequest(spec_id=spec, keys=keys, place=window.place(0, room)), timeout=60)
                   for spec, keys, room in ((small, names, WINDOW), (small, names * 7, WINDOW), (small, names, 0),
                                            (self.spec_id, [key(0)] * 64, WINDOW), (self.spec_id, [key(0)] * 64, 65536))]
        time.sleep(0.3)
        stats = self.client.stats()
        self.assertLess(stats["pinned"], 128, "one record each, and what gRPC has not let go of")
        started = time.monotonic()
        eventually(lambda: self.client.stats()["calls_open"] == 1, "their deadline ends them", timeout_s=3 * OP_TIMEOUT_S)
        self.assertLess(time.monotonic() - started, 2 * OP_TIMEOUT_S)
        for stream in streams:
            stream.cancel()
        window.close()
        self.assert_level()

    def test_a_thousand_aborted_puts(self):
        """Given up before, within and after the fetch, with the session's end in some of them."""
        window, never = self.window(), threading.Event()
        window.memory[:len(LARGE_RAW)] = LARGE_RAW
        call = self.client.channel.stream_unary(wire.SERVICE + "Put", pb.PutRequest.SerializeToString,
                                                pb.PutResponse.FromString)
        pending = []

        def requests(number, ends):
            codec = pb.CODEC_RAW if number % 8 else pb.CODEC_DENSE8
            yield pb.PutRequest(block=pb.PutBlock(spec_id=self.spec_id, key=key(5000 + number), tokens=TOKENS, codec=codec,
                                                  payload_bytes=len(LARGE_RAW), place=window.place()))
            if not ends:
                yield from silence(never)

        for number in range(ABORTED):
            one = call.future(requests(number, ends=number % 4 != 0), timeout=20)
            if number % 10 == 0:
                time.sleep(0.001 * (number % 7))
            if number % 3 == 0:
                one.cancel()
            else:
                pending.append(one)
            if len(pending) > 12:
                pending.pop(0).cancel()
            if number % (ABORTED // 6) == 9:
                window.close()
                window = self.window()
        for one in pending:
            one.cancel()
        never.set()
        self.client.drop(self.spec_id, [key(5000 + n) for n in range(ABORTED)])
        window.close()
        self.assert_level()
        self.assertEqual(self.client.stats()["corrupt_total"], 0)

    def test_deadlines_that_pass_within_transfers(self):
        window, codes = self.window(), set()
        window.memory[:len(LARGE_RAW)] = LARGE_RAW
        for number in range(60):
            started = time.monotonic()
            try:
                window.put_there(self.spec_id, key(3000 + number), len(LARGE_RAW), TOKENS, window.place(),
                                 timeout=0.0003 * (number % 12), codec=pb.CODEC_BALANCE)
            except grpc.RpcError as error:
                codes.add(error.code())
            self.assertLess(time.monotonic() - started, OP_TIMEOUT_S - 1)
        self.assertLessEqual(codes, {Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE})
        self.assertIn(Code.DEADLINE_EXCEEDED, codes)
        window.close()
        self.assert_level()


class Flooded(FaultCase):
    options = {**FaultCase.options, "max_sessions": "200"}

    def test_the_fd_socket_flooded(self):
        """Connections that say nothing, nonsense, or too much, while others work."""
        ending, wrong, made = threading.Event(), [], []
        session = attach(self.client, 65536).session

        def flood(number):
            kept, turn = [], 0
            while not ending.is_set():
                turn += 1
                try:
                    connection = Connection(self.daemon.socket)
                    kind = (turn + number) % 5
                    if kind == 1:
                        connection.send(os.urandom(turn % 300 + 1))
                    elif kind == 2:
                        connection.send(shm.request(shm.TAKE, os.urandom(16)))
                    elif kind == 3:
                        connection.send(shm.request(shm.GIVE, session), fds=[0] * (turn % 8 + 1))
                    elif kind == 4:
                        connection.close()
                        continue
                    kept.append(connection)
                except OSError:
                    pass  # closed on us, or its backlog is full: what a flood deserves
                for old in kept[:-100]:
                    old.close()
                kept = kept[-100:]
            made.append(turn)
            for connection in kept:
                connection.close()

        threads = [threading.Thread(target=flood, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 2
        try:
            while time.monotonic() < deadline:
                with Client(self.daemon.target) as client:
                    window = Window(client, self.daemon.socket, WINDOW)
                    (got, _), = window.get(self.spec_id, [key(0)], timeout=OP_TIMEOUT_S)
                    wrong += [] if got.endswith(LARGE_RAW) else ["wrong bytes"]
                    window.close()
        finally:
            ending.set()
            for thread in threads:
                thread.join(10)
        self.assertEqual(wrong, [])
        self.assertGreater(sum(made), 500)
        try:
            detach(self.client, session)
        except grpc.RpcError as error:  # a GIVE named it first, and its connection is gone
            self.assert_status(error, Code.FAILED_PRECONDITION, "session")
        self.assert_level()

    def test_silent_connections_are_closed(self):
        silent = [Connection(self.daemon.socket, timeout_s=30) for _ in range(10)]
        started = time.monotonic()
        for connection in silent:
            self.assertIsNone(connection.receive())
            connection.close()
        self.assertLess(time.monotonic() - started, 15)
        self.assert_level()

    def test_sessions_without_end(self):
        """As many as there may be, left without a word, again and again."""
        for _ in range(5):
            kept = []
            with self.assertRaises(grpc.RpcError) as caught:
                for _ in range(2000):
                    kept.append(Connection(self.daemon.socket))
                    session = attach(self.client, 65536).session
                    if kept[-1].ask(shm.HOLD, session).status:
                        raise AssertionError("not held")
            self.assert_status(caught.exception, Code.RESOURCE_EXHAUSTED, "max_sessions")
            self.assertEqual(len(kept), 200 + 1)
            for connection in kept:
                connection.close()
            eventually(lambda: self.client.stats()["sessions"] == 0, "all of them end")
        self.assert_level()



class Ending(FaultCase):
    def test_sigterm_with_sessions_and_transfers(self):
        """The drain does not wait for sessions, and what is under way ends."""
        with Daemon(op_timeout="10s", drain_timeout="30s") as daemon, Client(daemon.target) as client:
            spec_id = client.open(**dict(model="end", layers=LARGE["layers"], kv_heads=LARGE["heads"], key_dim=64, value_dim=32,
                                         dtype=pb.DTYPE_BF16, block_tokens=TOKENS, codec=pb.CODEC_RAW)).spec_id
            windows = [Window(client, daemon.socket, WINDOW) for _ in range(3)]
            stranger = Connection(daemon.socket)
            windows[0].memory[:len(LARGE_RAW)] = LARGE_RAW
            done, ending = [], threading.Event()

            def work():
                while not ending.is_set():
                    try:
                        windows[0].put_there(spec_id, key(len(done)), len(LARGE_RAW), TOKENS, windows[0].place(), timeout=10)
                        done.append(True)
                    except grpc.RpcError:
                        return

            thread = threading.Thread(target=work)
            thread.start()
            eventually(lambda: len(done) > 5, "transfers")
            started = time.monotonic()
            daemon.stop(timeout_s=60)
            self.assertLess(time.monotonic() - started, 20)
            ending.set()
            thread.join(10)
            for window in windows:
                self.assertIsNone(window.connection.receive())
                window.memory[:8] = b"still us"
                window.close()
            stranger.close()
            self.assertFalse(os.path.exists(daemon.socket + ".fd"))

    def test_a_daemon_that_was_killed_leaves_nothing_in_the_way(self):
        with Daemon() as daemon:
            with Client(daemon.target) as client:
                window = Window(client, daemon.socket, WINDOW)
                daemon.kill()
                self.assertIsNone(window.connection.receive())
                self.assertTrue(os.path.exists(daemon.socket + ".fd"))
            daemon.start()
            with Client(daemon.target) as client:
                spec_id = client.open(**dict(model="again", layers=1, kv_heads=1, key_dim=8, dtype=pb.DTYPE_BF16)).spec_id
                self.assert_error(Code.FAILED_PRECONDITION, "place.session", client.get, spec_id, [key(1)],
                                  place=window.place(0, 64))
                window.close()
                again = Window(client, daemon.socket, WINDOW)
                again.close()

    def test_two_daemons_on_one_socket(self):
        with Daemon() as daemon:
            second = subprocess.run(daemon.command(arena="16M"), capture_output=True, text=True, timeout=20)
            self.assertEqual(second.returncode, 1)
            self.assertIn("another daemon", second.stderr)
            with Client(daemon.target) as client:
                Window(client, daemon.socket, WINDOW).close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child_main(sys.argv[2], sys.argv[3], bytes.fromhex(sys.argv[4]))
    run()
