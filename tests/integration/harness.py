"""The integration tests' frame: a case with a daemon of its own, helpers for errors and log lines, and a small runner.

Each test_*.py runs by itself (`/usr/bin/python3 tests/integration/test_interop.py [name...]`) and closes with the line
"N passed, N failed, N skipped". Skips are said aloud with their reason.
"""
import os
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import grpc
import numpy as np

from support import record, wire
from support.daemon import Daemon
from support.wire import Client, pb

Code = grpc.StatusCode
SETTLE_S = 5.0  # the longest that anything asynchronous in the daemon may take to be seen

# A small model that still has every trait: several layers and heads, key and value dims that differ, bf16.
LAYERS, HEADS, KEY_DIM, VALUE_DIM, TOKENS = 3, 2, 64, 32, 128
SPEC = dict(model="test-model@1", layers=LAYERS, kv_heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM, dtype=pb.DTYPE_BF16,
            block_tokens=TOKENS, codec=pb.CODEC_BALANCE, rate=8, sink_tokens=8, seed=7)


def tensors(seed, tokens=TOKENS, layers=LAYERS, heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM):
    """K and V as caches look: a common offset per channel, some channels larger, a few outlying tokens."""
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(layers, heads, tokens, key_dim)) * rng.uniform(0.3, 1.5, (layers, heads, 1, key_dim))
    k += rng.normal(size=(layers, heads, 1, key_dim))
    k[:, :, ::37] *= -1.5
    v = rng.normal(size=(layers, heads, tokens, value_dim))
    return k.astype(np.float32), v.astype(np.float32)


def payload(seed, dtype=record.BF16, **shape):
    return record.payload(*tensors(seed, **shape), dtype)


def key(n):
    """A key that no other n has."""
    return (b"key-%d-" % n).ljust(32, b".")


def eventually(condition, what, timeout_s=SETTLE_S):
    """Waits for what another thread of the daemon is about to do; never longer than timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)


class Case(unittest.TestCase):
    """One daemon for all tests of the class (options: class member), one client for each test."""

    options = {}

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon(**cls.options)
        cls.addClassCleanup(cls.daemon.close)
        cls.daemon.start()

    def setUp(self):
        self.client = self.connect()

    def connect(self, *args, **kwargs):
        client = Client(self.daemon.target, *args, **kwargs)
        self.addCleanup(client.close)
        return client

    def open(self, **changes):
        """The spec id of SPEC with changes."""
        return self.client.open(**{**SPEC, **changes}).spec_id

    def assert_error(self, code, text, call, *args, **kwargs):
        """call must end with the status, and its message must hold text, which names the field."""
        with self.assertRaises(grpc.RpcError) as caught:
            call(*args, **kwargs)
        self.assert_status(caught.exception, code, text)
        return caught.exception

    def assert_status(self, error, code, text):
        self.assertIsNotNone(error, f"success instead of {code}")
        self.assertEqual(error.code(), code, error.details())
        self.assertIn(text, error.details())

    def failures(self):
        """The log lines that tell of a failed request: any with a status, and any at warning or error level."""
        return [line for line in self.daemon.log_lines()
                if "raw" in line or "status" in line or line.get("level") in ("warn", "error")]

    def gauges(self, *names):
        stats = self.client.stats()
        return {name: stats[name] for name in names}


class Result(unittest.TestResult):
    """One line per test as it ends, tracebacks at once, counts at the end."""

    def __init__(self):
        super().__init__()
        self.passed, self.started = 0, time.monotonic()

    def startTest(self, test):
        super().startTest(test)
        self.started = time.monotonic()

    def show(self, word, test, text=""):
        print(f"{word:5} {test.id().replace('__main__.', '')} ({time.monotonic() - self.started:.1f} s){text}", flush=True)

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1
        self.show("ok", test)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.show("FAIL", test, "\n" + self.failures[-1][1])

    def addError(self, test, err):
        super().addError(test, err)
        self.show("ERROR", test, "\n" + self.errors[-1][1])

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.show("SKIP", test, ": " + reason)

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.show("FAIL", subtest, "\n" + (self.failures + self.errors)[-1][1])


def select(suite, words):
    """The tests whose name holds one of the words; all of them without words."""
    chosen = unittest.TestSuite()
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            chosen.addTest(select(item, words))
        elif not words or any(word in item.id() for word in words):
            chosen.addTest(item)
    return chosen


def run():
    """Runs this program's tests (those named on the command line, if any), prints the closing line and exits."""
    suite = select(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]), sys.argv[1:])
    result = Result()
    suite.run(result)
    failed = len(result.failures) + len(result.errors)
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped")
    sys.exit(0 if failed == 0 and result.passed + len(result.skipped) > 0 else 1)
