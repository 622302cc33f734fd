"""The daemon as a process: start, reload, drain, kill, restart, and what systemd sees of it.

Writers put blocks whose every byte follows from their key, so that after any end a checker can tell right from wrong.
"""
import fcntl
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import unittest

from harness import Client, Code, Daemon, SPEC, TOKENS, eventually, grpc, key, np, pb, record, run
from support import ROOT, built, wire

WIDE = {**SPEC, "model": "wide", "layers": 8, "kv_heads": 4, "codec": pb.CODEC_RAW}  # 786,432 bytes a block
WIDE_BYTES = 8 * 4 * TOKENS * (64 + 32) * 2


def content(name):
    """The payload of key(name): random but finite bf16 numbers, all of them from the name."""
    return np.random.default_rng(name).integers(0, 0x4000, WIDE_BYTES // 2, np.uint16).tobytes()


class Writer(threading.Thread):
    """Puts key(first), key(first + 1), ... until the daemon goes away; `stored` is what was acknowledged."""

    def __init__(self, target, first, drop_every=0):
        super().__init__(daemon=True)
        self.client, self.next, self.drop_every = Client(target), first, drop_every
        self.spec_id = self.client.open(**WIDE).spec_id
        self.stored, self.dropped, self.codes, self.ending = [], [], [], threading.Event()

    def run(self):
        while not self.ending.is_set():
            name, self.next = self.next, self.next + 1
            try:
                self.client.put(self.spec_id, key(name), content(name), TOKENS, timeout=20)
                self.stored.append(name)
                if self.drop_every and len(self.stored) % self.drop_every == 0:
                    name = self.stored.pop(0)
                    self.dropped.append(name)
                    self.client.drop(self.spec_id, [key(name)])
            except grpc.RpcError as error:
                self.codes.append(error.code())
                return

    def finish(self):
        self.ending.set()
        self.join(30)
        self.client.close()
        return self


def check(client, spec_id, names):
    """The names that are there. A record with a wrong byte is an AssertionError."""
    found = set()
    for name in names:
        records, _, _, error = client.try_get(spec_id, [key(name)])
        if error is not None:
            if error.code() not in (Code.NOT_FOUND, Code.DATA_LOSS):
                raise error
            continue
        got = record.Record(records[0])
        if got.key != key(name) or not got.data.endswith(content(name)):
            raise AssertionError(f"wrong bytes were served for key {name}")
        found.add(name)
    return found


class Alone(unittest.TestCase):
    """A daemon for each test."""

    def daemon(self, start=True, **options):
        daemon = Daemon(**options)
        self.addCleanup(daemon.close)
        return daemon.start() if start else daemon

    def client(self, daemon):
        client = Client(daemon.target)
        self.addCleanup(client.close)
        return client

    def kept(self, **options):
        """A daemon whose arena is a file of its folder."""
        daemon = self.daemon(start=False, **options)
        daemon.options["arena_path"] = os.path.join(daemon.folder, "arena")
        return daemon.start()


class Ending(Alone):
    def test_sigterm_drains_and_loses_no_acknowledged_block(self):
        daemon = self.kept(arena="1G")
        writers = [Writer(daemon.target, first) for first in (1000, 2000, 3000)]
        for writer in writers:
            writer.start()
        eventually(lambda: all(len(w.stored) > 10 for w in writers), "writers at work", 20)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait(20), 0)
        stored = [name for writer in writers for name in writer.finish().stored]
        for writer in writers:
            self.assertEqual(len(writer.codes), 1)
            self.assertIn(writer.codes[0], (Code.UNAVAILABLE, Code.CANCELLED))
        daemon.start()
        client = self.client(daemon)
        spec_id = client.open(**WIDE).spec_id
        self.assertEqual(check(client, spec_id, stored), set(stored))
        beyond = [writer.next - 1 for writer in writers]
        check(client, spec_id, beyond)
        self.assertGreaterEqual(client.stats()["recovered_total"], len(stored))

    def hold(self, daemon):
        """A Put that never ends by itself: (call, event that ends it)."""
        client, release = self.client(daemon), threading.Event()
        spec_id = client.open(**WIDE).spec_id

        def messages():
            block = pb.PutBlock(spec_id=spec_id, key=key(1), tokens=TOKENS, payload_bytes=WIDE_BYTES)
            yield pb.PutRequest(block=block, data=content(1)[:1000])
            release.wait(25)
            yield pb.PutRequest(data=content(1)[1000:])

        call = client.channel.stream_unary(wire.SERVICE + "Put", pb.PutRequest.SerializeToString,
                                           pb.PutResponse.FromString).future(messages(), timeout=25)
        self.addCleanup(release.set)
        other = self.client(daemon)
        eventually(lambda: other.stats()["slot_bytes"] > 0, "the Put has begun")
        return call, release, other

    def test_draining_is_told_to_health_and_refuses_new_calls_but_ends_old_ones(self):
        daemon = self.daemon(drain_timeout="20s")
        call, release, other = self.hold(daemon)
        watch = other.watch("")
        self.assertEqual(next(watch).status, 1)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(next(watch).status, 2)
        watch.cancel()
        with self.assertRaises(grpc.RpcError) as caught:
            other.open(**SPEC)
        self.assertEqual(caught.exception.code(), Code.UNAVAILABLE)
        self.assertIsNone(daemon.process.poll())
        release.set()
        self.assertEqual(len(call.result(20).results), 1, "what had begun is completed")
        self.assertEqual(daemon.wait(20), 0)
        self.assertFalse(os.path.exists(daemon.socket), "the socket is removed")

    def test_drain_timeout_cuts_off(self):
        daemon = self.daemon(drain_timeout="1s")
        call, _, _ = self.hold(daemon)
        started = time.monotonic()
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait(20), 0)
        self.assertTrue(0.8 < time.monotonic() - started < 15)
        self.assertIn(call.exception(5).code(), (Code.CANCELLED, Code.UNAVAILABLE))

    def test_second_sigterm_ends_at_once(self):
        daemon = self.daemon(drain_timeout="60s", op_timeout="60s")
        call, _, _ = self.hold(daemon)
        daemon.signal(signal.SIGTERM)
        eventually(lambda: "draining" in daemon.log_text(), "the drain has begun")
        time.sleep(0.3)
        self.assertIsNone(daemon.process.poll())
        started = time.monotonic()
        daemon.signal(signal.SIGTERM)
        daemon.wait(20)
        self.assertLess(time.monotonic() - started, 10)
        self.assertEqual(call.exception(5).code(), Code.UNAVAILABLE)
        daemon.start()
        self.assertEqual(self.client(daemon).health(), 1)

    def test_sigint_is_as_good(self):
        daemon = self.daemon()
        daemon.signal(signal.SIGINT)
        self.assertEqual(daemon.wait(20), 0)


