"""Workers: each puts, gets, looks up, folds, attends, pins and drops through any daemon it likes, as an engine with several
endpoints would: what is refused for now it asks of another daemon, as long as its deadline lasts. referee.py judges.
"""
import contextlib
import faulthandler
import threading
import time

import grpc
import numpy as np
from ledger import KINDS, Wrong, generator
from pool import pb

from support import record, wire

Code = grpc.StatusCode
DEADLINE_S = 3.0  # of most operations: three times the daemons' patience with each other
REAP_S = 2  # past its deadline, when a stream is given up
SHORT_S = (0.02, 0.1, 0.4)
AGAIN = (Code.UNAVAILABLE, Code.CANCELLED)
TYPED = AGAIN + (Code.NOT_FOUND, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)
QUICK = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100),
         ("grpc.max_reconnect_backoff_ms", 300)]
FOLD_BUDGET = 16384


class Forgotten(Exception):
    """A stream that did not end at its deadline."""


class Broken(Exception):
    """An answer in which some records could not be had for now."""

    def __init__(self, code, text):
        super().__init__(text)
        self.status, self.text = code, text

    def code(self):
        return self.status

    def details(self):
        return self.text


CODES = {code.value[0]: code for code in Code}


class Line:
    """A worker's connection to one daemon, and which specs it has opened there."""

    def __init__(self, node):
        self.node, self.client, self.opened = node, wire.Client(node.target, options=QUICK), {}

    def spec_id(self, kind, timeout):
        if kind.name not in self.opened:
            self.opened[kind.name] = self.client.open(timeout=timeout, **kind.spec).spec_id
        return self.opened[kind.name]


