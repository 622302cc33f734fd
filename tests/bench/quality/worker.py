"""One process of the bench: it loads the model once and takes contexts, one after the other."""
import os
import time

from support import BUILD

from . import configurations, context, shares
from .model import Model

loaded = {}  # what this process loads once


def start(options):
    loaded["options"], loaded["model"] = options, Model(options.model, options.device)


def measure_shares():
    """The model's shares, from the texts for that; kept in the build folder."""
    options = loaded["options"]
    return shares.of_model(loaded["model"], options.calibrate, options.backend, options.shares)


def run(job, model_shares):
    """One context in all columns: (job, exact judgement, rows, seconds)."""
    (tokens, path, seed, questions), options, model = job, loaded["options"], loaded["model"]
    began = time.monotonic()
    story = context.Context(model.tokenizer, path, tokens, seed, questions)
    story.read(model, None if options.no_cache else os.path.join(BUILD, "quality-cache"))
    judge = context.Judge(model, story)
    rows = configurations.columns(story, judge, options.windows[:1] if questions else options.windows, options, model_shares)
    return job, judge.base, rows, time.monotonic() - began
