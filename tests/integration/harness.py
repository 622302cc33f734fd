"""The integration tests' frame: a case with a daemon of its own, helpers for errors and log lines.

Each test_*.py runs by itself, see support/runner.py: `/usr/bin/python3 tests/integration/test_interop.py [name...]`.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import grpc
import numpy as np

from support import ROOT, built, record, wire
from support.daemon import Daemon
from support.runner import run
from support.wire import Client, pb

Code = grpc.StatusCode
SETTLE_S = 10.0  # the longest that anything asynchronous in the daemon may take to be seen

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


class CommandLineCase(Case):
    """bkv against the case's daemon, on the trace of tests/data, in a folder of its own."""

    timeout_s = 60

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.trace = os.path.join(ROOT, "tests", "data", "trace.safetensors")

    def path(self, name):
        return os.path.join(self.folder, name)

    def bkv(self, *words, code=0):
        done = subprocess.run([built("bin", "bkv"), "--endpoint", self.daemon.target, "--json", *map(str, words)],
                              capture_output=True, text=True, timeout=self.timeout_s)
        self.assertEqual(done.returncode, code, done.stderr)
        return json.loads(done.stdout if code == 0 else done.stderr)
