"""What the Python tests share: no test here.

Only the standard library, NumPy, grpcio and protobuf are used, each as Debian 12 and Ubuntu 24.04 package them.
"""
import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# The build folder under test: `make BUILD=build-asan test` passes its own.
BUILD = os.path.join(ROOT, os.environ.get("BUILD", "build"))

# How much longer than usual what a test waits for may take: ThreadSanitizer's daemons are slow.
SLOWER = 4 if os.environ.get("SANITIZER") == "tsan" else 1


def built(*parts):
    """The path of something that make has built; a clear error when it has not."""
    path = os.path.join(BUILD, *parts)
    if not os.path.exists(path):
        raise SystemExit(f"{path} is missing: run make first (BUILD={os.environ.get('BUILD', 'build')})")
    return path
