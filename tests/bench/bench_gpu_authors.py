#!/usr/bin/env python3
"""Times the published BalanceKV (as its authors' code computes it; arXiv 2502.07861) in PyTorch on this machine's GPU.

    bench_gpu_authors.py [--layers 32] [--heads 8] [--tokens 8192] [--dim 128]

Written from the algorithm: keys of a block of 128 are centred, the kernel is exp(<k, k'> / sqrt d) * (<v, v'> + 0.025), each
token in turn takes sign +1 with probability 1/2 - gamma * (signed sum so far), and exactly half survive; two halvings, to
25 % of the tokens. The walk goes token by token, but over all blocks and heads of a layer at once, which is as batched as
PyTorch allows without kernels of one's own. The last line is "seconds" and the time of all layers.
"""
import argparse
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("no PyTorch here")

BLOCK, ROUNDS, GAMMA, FLOOR = 128, 2, 4.0, 0.025


def halve(keys, values, generator):
    """One halving of [batch, n, dim] keys and values: n / 2 survivors, their weights multiplied into V."""
    batch, n, dim = keys.shape
    centred = keys - keys.mean(dim=1, keepdim=True)
    kernel = torch.exp(centred @ centred.transpose(1, 2) / dim ** 0.5) * (values @ values.transpose(1, 2) + FLOOR)
    signs = torch.zeros(batch, n, dtype=kernel.dtype, device=keys.device)
    draws = torch.rand(n, batch, generator=generator, device=keys.device)
    for i in range(n):
        pull = (kernel[:, i] * signs).sum(dim=1)
        signs[:, i] = torch.where(draws[i] < 0.5 - GAMMA * pull, 1.0, -1.0).to(kernel.dtype)
    # Up to the place where one sign has n / 2 the other sign is kept with weight 2; after it everything with weight 1.
    counts = torch.stack([(signs > 0).cumsum(1), (signs < 0).cumsum(1)])
    full = (counts >= n // 2).any(0)
    place = full.int().argmax(dim=1, keepdim=True)
    minority = torch.where(counts[0].gather(1, place) >= n // 2, -1.0, 1.0)
    order = torch.arange(n, device=keys.device)[None]
    kept = torch.where(order <= place, signs == minority, True)
    weight = torch.where(order <= place, 2.0, 1.0).to(values.dtype)
    index = kept.float().topk(n // 2, dim=1).indices.sort(dim=1).values[:, :, None].expand(-1, -1, dim)
    return keys.gather(1, index), (values * weight[:, :, None]).gather(1, index)


def compress_layer(keys, values, generator):
    """[heads, tokens, dim] to [heads, tokens / 4, dim]."""
    heads, tokens, dim = keys.shape
    size = BLOCK
    keys, values = keys.reshape(-1, size, dim), values.reshape(-1, size, dim)
    for _ in range(ROUNDS):
        keys, values = halve(keys, values, generator)
    return keys.reshape(heads, -1, dim), values.reshape(heads, -1, dim)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU that PyTorch sees")
    generator = torch.Generator(device="cuda").manual_seed(1)
    shape = (options.layers, options.heads, options.tokens, options.dim)
    keys = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    times = []
    with torch.inference_mode():
        compress_layer(keys[0], values[0], generator)
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for layer in range(options.layers):
                kept = compress_layer(keys[layer], values[layer], generator)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    assert kept[0].shape[1] == options.tokens // 4
    print(f"authors' algorithm in PyTorch {torch.__version__}: {sorted(times)[1]:.3f} s for {shape}")
    print(f"seconds {sorted(times)[1]:.6f}")


if __name__ == "__main__":
    main()
