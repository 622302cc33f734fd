"""A shares file for `bkv --shares`, from the model's own loss: python3 -m bench.quality.calibrate --out shares.json

What `bkv calibrate` takes from the error of attention in traces, this takes from the model itself (shares.py), which tells
more: how far the next-token distribution moves when one head alone is compressed. BKV_MODEL_DIR names a folder with lm.py.
"""
import argparse
import os

from . import shares
from .model import Model


def main():
    parser = argparse.ArgumentParser(prog="bench.quality.calibrate",
                                     description="Measures which heads of a model need the bytes.")
    add = parser.add_argument
    add("--texts", default=os.environ.get("BKV_TEXTS"), help="folder of .txt files (BKV_TEXTS; default "
        "BKV_MODEL_DIR/../books), others than those to judge on")
    add("--out", required=True, help="file to write, JSON")
    add("--backend", default="auto", help="of the kernels")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the model computes; cuda needs CuPy")
    options = parser.parse_args()
    model = os.environ.get("BKV_MODEL_DIR")
    if not model:
        parser.error("BKV_MODEL_DIR must name a folder with lm.py and its weights")
    texts = options.texts or os.path.join(model, "..", "books")
    found = shares.measure(Model(model, options.device), texts, options.backend)
    shares.save(found, options.out)
    print("\n".join(f"layer {layer}: {' '.join(f'{share:4d}' for share in row)}" for layer, row in enumerate(found)))


if __name__ == "__main__":
    main()
