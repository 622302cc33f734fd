"""The soak in its short form: BKV_SOAK_SECONDS of mixed load (60 by default, 20 under a sanitizer), 10,000 connections; see soak.py."""
import os
import subprocess
import sys
import unittest

from harness import run

SECONDS = os.environ.get("BKV_SOAK_SECONDS", "20" if os.environ.get("SANITIZER") else "60")


class Soak(unittest.TestCase):
    def test_everything_returns_to_its_level(self):
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "soak.py")
        done = subprocess.run([sys.executable, program, "--seconds", SECONDS], timeout=6 * int(SECONDS) + 300)
        self.assertEqual(done.returncode, 0)


if __name__ == "__main__":
    run()