class Worker(threading.Thread):
    """Ends when the load ends. An answer that must not be ends it, too."""

    def __init__(self, load, number):
        super().__init__(daemon=True)
        self.load, self.ledger, self.referee = load, load.ledger, load.referee
        self.rng, self.lines = generator(load.ledger.seed, f"worker {number}"), {}

    def run(self):
        reads = [self.get] * 9 + [self.lookup] * 3 + [self.attend, self.pin, self.give_up]
        steps = reads + [self.put] * 5 + [self.put_again, self.fold, self.put_mortal]
        while not self.load.ending.is_set():
            if not self.load.begin():
                time.sleep(0.02)
                continue
            try:
                self.rng.choice(reads if self.load.reading else steps)()
            except Wrong as wrong:
                self.referee.say(self.referee.wrong, str(wrong))
            except Exception as error:  # any at all is a finding
                self.referee.say(self.referee.odd, f"{type(error).__name__}: {error}")
            finally:
                self.load.finish()
            time.sleep(self.rng.expovariate(1 / self.load.pause_s))

    def hang_up(self):
        for line in self.lines.values():
            line.client.close()

    def twin(self):
        """Another one, for whoever wants to ask the same way; it is never started."""
        return Worker(self.load, f"twin {time.monotonic_ns()}")

    # ---- one operation through whichever daemon ----

    def line(self, tried):
        """To a daemon that was not tried yet, if there is one; seldom to one that everybody knows to be in trouble."""
        nodes = self.load.nodes()
        nodes = [n for n in nodes if n.name not in tried] or nodes
        node = self.rng.choice(nodes)
        if node.name in self.load.avoided and self.rng.random() < 0.8:
            node = self.rng.choice(nodes)
        if node.name not in self.lines:
            self.lines[node.name] = Line(node)
        return self.lines[node.name]

    def ask(self, operation, call, blocks=(), deadline_s=None):
        """call(line, timeout) through one daemon after the other until it answers or the deadline is over: (answer, line, begin),
        or ((code, text), None, begin). It should succeed, given time, when all the blocks that it needs are protected."""
        must = all(block.protected() for block in blocks)
        begin, tried, limit = time.monotonic(), [], deadline_s or self.deadline()
        while True:
            line, left = self.line(tried), begin + limit - time.monotonic()
            tried.append(line.node.name)
            try:
                answer = call(line, max(left, 0.001))
                self.referee.ended(operation, begin, limit, tried)
                return answer, line, begin
            except Forgotten:
                self.referee.add("forgotten", 1)
                return (Code.DEADLINE_EXCEEDED, ""), None, begin
            except (grpc.RpcError, Broken) as caught:
                error = caught
            code, text = error.code(), error.details() or ""
            if code == Code.NOT_FOUND and "Open the spec" in text:
                line.opened.clear()
                tried.pop()
                continue
            left = begin + limit - time.monotonic()
            if code in AGAIN and left > 0.02:
                time.sleep(min(left / 2, 0.02 * len(tried)))
                continue
            self.referee.ended(operation, begin, limit, tried, code)
            if code not in TYPED:
                self.referee.say(self.referee.odd, f"{operation} through {tried}: {code.name} {text}")
            elif must and limit >= DEADLINE_S and code != Code.NOT_FOUND and not any(block.dropped for block in blocks):
                self.referee.failed(operation, begin, tried, code, text)
            return (code, text), None, begin

    def deadline(self):
        return self.rng.choice(SHORT_S) if self.rng.random() < 0.1 else DEADLINE_S

    # ---- operations ----

    def put(self, block=None, ttl_ms=0):
        block = block or self.ledger.new(self.rng)
        payload = block.payload()

        def call(line, timeout):
            block.spec_id = line.spec_id(block.kind, timeout)
            return line.client.put(block.spec_id, block.key, payload, block.kind.tokens, timeout=timeout, ttl_ms=ttl_ms,
                                   position=block.position)

        if ttl_ms:
            block.expires = time.monotonic() + ttl_ms / 1000  # of the first attempt; a later one may live longer
        answer, line, _ = self.ask("put", call)
        if line is None:
            return
        result = answer.results[0]
        if result.key != block.key:
            raise Wrong("a Put answered for another key")
        if ttl_ms:
            block.expires = time.monotonic() + ttl_ms / 1000
        self.ledger.stored(block, result.replicas)
        self.referee.add("puts short of replicas" if result.replicas < 2 else "puts replicated", 1)
        old = self.ledger.oldest_to_drop()
        if old:
            self.drop(old)

    def put_mortal(self):
        """One that is to be gone by itself."""
        self.put(ttl_ms=4000)

    def put_again(self):
        """The same block once more, by another worker through another daemon: nothing changes."""
        for block in self.ledger.some(self.rng, 1):
            self.put(block)

    def drop(self, block):
        self.ask("drop", lambda line, timeout: line.client.drop(line.spec_id(block.kind, timeout), [block.key], timeout=timeout))

    def get(self):
        blocks = self.ledger.some(self.rng, self.rng.choice((1, 1, 2, 8)))
        if blocks:
            self.fetch(blocks)

    def fetch(self, blocks, operation="get", deadline_s=None):
        """Gets blocks of one kind and checks every byte; returns those that were not there."""
        sure = [block.protected() for block in blocks]
        answer, line, begin = self.ask(operation, lambda line, timeout: self.records(line, blocks, timeout), blocks, deadline_s)
        if line is None:
            return None
        missing = []
        for block, promised, data in zip(blocks, sure, answer):
            if data is not None:
                self.ledger.check(block, data)
                self.referee.hit()
            else:
                missing.append(block)
                if promised:
                    self.referee.missed(operation, begin, block, line.node.name)
        return missing

    def records(self, line, blocks, timeout):
        """The records of blocks, None for a miss. Broken: some could not be had."""
        request = pb.GetRequest(spec_id=line.spec_id(blocks[0].kind, timeout), keys=[b.key for b in blocks])
        stream = line.client.records("Get", request, timeout)
        with self.load.reaper.watch(stream, timeout):
            records, codes, messages, error = line.client.collect(stream, len(blocks))
        for code, message in zip(codes, messages):
            if code not in (0, Code.NOT_FOUND.value[0]):
                raise Broken(CODES[code], message)
        if error is not None and (error.code() != Code.NOT_FOUND or "Open the spec" in error.details()):
            raise error
        if error is None and None in records:
            raise Wrong("a Get ended well without all records")
        return [None if code else data for code, data in zip(codes, records)]

    def lookup(self):
        blocks = self.ledger.some(self.rng, 16)
        if not blocks:
            return
        limit = self.deadline()  # of too short a one absence is all that is left
        sure = [block.protected() and limit >= DEADLINE_S for block in blocks]
        answer, line, begin = self.ask("lookup", lambda line, timeout: line.client.lookup(
            line.spec_id(blocks[0].kind, timeout), [b.key for b in blocks], timeout=timeout), deadline_s=limit)
        if line is None:
            return
        for block, promised, state in zip(blocks, sure, answer.states):
            if state == pb.KEY_RESIDENT:
                self.referee.hit()
            elif promised:
                self.referee.missed("lookup", begin, block, line.node.name, maybe=True)

    def fold(self):
        kind = KINDS[0]
        blocks = self.ledger.run(self.rng, kind)
        if len(blocks) < 2:
            return
        answer, line, begin = self.ask("fold", lambda line, timeout: line.client.fold(
            line.spec_id(kind, timeout), [b.key for b in blocks], FOLD_BUDGET, timeout=timeout, ttl_ms=1500), blocks)
        if line is None:
            self.refused("fold", answer, begin, blocks)
        elif len(answer) > FOLD_BUDGET or record.Record(answer).tokens != kind.tokens * len(blocks):
            raise Wrong("a fold is not what was asked for")

    def refused(self, operation, answer, begin, blocks):
        """All blocks must be there for it: when all were promised, NOT_FOUND is a miss."""
        if answer[0] == Code.NOT_FOUND and all(block.protected() for block in blocks):
            self.referee.missed(f"{operation} ({answer[1]})", begin, blocks[0], "any")

    def attend(self):
        blocks = self.ledger.some(self.rng, 2, KINDS[3])
        if not blocks:
            return
        spec = blocks[0].kind.spec
        q = np.full((spec["layers"], spec["kv_heads"], 2, spec["key_dim"]), 0.25, np.float32)
        answer, line, begin = self.ask("attend", lambda line, timeout: line.client.attend(
            line.spec_id(blocks[0].kind, timeout), [b.key for b in blocks], q, timeout=timeout), blocks)
        if line is None:
            self.refused("attend", answer, begin, blocks)
        elif not np.isfinite(np.frombuffer(answer.output, "<f4")).all():
            raise Wrong("attention is not finite")

    def pin(self):
        blocks = self.ledger.some(self.rng, 3)
        if not blocks:
            return
        answer, line, begin = self.ask("pin", lambda line, timeout: line.client.pin(
            line.spec_id(blocks[0].kind, timeout), [b.key for b in blocks], 2000, timeout=timeout), blocks)
        if line is None:
            self.refused("pin", answer, begin, blocks)
            return
        try:
            line.client.unpin(answer.lease, timeout=DEADLINE_S)
        except grpc.RpcError as error:
            if error.code() not in TYPED:
                raise

    def give_up(self):
        """A Get that is left in its middle."""
        blocks = self.ledger.some(self.rng, 8)
        if not blocks:
            return

        def call(line, timeout):
            spec_id = line.spec_id(blocks[0].kind, timeout)
            stream = line.client.records("Get", pb.GetRequest(spec_id=spec_id, keys=[b.key for b in blocks]), timeout)
            next(stream, None)
            stream.cancel()
            return True

        self.ask("give up", call, blocks)


