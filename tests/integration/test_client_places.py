"""The library and bkv over shared memory: the same bytes as through messages, whatever happens to the daemon or the window."""
import json
import os
import subprocess
import threading
import unittest

from harness import (Case, CommandLineCase, Daemon, HEADS, KEY_DIM, LAYERS, TOKENS, VALUE_DIM, eventually, payload, run)
from support import built, native

# As harness.SPEC, but all tokens are kept as they are, and a block has 144 KiB: more than goes inline anyway.
SPEC = dict(model="places", layers=LAYERS, kv_heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM, dtype=1, block_tokens=TOKENS,
            codec=native.RAW)
WINDOW = 1 << 20

needs_library = unittest.skipIf(os.environ.get("SANITIZER"), "Python cannot load a library that is built with a sanitizer")


def key(number):
    return native.Key(*(b"block %d" % number).ljust(32, b"."))


def block(number):
    return key(number), number * TOKENS, TOKENS, payload(number), 0, 0


def record_bytes(records):
    return [native.c.string_at(record.data, record.length) for record in records]


@needs_library
class Native(Case):
    options = {"backend": "ref"}

    def native(self, transport, window_bytes=WINDOW, daemon=None, timeout_ms=20000):
        client = native.Client((daemon or self.daemon).target, transport=transport, window_bytes=window_bytes,
                               timeout_ms=timeout_ms, **SPEC)
        self.addCleanup(client.close)
        return client

    def get(self, client, numbers):
        """Bytes of records, and how many of them lay in the window."""
        records = client.get_raw([key(number) for number in numbers])
        got, placed = record_bytes(records), sum(record.owner is not None for record in records)
        client.free(records)
        return got, placed

    def test_the_same_bytes_either_way(self):
        for put_by, get_by in (("shm", "inline"), ("inline", "shm"), ("shm", "shm"), ("auto", "auto")):
            first = 10 * ["shm", "inline", "auto"].index(put_by)
            numbers = range(first, first + 3)
            self.native(put_by).put([block(number) for number in numbers])
            plain, placed = self.get(self.native("inline"), numbers)
            self.assertEqual(placed, 0)
            got, placed = self.get(self.native(get_by), numbers)
            self.assertEqual(got, plain)
            self.assertEqual(placed > 0, get_by != "inline", f"{put_by}, {get_by}: {placed} of 3 placed")
            for one, number in zip(got, numbers):
                self.assertTrue(one.endswith(payload(number)[-1024:]), "a raw record ends as its block does")

    def test_folds(self):
        client, plain = self.native("shm", 16 << 20), self.native("inline")
        client.put([block(number) for number in range(100, 108)])
        keys = [key(number) for number in range(100, 108)]
        for wanted in (dict(budget=300000), dict(rate=2), dict(rate=2, profile="256:1,:2"), dict(profile="256:2,:4")):
            placed, inline = client.fold_raw(keys, **wanted), plain.fold_raw(keys, **wanted)
            self.assertEqual(record_bytes(placed), record_bytes(inline))
            self.assertTrue(any(record.owner for record in placed), wanted)
            client.free(placed)
            plain.free(inline)

    def test_records_held_fill_the_window_and_the_rest_comes_as_data(self):
        client = self.native("shm")
        client.put([block(number) for number in range(200, 210)])
        plain, _ = self.get(self.native("inline"), range(200, 210))
        held = [client.get_raw([key(number)]) for number in range(200, 210)]
        self.assertEqual([record_bytes(records)[0] for records in held], plain)
        placed = sum(records[0].owner is not None for records in held)
        self.assertTrue(4 <= placed <= 7, f"{placed} of 10 placed in {WINDOW} bytes")
        client.put([block(number) for number in range(210, 220)])  # no room for some of them: inline, in the same call
        for records in held:
            client.free(records)
        self.assertEqual(self.get(client, range(210, 213)), (self.get(self.native("inline"), range(210, 213))[0], 3))

    def test_many_threads(self):
        client, plain, failures = self.native("shm", 2 << 20), self.native("inline"), []

        def work(first):
            try:
                for number in range(first, first + 20):
                    client.put([block(number)])
                    if self.get(client, [number])[0] != self.get(plain, [number])[0]:
                        failures.append(f"block {number}: not the same bytes")
            except Exception as error:  # pylint: disable=broad-except
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(1000 + 100 * i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(failures, [])

    def test_sessions_end_with_the_client(self):
        eventually(lambda: self.client.stats()["sessions"] == 0, "those of other tests end")
        client = self.native("shm")
        client.put([block(300)])
        self.assertEqual(self.client.stats()["sessions"], 1)
        records = client.get_raw([key(300)])
        self.assertIsNotNone(records[0].owner)
        client.close()
        eventually(lambda: self.client.stats()["sessions"] == 0, "the session ends")
        self.assertEqual(record_bytes(records), self.get(self.native("inline"), [300])[0], "records outlive it")
        client.free(records)


@needs_library
class Restart(unittest.TestCase):
    def test_a_restart_in_the_middle(self):
        """Calls go on, by place again, and what was got before stays readable."""
        daemon = Daemon(backend="ref")
        self.addCleanup(daemon.close)
        daemon.start()
        client = native.Client(daemon.target, transport="shm", window_bytes=4 << 20, timeout_ms=30000, **SPEC)
        self.addCleanup(client.close)
        client.put([block(1), block(2)])
        before = client.get_raw([key(1)])
        expected = record_bytes(before)
        self.assertIsNotNone(before[0].owner)
        for stop in (daemon.stop, daemon.kill):
            stop()
            thread = threading.Timer(0.5, daemon.start)
            thread.start()
            client.put([block(1)])  # waits for the daemon, opens the spec and attaches again
            thread.join()
            after = client.get_raw([key(1)])
            self.assertIsNotNone(after[0].owner)
            self.assertEqual(record_bytes(after), expected)
            self.assertEqual(record_bytes(before), expected)
            client.free(after)
        client.free(before)

    def test_a_stopped_daemon_is_given_up_in_time(self):
        daemon = Daemon(backend="ref")
        self.addCleanup(daemon.close)
        daemon.start()
        client = native.Client(daemon.target, transport="shm", window_bytes=4 << 20, timeout_ms=500, **SPEC)
        self.addCleanup(client.close)
        client.put([block(1)])
        self.addCleanup(daemon.thaw)
        daemon.freeze()
        for _ in range(8):  # each loses what it named
            with self.assertRaisesRegex(native.Failure, "DEADLINE_EXCEEDED|BUSY"):
                client.put([block(2)])
            with self.assertRaisesRegex(native.Failure, "DEADLINE_EXCEEDED|BUSY"):
                client.get_raw([key(1)])
        daemon.thaw()
        client.put([block(2)])
        records = client.get_raw([key(1), key(2)])
        self.assertEqual([bytes(one)[-64:] for one in record_bytes(records)], [payload(1)[-64:], payload(2)[-64:]])
        client.free(records)


class CommandLine(CommandLineCase):
    def run_bkv(self, *words, environment=None):
        return subprocess.run([built("bin", "bkv"), "--endpoint", self.daemon.target, *map(str, words)], capture_output=True,
                              text=True, timeout=self.timeout_s, env={**os.environ, **(environment or {})})

    def test_transports(self):
        listed = {one["name"]: one for one in self.bkv("ping", "--transports")["transports"]}
        self.assertEqual(list(listed), ["shm", "cuda-ipc", "verbs", "inline"])
        self.assertEqual([listed["shm"][what] for what in ("offered", "usable", "in_use", "reason")], [True, True, True, ""])
        self.assertEqual([listed["inline"][what] for what in ("offered", "usable", "in_use")], [True, True, False])
        self.assertTrue(listed["verbs"]["usable"] or listed["verbs"]["reason"])
        named = {one["name"]: one for one in self.bkv("--transport", "inline", "ping", "--transports")["transports"]}
        self.assertTrue(named["inline"]["in_use"] and named["shm"]["usable"] and not named["shm"]["in_use"])
        table = self.run_bkv("ping", "--transports").stdout.splitlines()
        self.assertEqual(table[0].split(), ["transport", "offered", "usable", "in", "use", "why", "not"])
        self.assertEqual(len(table), 5)
        self.assertEqual(self.client.stats()["sessions"], 0, "what was tried out is given back")

    def test_over_tcp_there_is_no_shared_memory(self):
        endpoint = f"127.0.0.1:{self.daemon.port()}"
        done = subprocess.run([built("bin", "bkv"), "--endpoint", endpoint, "--json", "ping", "--transports"], capture_output=True,
                              text=True, timeout=self.timeout_s)
        listed = {one["name"]: one for one in json.loads(done.stdout)["transports"]}
        self.assertFalse(listed["shm"]["offered"] or listed["shm"]["usable"])
        self.assertEqual(listed["shm"]["reason"], "not offered by the daemon")
        done = subprocess.run([built("bin", "bkv"), "--endpoint", endpoint, "--transport", "shm", "bench", "--blocks", "1"],
                              capture_output=True, text=True, timeout=self.timeout_s)
        self.assertEqual(done.returncode, 1)
        self.assertIn("transport: shm:", done.stderr)

    def test_the_same_records_in_files(self):
        self.bkv("put", self.trace, "--codec", "raw", "--keys", self.path("keys"), "--transport", "shm")
        for transport in ("inline", "shm"):
            for size in ("64K", "4M"):
                self.bkv("get", "--keys", self.path("keys"), "--record", self.path(transport + size), "--transport", transport,
                         "--window-bytes", size)
        contents = set()
        for name in ("inline64K", "inline4M", "shm64K", "shm4M"):
            with open(self.path(name), "rb") as file:
                contents.add(file.read())
        self.assertEqual(len(contents), 1)

    def test_bench_says_how(self):
        words = ("--json", "bench", "--blocks", "8", "--layers", "2")
        for transport, used in (("auto", "shm"), ("inline", "inline"), ("shm", "shm")):
            done = json.loads(self.run_bkv(*words, environment={"BKV_TRANSPORT": transport}).stdout)
            self.assertEqual(done["transport"], used)
        self.assertEqual(self.run_bkv("ping", "--transport", "pigeon").returncode, 1)


if __name__ == "__main__":
    run()
