#!/usr/bin/env python3
"""Makes trace.safetensors: the KV cache of a real model that reads a real book, small enough for a repository.

    BKV_MODEL_DIR=MODEL make_trace.py BOOK.txt [--tokens 2048] [--layers 1,3,5,7] [--queries 256] [--out trace.safetensors]

BKV_MODEL_DIR holds lm.py (with its weights beside it), whose `trace` verb writes k.N and v.N [kv heads, tokens, dim],
q.N [query heads, tokens, dim] and ids, all after RoPE, as F16. Queries are most of that; only the newest ones are kept,
because attention is judged on these.
"""
import argparse
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
from support import safetensors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", default="1,3,5,7")
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--out", default=os.path.join(HERE, "trace.safetensors"))
    options = parser.parse_args()
    model = os.environ.get("BKV_MODEL_DIR")
    if not model:
        sys.exit("make_trace.py: BKV_MODEL_DIR must name the folder of lm.py")

    with tempfile.TemporaryDirectory() as folder:
        whole = os.path.join(folder, "whole.safetensors")
        subprocess.run([sys.executable, os.path.join(model, "lm.py"), "trace", whole, "--book", options.book, "--tokens",
                        str(options.tokens), "--layers", options.layers], check=True)
        tensors, meta = safetensors.load(whole)
    for name in tensors:
        if name.startswith("q."):
            tensors[name] = tensors[name][:, -options.queries:]
    meta.update(book=os.path.basename(options.book), layers=options.layers, queries=options.queries,
                query_positions=f"the newest {options.queries}")
    safetensors.save(options.out, tensors, meta)
    print(f"{options.out}: {os.path.getsize(options.out) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
