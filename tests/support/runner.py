"""A small unittest runner: one line per test as it ends, skips aloud with their reason, and a closing line that scripts can
read: "N passed, N failed, N skipped".
"""
import sys
import time
import unittest


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
            grown = self.failures if issubclass(err[0], test.failureException) else self.errors
            self.show("FAIL", subtest, "\n" + grown[-1][1])


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
