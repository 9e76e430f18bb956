"""How completions are scored: what one forward sees, and the log-probabilities that come of it."""

from .completion import Completion
from .dealing import GroupSize, deal
from .flash import merge_parts
from .head import causal_lm, enable_scoring
from .layout import Layout
from .logprobs import Scores, evaluation_mode, score, score_completions
from .packing import Packer, Piece, by_prompt
from .shared_prefix import attending_by, serve_shared_prefix, shared_prefix_attention
from .support import disagreement, ignored_window, tolerance, unservable


__all__ = [
    "Completion",
    "GroupSize",
    "Layout",
    "Packer",
    "Piece",
    "Scores",
    "attending_by",
    "by_prompt",
    "causal_lm",
    "deal",
    "disagreement",
    "enable_scoring",
    "evaluation_mode",
    "ignored_window",
    "merge_parts",
    "score",
    "score_completions",
    "serve_shared_prefix",
    "shared_prefix_attention",
    "tolerance",
    "unservable",
]
