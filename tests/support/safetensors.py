"""safetensors files: an 8-byte little-endian length, a JSON header, the tensors' raw little-endian bytes."""
import json

import numpy as np

KINDS = {"F16": np.float16, "F32": np.float32, "I32": np.int32}


def load(path):
    """{name: array}, {metadata}."""
    with open(path, "rb") as file:
        data = file.read()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8:8 + length])
    meta = head.pop("__metadata__", {})
    tensors = {}
    for name, entry in head.items():
        first, last = entry["data_offsets"]
        raw = data[8 + length + first:8 + length + last]
        tensors[name] = np.frombuffer(raw, KINDS[entry["dtype"]]).reshape(entry["shape"])
    return tensors, meta


def save(path, tensors, meta):
    names = {np.dtype(kind).name: name for name, kind in KINDS.items()}
    head, blobs, offset = {"__metadata__": {key: str(value) for key, value in meta.items()}}, [], 0
    for name, array in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        head[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape),
                      "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blobs)
