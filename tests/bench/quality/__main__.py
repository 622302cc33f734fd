"""The command line: contexts are spread over processes, results summed up, judged, printed and drawn."""
import argparse
import multiprocessing
import os
import sys
import time
from concurrent import futures

from support import BUILD

from . import context, picture, results, shares, worker

QUICK = {"lengths": "4096:4:2", "windows": "64", "bits": "4"}
FULL = {"lengths": "4096:18:13,16384:13:7", "windows": "64,512", "bits": "4,3"}
QUESTIONS, QUESTIONS_LONG = 6, 8  # of each kind in a context, and in one of over 8,192 tokens; more confuse the exact model

def numbers(text):
    return [int(word) for word in text.split(",")]


def parse():
    parser = argparse.ArgumentParser(prog="bench.quality", description="How much a compressed KV cache still knows.")
    add = parser.add_argument
    add("--texts", default=os.environ.get("BKV_TEXTS"), help="folder of .txt files (BKV_TEXTS; default BKV_MODEL_DIR/../books)")
    add("--calibrate", help="folder of .txt files that the heads' shares are measured on (default BKV_MODEL_DIR/../books); the "
        "first few are not judged on")
    add("--shares", default=os.path.join(BUILD, "quality-shares.json"), help="shares file (as of `bkv calibrate`), "
        "measured where it is missing; \"equal\" for none")
    add("--quick", action="store_true", help=f"a few minutes on two cores: --lengths {QUICK['lengths']} and less of the rest")
    add("--lengths", help="tokens : contexts with facts : contexts of plain text, ... "
        f"(default {FULL['lengths']})")
    add("--windows", help=f"newest tokens that stay exact (default {FULL['windows']}); questions and baselines "
        "with the first one alone")
    add("--rates", default="8,16,32", help="bytes as bf16 / bytes stored")
    add("--bits", help=f"of the baselines' elements (default {FULL['bits']})")
    add("--questions", type=int, help=f"codes, and people, hidden in a context (default {QUESTIONS}; {QUESTIONS_LONG} beyond "
        "8,192 tokens)")
    add("--seeds", default="7,101,202", help="dealt to the contexts in turn")
    add("--only", help="families of ours, comma-separated, and/or \"baselines\"")
    add("--backend", default="auto", help="of the kernels")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the model and WildCat compute; cuda needs CuPy")
    add("--jobs", type=int, default=os.cpu_count(), help="processes")
    add("--limit", type=float, help="seconds after which contexts that are not done are left out, aloud")
    add("--no-cache", action="store_true", help="do not keep prefilled caches in the build folder")
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.model = os.environ.get("BKV_MODEL_DIR")
    if not options.model:
        parser.error("BKV_MODEL_DIR must name a folder with lm.py and its weights")
    books = os.path.join(options.model, "..", "books")
    options.texts = options.texts or books
    options.calibrate = options.calibrate or (books if os.path.isdir(books) else options.texts)
    options.windows, options.rates, options.bits = numbers(options.windows), numbers(options.rates), numbers(options.bits)
    options.seeds, options.only = numbers(options.seeds), options.only and options.only.split(",")
    return options


def plan(options):
    """[(tokens, text, seed, questions)], longest contexts first, so that no process is left with one at the end, and both kinds
    in turn, so that a limit leaves some of each."""
    jobs = []
    for word in options.lengths.split(","):
        tokens, facts, plain = numbers(word.replace(":", ","))
        texts = context.find_texts(options.texts, tokens)
        if options.shares != "equal" and os.path.samefile(options.texts, options.calibrate):
            texts = texts[shares.CONTEXTS:] or texts
        questions = options.questions or (QUESTIONS_LONG if tokens > 8192 else QUESTIONS)
        for i in range(facts + plain):
            seed = options.seeds[i % len(options.seeds)] * 1000 + i
            turn = i / facts if i < facts else (i - facts) / plain
            jobs.append((-tokens, turn, (tokens, texts[i % len(texts)], seed, questions if i < facts else 0)))
    return [job for _, _, job in sorted(jobs)]


def work(options, jobs):
    """[(job, exact judgement, rows)] of all contexts that were done in time, in the order of jobs."""
    count = max(1, min(options.jobs, len(jobs)))
    if count > 1:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before the processes load NumPy
    done, spawn, began = [], multiprocessing.get_context("spawn"), time.monotonic()
    with futures.ProcessPoolExecutor(count, spawn, worker.start, (options,)) as pool:
        known = None if options.shares == "equal" else pool.submit(worker.measure_shares).result()
        left = options.limit and max(1, options.limit - (time.monotonic() - began))
        try:
            for future in futures.as_completed([pool.submit(worker.run, job, known) for job in jobs], left):
                job, base, rows, seconds = future.result()
                done.append((job, base, rows))
                kind = f"{job[3]} codes and {job[3]} people" if job[3] else "plain text"
                print(f"  {os.path.basename(job[1])}, {job[0]:,} tokens, seed {job[2]}, {kind}: {seconds:.0f} s", flush=True)
        except futures.TimeoutError:
            print(f"  LEFT OUT: {len(jobs) - len(done)} of {len(jobs)} contexts were not done in {options.limit:.0f} s")
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
    return sorted(done, key=lambda item: jobs.index(item[0]))


def main():
    options = parse()
    done = work(options, plan(options))
    if not done:
        sys.exit("bench.quality: no context was done in time")
    sums = results.sum_up(done)
    met = results.report_all(sums, options.rates)
    picture.draw(sums, os.path.join(BUILD, "bench", "quality.svg"))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