class Reaper(threading.Thread):
    """Ends streams that the client's own gRPC has forgotten to end at their deadline, as is seen now and then when a daemon is
    started again under it: no answer, no error and no end, whatever the daemon does."""

    def __init__(self):
        super().__init__(daemon=True)
        self.lock, self.streams, self.reaped = threading.Lock(), {}, set()

    @contextlib.contextmanager
    def watch(self, stream, timeout):
        """Around the use of a stream. Raises Forgotten when it had to be ended."""
        with self.lock:
            self.streams[stream] = time.monotonic() + timeout + REAP_S
        yield
        with self.lock:
            del self.streams[stream]
            if stream in self.reaped:
                self.reaped.remove(stream)
                raise Forgotten

    def run(self):
        while True:
            time.sleep(0.1)
            with self.lock:
                late = [stream for stream, until in self.streams.items() if time.monotonic() > until]
                self.reaped.update(late)
            for stream in late:
                stream.cancel()


class Load:
    """The workers of a run, to be paused while the pool is looked at as a whole."""

    def __init__(self, pool, ledger, referee, workers=4, pause_s=0.004):
        self.pool, self.ledger, self.referee, self.pause_s = pool, ledger, referee, pause_s
        self.ending, self.paused, self.reading = threading.Event(), threading.Event(), False
        self.avoided, self.hidden = set(), set()  # names of nodes to be asked seldom, and not at all
        self.active, self.changed, self.reaper = 0, threading.Condition(), Reaper()
        self.workers = [Worker(self, number) for number in range(workers)]

    def nodes(self):
        """Those that a worker may ask: all that it has been told of, running or not."""
        return [node for node in list(self.pool.nodes.values()) if node.starts and node.name not in self.hidden]

    def begin(self):
        """Whether an operation may begin."""
        with self.changed:
            self.active += not self.paused.is_set()
            return not self.paused.is_set()

    def finish(self):
        with self.changed:
            self.active -= 1
            self.changed.notify_all()

    def pause(self):
        """No operation is under way when this returns."""
        with self.changed:
            self.paused.set()
            if not self.changed.wait_for(lambda: self.active == 0, DEADLINE_S + 10):
                self.referee.say(self.referee.odd, "an operation hangs")
                faulthandler.dump_traceback()

    def resume(self):
        self.paused.clear()

    def only_reads(self, whether):
        """Nothing is put or dropped from now on, and none of it is under way; or again it is."""
        self.pause()
        self.reading = whether
        self.resume()

    def __enter__(self):
        self.reaper.start()
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        for worker in self.workers:
            worker.join(DEADLINE_S + 10)
            if worker.is_alive():
                self.referee.say(self.referee.odd, "a worker hangs")
        for worker in self.workers:  # only now: closing a channel may hold up the others
            worker.hang_up()
