"""Rewards that runs compute in workers, which import this module: it therefore imports little."""

import time


def letters(completion_ids, **columns):
    return [float(sum(14 < token < 30 for token in ids)) for ids in completion_ids]


async def letters_async(completion_ids):
    return letters(completion_ids)


class Gated:
    """A reward function of workers: all calls but the first wait until an update has begun."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, completion_ids):
        if (self.folder / "rewarded").exists():
            end = time.monotonic() + 30
            while not (self.folder / "updating").exists() and time.monotonic() < end:
                time.sleep(0.01)
            assert (self.folder / "updating").exists(), "waited in vain"
        (self.folder / "rewarded").touch()
        return letters(completion_ids)


def fails_on(completion_ids, score, ids):
    if ids in completion_ids:
        raise KeyError("made up")
    return score


def none_for(completion_ids, score, ids):
    return [None if one == ids else value for one, value in zip(completion_ids, score, strict=True)]


def described(prompt, meta, hint, text, image):
    return repr((prompt, meta, hint, len(text), set(text), image.size, image.getpixel((1, 2))))


def seen(prompts, completions, meta, hint, text, image, log_extra):
    log_extra("columns", list(map(described, prompts, meta, hint, text, image)))
    return [float(len(completion)) for completion in completions]