class Killed(Alone):
    def rounds(self, daemon, seed, rounds, drop_every):
        """kill -9 amid Puts, several times over; all names that were ever put, and those acknowledged and not dropped."""
        rng, names, stored = random.Random(seed), [], set()
        for number in range(rounds):
            writers = [Writer(daemon.target, 10000 * (3 * number + w + 1), drop_every) for w in range(3)]
            for writer in writers:
                writer.start()
            eventually(lambda: all(writer.stored for writer in writers), "writers at work", 20)
            time.sleep(rng.uniform(0.05, 0.4))
            daemon.signal(signal.SIGKILL)
            daemon.process.wait(20)
            for writer in writers:
                writer.finish()
                names += writer.dropped + writer.stored + [writer.next - 1]
                stored |= set(writer.stored)
            daemon.start()
            client = self.client(daemon)
            found = check(client, client.open(**WIDE).spec_id, names)
            yield set(stored), found, client

    def test_acknowledged_blocks_survive_and_nothing_wrong_is_served(self):
        daemon = self.kept(arena="2G", slab="16M")
        for stored, found, client in self.rounds(daemon, 1, 3, 0):
            self.assertTrue(stored <= found, f"{len(stored - found)} acknowledged blocks are gone")
            self.assertEqual(client.stats()["corrupt_total"], 0, "no torn record was taken over")

    def test_nothing_wrong_is_served_where_slots_are_reused_all_the_time(self):
        """An arena of a few dozen blocks: evictions, drops and rewritten slots at the moment of the kill."""
        daemon = self.kept(arena="32M", slab="8M")
        for _, found, _ in self.rounds(daemon, 2, 4, 5):
            self.assertGreater(len(found), 3)

    def test_an_arena_of_other_geometry_serves_nothing_wrong(self):
        daemon = self.kept(arena="32M", slab="8M")
        client = self.client(daemon)
        client.put(client.open(**WIDE).spec_id, key(1), content(1), TOKENS)
        for changes in (dict(arena="64M"), dict(arena="64M", slab="16M"), dict(arena="32M")):
            daemon.stop()
            daemon.start(**changes)
            client = self.client(daemon)
            spec_id = client.open(**WIDE).spec_id
            check(client, spec_id, [1])
            client.put(spec_id, key(1), content(1), TOKENS)
            self.assertEqual(check(client, spec_id, [1]), {1})

    def noise(self, path, first):
        """Overwrites a file from byte `first` on."""
        noise = np.random.default_rng(3).integers(0, 256, 1 << 20, np.uint8).tobytes()
        with open(path, "r+b") as file:
            file.seek(first)
            for at in range(first, os.path.getsize(path), 1 << 20):
                file.write(noise[:os.path.getsize(path) - at])

    def test_an_arena_full_of_noise_serves_nothing_wrong(self):
        daemon = self.kept(arena="32M", slab="8M")
        client = self.client(daemon)
        client.put(client.open(**WIDE).spec_id, key(1), content(1), TOKENS)
        daemon.stop()
        self.noise(daemon.options["arena_path"], 4096)
        daemon.start()
        client = self.client(daemon)
        spec_id = client.open(**WIDE).spec_id
        self.assertEqual(check(client, spec_id, [1]), set())
        client.put(spec_id, key(2), content(2), TOKENS)
        self.assertEqual(check(client, spec_id, [2]), {2})

    def test_a_file_that_is_no_arena_is_left_alone(self):
        daemon = self.daemon(start=False, arena="32M")
        path = daemon.options["arena_path"] = os.path.join(daemon.folder, "somebody's")
        with open(path, "wb") as file:
            file.write(b"precious" * 1000)
        daemon.spawn()
        self.assertEqual(daemon.wait(20), 2)
        self.assertIn(path, daemon.log_text())
        with open(path, "rb") as file:
            self.assertEqual(file.read(), b"precious" * 1000)

    def test_boot_epoch_changes_and_specs_must_be_opened_again(self):
        daemon = self.daemon()
        first = self.client(daemon).open(**SPEC)
        daemon.kill()
        daemon.start()
        client = self.client(daemon)
        with self.assertRaises(grpc.RpcError) as caught:
            client.lookup(first.spec_id, [key(1)])
        self.assertEqual(caught.exception.code(), Code.NOT_FOUND)
        again = client.open(**SPEC)
        self.assertEqual(again.spec_id, first.spec_id)
        self.assertNotEqual(again.boot_epoch, first.boot_epoch)


