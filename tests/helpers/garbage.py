"""Garbage collections that look at what tests make, not at what they import."""

import gc


def freeze_imports() -> None:
    """Keep what is imported out of garbage collections: Trainer asks for a full one at the start of each run.

    With torch, transformers and datasets loaded, it takes as long as a run of a small model.
    """
    gc.collect()
    gc.freeze()
