"""Quality of KV summaries on a real model: what a compressed cache still knows, for every byte that it keeps.

    BKV_MODEL_DIR=MODEL make bench-quality              all columns; 4,096 and 16,384 tokens, 212 questions of each kind
    BKV_MODEL_DIR=MODEL make bench-quality QUALITY="--quick"  a few minutes on two cores
    PYTHONPATH=tests python3 -m bench.quality --help                 the options

BKV_MODEL_DIR is a folder with lm.py (a language model in NumPy), its weights and its tokenizer. Contexts are made from the .txt
files in BKV_TEXTS (default: BKV_MODEL_DIR/../books); any plain prose will do. Only `make kernels`, Python and NumPy are needed;
`--device cuda` computes with CuPy instead.

A context is a stretch of a book, with facts hidden in it or as it is. The model reads it once; its cache, but for the newest
tokens (the window, which an engine still holds exactly), is then stored in each of the ways below, before any question is
known. From what is stored the model answers questions (where there are facts) or reads on (where there are none):

    needle      "what is the access code of Olive Dalton?": right when each of six digits is the model's first choice
    bAbI        "where is Cora now?": of one or two moves that are told the last counts; right when each token of the place is
    NLL         nats a token of the 256 tokens that follow in the book
    KL          of the model with the summary from the exact one, on these tokens
    error       relative Frobenius error of the attention outputs of the next 64 queries of the exact model, layer by layer

The ways, at true stored bytes (codes, scales, zeros, indices, weights; rate = bytes as bf16 / bytes stored):

    ours        libbkvkernels through ctypes: raw, dense8, dense4, balance, folds; configurations.py lists them. Which heads the
                bytes go to is measured once for the model on other texts (shares.py)
    baselines   written here from their papers (baselines.py) over the same quantiser, each given as many tokens as the bytes
                hold, with 4 and with 3 bits: uniform sampling, StreamingLLM, BalanceKV as its authors published it, KeyDiff,
                SnapKV without the question, WildCat; and every token at int4, int2

Files: context.py makes contexts, model.py runs the model over any cache, kernels.py calls our kernels, storage.py quantises and
counts bytes for baselines.py and wildcat.py, shares.py measures which heads need the bytes, configurations.py is the list of
columns, results.py sums up and judges against the bars, picture.py draws, worker.py is one process, __main__.py spreads the
work over them.
"""