class Configuration(Alone):
    def file(self, daemon, text):
        path = os.path.join(daemon.folder, "d.conf")
        with open(path, "w", encoding="utf8") as file:
            file.write(text)
        daemon.config = path
        return path

    def test_bad_configuration_is_refused_with_file_line_and_reason(self):
        daemon = self.daemon(start=False)
        cases = [("[memory]\narena = lots\n", 2, "arena"), ("[memory]\n\n# x\narena = 5Q\n", 4, "arena"),
                 ("[memory]\narena = -1\n", 2, "arena"), ("[limits]\nmax_calls = 1.5\n", 2, "max_calls"),
                 ("[limits]\nmax_calls = 99999999999\n", 2, "max_calls"), ("[limits]\nop_timeout = soon\n", 2, "op_timeout"),
                 ("[nothing]\nx = 1\n", 1, "nothing"), ("[memory]\narea = 1G\n", 2, "area"),
                 ("[log]\nlevel = loud\n", 2, "level"), ("[log]\ntarget = printer\n", 2, "target"),
                 ("[compute]\nbackend = abacus\n", 2, "backend"),
                 ("[listen]\nsocket_mode = 9x\n", 2, "socket_mode"), ("[memory]\nprefault = perhaps\n", 2, "prefault"),
                 ("[memory]\narena\n", 2, ""), ("[memory\narena = 1G\n", 1, ""), ("arena = 1G\n", 1, "arena"),
                 ("[listen]\ntcp = 0.0.0.0:0\n", 2, "tcp"), ("[listen]\ntcp = 127.0.0.1\n", 2, "tcp"),
                 ("[tenant a]\nquota = much\n", 2, "quota"), ("[tenant a]\nlimit = 1\n", 2, "limit")]
        daemon.options = {name: daemon.options[name] for name in ("socket",)}
        for text, line, field in cases:
            with self.subTest(text):
                path = self.file(daemon, text)
                daemon.spawn()
                status = daemon.wait(20)
                self.assertEqual(status, 2, daemon.log_text())
                self.assertIn(f"{path}:{line}: ", daemon.log_text())
                self.assertIn(field, daemon.log_text())

    def test_bad_flags_and_files_are_refused(self):
        daemon = self.daemon(start=False)
        for extra, text in ((dict(arena="zero"), "--arena"), (dict(no_such_flag="1"), "no-such-flag"),
                            (dict(tls_cert="/nonexistent"), "tls"), (dict(config="/nonexistent.conf"), "/nonexistent.conf"),
                            (dict(arena_path="/nonexistent/arena"), "arena_path"), (dict(socket="/" + "x" * 200), "socket")):
            with self.subTest(str(extra)):
                daemon.spawn(**extra)
                self.assertIn(daemon.wait(20), (1, 2))
                self.assertIn(text, daemon.log_text())

    def test_sighup_reloads_what_can_be_reloaded(self):
        daemon = self.daemon(start=False)
        daemon.options.pop("arena")
        self.file(daemon, "[memory]\narena = 64M\nslab = 8M\n[limits]\nop_timeout = 20s\n")
        daemon.start()
        client = self.client(daemon)
        spec_id = client.open(**{**WIDE, "tenant": "small"}).spec_id
        self.file(daemon, "[memory]\narena = 128M\nslab = 8M\n[limits]\nop_timeout = 2s\n[tenant small]\nquota = 2M\n")
        daemon.notify.messages.clear()
        daemon.signal(signal.SIGHUP)
        self.assertTrue(daemon.notify.wait("RELOADING=1", 20) and daemon.notify.wait("READY=1", 20))
        for name in range(8):
            client.put(spec_id, key(name), content(name), TOKENS)
        self.assertGreater(client.stats()["evicted_quota_total"], 0, "the tenant's quota holds")
        release = threading.Event()
        self.addCleanup(release.set)

        def messages():
            yield pb.PutRequest(block=pb.PutBlock(spec_id=spec_id, key=key(99), tokens=TOKENS, payload_bytes=WIDE_BYTES))
            release.wait(20)

        started = time.monotonic()
        with self.assertRaises(grpc.RpcError) as caught:
            client.put_stream(messages(), timeout=None)
        self.assertEqual(caught.exception.code(), Code.DEADLINE_EXCEEDED)
        self.assertLess(time.monotonic() - started, 12)
        self.assertEqual(client.stats()["arena_bytes"], 64 << 20, "the arena keeps its size")
        self.assertRegex(daemon.log_text(), "arena.*restart")

    def test_sighup_with_a_bad_file_changes_nothing(self):
        daemon = self.daemon(start=False)
        self.file(daemon, "[log]\nlevel = info\n")
        daemon.start()
        path = self.file(daemon, "[log]\nlevel = debug\n[limits]\nop_timeout = never\n")
        daemon.signal(signal.SIGHUP)
        eventually(lambda: f"{path}:4: " in daemon.log_text(), "a line that names file and line")
        self.assertEqual(self.client(daemon).health(), 1)

    def test_two_daemons_do_not_share_a_socket_or_an_arena(self):
        first = self.kept(arena="64M")
        second = self.daemon(start=False)
        for extra, text in ((dict(socket=first.socket), first.socket), (dict(arena_path=first.options["arena_path"]), "arena")):
            with self.subTest(text):
                second.spawn(**extra)
                self.assertIn(second.wait(20), (1, 2))
                self.assertIn(text, second.log_text())
                self.assertEqual(self.client(first).health(), 1)
        port = first.port()
        second.spawn(tcp=f"127.0.0.1:{port}")
        self.assertEqual(second.wait(20), 1)
        first.kill()
        second.start(socket=first.socket)
        self.assertEqual(self.client(first).health(), 1, "a socket left behind is no obstacle")

    def test_log_formats(self):
        for target, pattern in (("json", r'^{"time":"[^"]+","level":"info"'), ("text", r"^\d{4}-\d\d-\d\dT[\d:.]+Z info ")):
            daemon = self.daemon(log_target=target)
            client = self.client(daemon)
            with self.assertRaises(grpc.RpcError):
                client.open(**{**SPEC, "model": 'a"b\nc\x01' * 60})
            daemon.stop()
            lines = daemon.log_text().splitlines()
            self.assertTrue(all(re.match(pattern.replace("info", "(info|warn|error)"), line) for line in lines), lines)
            self.assertTrue(any("spec.model" in line for line in lines))


