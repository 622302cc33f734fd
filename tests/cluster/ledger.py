"""What has been put into the pool, and therefore what every answer must be: the checker's memory. It asks nobody.

Every payload follows from the seed, its kind and its number. Raw records give it back byte by byte; a summary is the same bytes
whoever made it, so that the first one seen decides. Two kinds share their keys, under two tenants with other contents: they must
never meet.
"""
import collections
import hashlib
import random
import threading
import time

from pool import pb

from support import record

Kind = collections.namedtuple("Kind", "name spec payload_bytes tokens share")


def kind(name, tenant, codec, layers, heads, dim, tokens, share, model=None):
    spec = dict(model=model or name, tenant=tenant, layers=layers, kv_heads=heads, key_dim=dim, dtype=pb.DTYPE_BF16,
                block_tokens=tokens, codec=codec, rate=8, sink_tokens=8, seed=11)
    return Kind(name, spec, layers * heads * tokens * 2 * dim * 2, tokens, share)


KINDS = [kind("red", "red", pb.CODEC_RAW, 2, 2, 32, 64, 6, model="shared"),  # 32 KiB
         kind("green", "green", pb.CODEC_RAW, 2, 2, 32, 64, 6, model="shared"),
         kind("large", "blue", pb.CODEC_RAW, 4, 4, 64, 128, 1),  # 512 KiB
         kind("summary", "", pb.CODEC_BALANCE, 2, 2, 64, 128, 4)]  # 128 KiB, of which 16 are kept


class Wrong(AssertionError):
    """An answer that is not what was put."""


class Block:
    """One block: what is known of it changes only under the ledger's lock."""

    def __init__(self, kind_, number, seed):
        self.kind, self.number, self.seed = kind_, number, seed
        self.key = (b"%s-%d-" % (kind_.spec["model"].encode(), number)).ljust(32, b".")
        self.spec_id, self.position = None, number * kind_.tokens
        self.acknowledged, self.replicas = None, 0  # when, by how many
        self.dropped, self.digest, self.expires = False, None, None

    def payload(self):
        """Finite bf16 numbers, all of them from the name: random bits without the top one of the exponent."""
        name = f"{self.seed} {self.kind.name} {self.number}".encode()
        page = hashlib.shake_128(name).digest(4096)
        bits = int.from_bytes(page, "little") & int.from_bytes(b"\xff\x3f" * 2048, "little")
        page = bits.to_bytes(4096, "little")
        count = self.kind.payload_bytes // 4096
        # Pages differ by where they begin, so that one in another's place is noticed.
        return b"".join(page[2 * (i % 2048):] + page[:2 * (i % 2048)] for i in range(count))

    def protected(self):
        """Two daemons have said that they hold it, and nobody was asked to forget it."""
        return self.acknowledged is not None and self.replicas >= 2 and not self.dropped and self.expires is None


class Ledger:
    """All blocks of a run. limit_bytes: of payload that is to be kept at a time; what is older is to be dropped."""

    def __init__(self, seed, limit_bytes):
        self.seed, self.limit_bytes = seed, limit_bytes
        self.lock, self.blocks, self.live, self.bytes = threading.Lock(), [], [], 0
        self.next = collections.Counter()
        self.mortal = []

    def new(self, rng):
        """A block that nobody has put yet."""
        kind_ = rng.choices(KINDS, [k.share for k in KINDS])[0]
        with self.lock:
            self.next[kind_.name] += 1
            block = Block(kind_, self.next[kind_.name], self.seed)
            self.blocks.append(block)
        return block

    def stored(self, block, replicas):
        """Acknowledged, now, by so many owners (each time one more Put of it has ended)."""
        with self.lock:
            first = block.acknowledged is None
            block.acknowledged = block.acknowledged or time.monotonic()
            block.replicas = max(block.replicas, replicas)
            if first and block.expires is None:
                self.live.append(block)
                self.bytes += block.kind.payload_bytes
            elif first:
                self.mortal.append(block)

    def oldest_to_drop(self):
        """A block to be dropped, when there are more than there should be; it is none of the live ones from now on."""
        with self.lock:
            return self._take(0) if self.bytes > self.limit_bytes else None

    def drop(self, block):
        with self.lock:
            if block in self.live:
                self._take(self.live.index(block))

    def _take(self, at):
        block = self.live.pop(at)
        block.dropped = True
        self.bytes -= block.kind.payload_bytes
        return block

    def some(self, rng, count, kind_=None):
        """Live blocks of one kind, newer ones more often; maybe fewer than count, maybe none."""
        with self.lock:
            live = [b for b in self.live[-400:] if kind_ is None or b.kind is kind_]
            if not live:
                return []
            kind_ = kind_ or rng.choice(live).kind
            live = [b for b in live if b.kind is kind_]
        return rng.sample(live, min(count, len(live)))

    def run(self, rng, kind_, most=4):
        """Live blocks whose tokens follow one another, oldest first."""
        with self.lock:
            live = {b.number: b for b in self.live[-400:] if b.kind is kind_}
        if not live:
            return []
        first = number = rng.choice(list(live))
        while number in live and number < first + most:
            number += 1
        return [live[n] for n in range(first, number)]

    def all(self):
        with self.lock:
            return list(self.live)

    def take_dropped(self):
        """(kind, blocks of it that were dropped), each block once."""
        with self.lock:
            gone = [block for block in self.blocks if block.dropped and block.spec_id]
            self.blocks = [block for block in self.blocks if not block.dropped]
        return [(kind_, [b for b in gone if b.kind is kind_]) for kind_ in KINDS if any(b.kind is kind_ for b in gone)]

    def lost(self, blocks):
        """Nobody can have them any more, and nobody promised to: they were with one daemon only."""
        with self.lock:
            for block in blocks:
                if block in self.live:
                    self._take(self.live.index(block))

    # ---- answers ----

    def check(self, block, data):
        """Raises Wrong when data is not the record of the block."""
        try:
            got = record.Record(data)
        except ValueError as error:
            raise Wrong(f"{block.kind.name} {block.number}: no record: {error}") from None
        if got.key != block.key or (block.spec_id and got.spec_id != block.spec_id) or got.tokens != block.kind.tokens:
            raise Wrong(f"{block.kind.name} {block.number}: the record of another block")
        if block.kind.spec["codec"] == pb.CODEC_RAW:
            if not data.endswith(block.payload()):
                raise Wrong(f"{block.kind.name} {block.number}: other bytes than were put")
            return
        digest = hashlib.sha256(data).digest()
        with self.lock:
            block.digest = block.digest or digest
            if block.digest != digest:
                raise Wrong(f"{block.kind.name} {block.number}: another summary than before")


def generator(seed, name):
    """A source of chance of its own for everything that has a name."""
    return random.Random(f"{seed} {name}")
