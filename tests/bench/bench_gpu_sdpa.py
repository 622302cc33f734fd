#!/usr/bin/env python3
"""Times PyTorch's flash attention for one decode step over a whole bfloat16 cache.

    bench_gpu_sdpa.py SEQUENCES TOKENS QUERY_HEADS KV_HEADS DIM

Also prints what the other ways of PyTorch take. The last line is "seconds" and the median of the flash backend with grouped
queries; only the backend that runs fastest of those that know them is kept where flash refuses.
"""
import sys

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    sys.exit("no PyTorch here")

WARM, TURNS = 3, 15


def seconds(run):
    """Median time of run() by events of the device."""
    for _ in range(WARM):
        run()
    times = []
    for _ in range(TURNS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[TURNS // 2]


def main():
    sequences, tokens, query_heads, heads, dim = (int(word) for word in sys.argv[1:6])
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(sequences, query_heads, 1, dim, **kind)
    k = torch.randn(sequences, heads, tokens, dim, **kind)
    v = torch.randn(sequences, heads, tokens, dim, **kind)
    # The query heads of a KV head as so many queries: the same sums without a mask, and each key is read once.
    folded = q.view(sequences, heads, query_heads // heads, dim)
    ways = {
        "flash, enable_gqa": (SDPBackend.FLASH_ATTENTION, q, True),
        "flash, query heads as queries": (SDPBackend.FLASH_ATTENTION, folded, False),
        "cudnn, enable_gqa": (SDPBackend.CUDNN_ATTENTION, q, True),
    }
    found = {}
    for name, (backend, query, grouped) in ways.items():
        def run(backend=backend, query=query, grouped=grouped):
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=grouped)
        try:
            found[name] = seconds(run)
        except RuntimeError as error:
            print(f"PyTorch, {name}: {str(error).splitlines()[0]}")
            continue
        rate = 2 * k.numel() * k.element_size() / found[name]
        print(f"PyTorch {torch.__version__}, {name}: {1e6 * found[name]:.0f} us, {rate / 1e9:.0f} GB/s")
    if not found:
        sys.exit("PyTorch has no attention for this shape")
    print("seconds", found.get("flash, enable_gqa", min(found.values())))


if __name__ == "__main__":
    main()