class Systemd(Alone):
    def test_readiness_status_and_watchdog(self):
        daemon = Daemon(environment={"WATCHDOG_USEC": "400000"})
        self.addCleanup(daemon.close)
        daemon.start()
        self.assertTrue(daemon.notify.wait("WATCHDOG=1", 15))
        daemon.notify.messages.clear()
        self.assertTrue(daemon.notify.wait("WATCHDOG=1", 15), "again and again")
        daemon.stop()
        self.assertIn("STOPPING=1", daemon.notify.messages)

    def test_the_arena_is_handed_to_systemd_and_taken_back(self):
        daemon = self.daemon(arena="64M", slab="8M")
        self.assertEqual(list(daemon.notify.stored), ["arena"])
        stored = list(range(20))
        client = self.client(daemon)
        spec_id = client.open(**WIDE).spec_id
        for name in stored:
            client.put(spec_id, key(name), content(name), TOKENS)
        for end in (daemon.stop, daemon.kill):  # an orderly restart, then a crash
            end()
            fd = fcntl.fcntl(daemon.notify.stored["arena"][0], fcntl.F_DUPFD, 50)
            daemon.pass_fds = [("arena", fd)]
            daemon.start()
            os.close(fd)
            client = self.client(daemon)
            self.assertEqual(check(client, client.open(**WIDE).spec_id, stored), set(stored))
            self.assertEqual(client.stats()["recovered_total"], len(stored))

    def test_other_descriptors_are_no_arena(self):
        daemon = self.daemon(start=False, arena="64M")
        reader, writer = os.pipe()
        daemon.pass_fds = [("arena", fcntl.fcntl(reader, fcntl.F_DUPFD, 50)), ("else", fcntl.fcntl(writer, fcntl.F_DUPFD, 50))]
        daemon.start()
        for fd in (reader, writer, *(fd for _, fd in daemon.pass_fds)):
            os.close(fd)
        daemon.pass_fds = []
        client = self.client(daemon)
        client.put(client.open(**WIDE).spec_id, key(1), content(1), TOKENS)

    def test_unit_file(self):
        """systemd-analyze verifies the unit, with the daemon of this build in it, and rates its hardening."""
        units = glob.glob(os.path.join(ROOT, "deploy", "**", "balancekvd.service*"), recursive=True)
        if not units:
            self.fail("no unit under deploy/")
        if not shutil.which("systemd-analyze"):
            self.skipTest("systemd-analyze is not installed")
        with open(units[0], encoding="utf8") as file:
            text = file.read()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "balancekvd.service")
            with open(path, "w", encoding="utf8") as file:
                file.write(re.sub(r"(?m)^(ExecStart\w*=)\S*/balancekvd", r"\1" + built("bin", "balancekvd"), text))
            done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, timeout=60)
            complaints = [line for line in done.stderr.splitlines() if "balancekvd.service" in line]
            self.assertEqual(complaints, [])
            done = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--threshold=30", path], capture_output=True,
                                  text=True, timeout=60)
            if "nknown" in done.stderr or "nrecognized" in done.stderr:
                self.skipTest("this systemd-analyze rates no unit files")
            self.assertEqual(done.returncode, 0, done.stdout[-600:] + done.stderr)
        for word in ("Type=notify", "WatchdogSec=", "FileDescriptorStoreMax=", "LimitMEMLOCK=", "NoNewPrivileges="):
            self.assertIn(word, text)


if __name__ == "__main__":
    run()
