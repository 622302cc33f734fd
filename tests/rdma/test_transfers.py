"""Put, Get and Fold over RDMA: what comes is what comes inline, to the byte, with many in flight and with little room."""
import json
import subprocess
import threading

from guest import BLOCK, VerbsCase, built, native, run


class Transfers(VerbsCase):
    options = {**VerbsCase.options, "op_timeout": "1m"}

    def test_bytes_are_those_of_inline(self):
        """What one of the two puts the other gets, and each its own; folds alike."""
        verbs, inline = self.native("verbs"), self.native("inline")
        before = self.moved()
        verbs.put_names(1, 2, 3)
        inline.put_names(4, 5, 6)
        verbs.check(1, 2, 3, 4, 5, 6)
        self.assertEqual(verbs.get_names(1, 6, 2), inline.get_names(1, 6, 2))
        fetches, deliveries, failed = (now - then for now, then in zip(self.moved(), before))
        self.assertEqual((fetches, deliveries, failed), (3, 9, 0), "not all of that, or more, went over RDMA")

    def test_balance_and_folds(self):
        """Compressed records, and folds with and without a profile."""
        changes = dict(model="fold", layers=1, timeout_ms=60000)  # an emulated CPU takes its time
        verbs, inline = self.native("verbs", **changes), self.native("inline", **changes)
        for client, names in ((verbs, (10, 11)), (inline, (12, 13))):
            client.put_names(*names, codec=native.BALANCE, rate=8)
        names = (10, 11, 12, 13)
        self.assertEqual(verbs.get_names(*names), inline.get_names(*names))
        for options in (dict(rate=16), dict(profile="128:4,:16")):
            folded = verbs.fold_names(*names, **options)
            self.assertEqual(folded, inline.fold_names(*names, **options))
            self.assertEqual(folded, verbs.fold_names(*names, **options))

    def test_ping_shows_what_is_in_use(self):
        command = [built("bin", "bkv"), "--endpoint", self.address, "--json", "ping", "--transports", "--verbs-device", "rxe1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        shown = {info["name"]: info for info in json.loads(done.stdout)["transports"]}
        self.assertTrue(shown["verbs"]["offered"] and shown["verbs"]["usable"] and shown["verbs"]["in_use"], shown)
        self.assertFalse(shown["inline"]["in_use"], shown)

    def test_many_in_flight(self):
        """Eight threads put and get at once through one window."""
        client, wrong = self.native("verbs"), []
        before = self.moved()

        def work(first):
            try:
                for name in range(first, first + 6):
                    client.put_names(name)
                client.check(*range(first, first + 6))
            except Exception as error:  # pylint: disable=broad-except # told to the test's own thread
                wrong.append(error)
        threads = [threading.Thread(target=work, args=(100 + 10 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(wrong, [])
        fetches, deliveries, failed = (now - then for now, then in zip(self.moved(), before))
        self.assertEqual((fetches, deliveries, failed), (48, 48, 0))

    def test_window_too_small(self):
        """What does not fit the window goes inline, to the same effect."""
        client = self.native("verbs", window=5 * BLOCK // 2)
        before = self.moved()
        names = (200, 201, 202)
        client.put_names(*names)
        client.check(*names)
        for name in names:
            client.check(name)
        fetches, deliveries, failed = (now - then for now, then in zip(self.moved(), before))
        self.assertTrue(0 < fetches < 3 and 3 <= deliveries < 6 and failed == 0, (fetches, deliveries, failed))


class SmallArena(VerbsCase):
    options = {**VerbsCase.options, "arena": "8M", "slab": "0", "staging": "2M"}

    def test_eviction_under_transfers(self):
        """More than the arena holds: each name is its own bytes or a miss."""
        client, found = self.native("verbs"), 0
        for name in range(24):
            client.put_names(name)
            client.check(name)
        for name in range(24):
            try:
                client.check(name)
                found += 1
            except native.Failure as error:
                self.assertIn("NOT_FOUND", str(error))
        self.assertTrue(0 < found < 24, f"{found} of 24 are there")


if __name__ == "__main__":
    run()
