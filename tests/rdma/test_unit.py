#!/usr/bin/env python3
"""The C tests that need an RDMA device (unit_*.c): links, and the verbs transport without gRPC. They run in one guest."""
import re
import subprocess
import sys

import guest
from support import built

done = subprocess.run([guest.RUNNER, "-t", "300", "--", built("tests", "rdma-unit"), "--jobs", "1", "--timeout", "60"],
                      stdout=subprocess.PIPE, text=True, errors="replace", check=False)
sys.stdout.write(done.stdout)
if done.returncode == 77:
    guest.skip()
# criterion closes with "[====] Synthesis: Tested: 12 | Passing: 12 | Failing: 0 | Crashing: 0"
said = re.search(r"Passing: \D*(\d+).*Failing: \D*(\d+).*Crashing: \D*(\d+)", re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))
passed, failed, crashed = map(int, said.groups()) if said else (0, 0, 1)
print(f"{passed} passed, {failed + crashed} failed, 0 skipped")
sys.exit(0 if done.returncode == 0 and failed + crashed == 0 else 1)
