"""How completions are scored: what one forward sees, and the log-probabilities that come of it."""

from .completion import Completion
from .head import enable_scoring
from .logprobs import Scores, evaluation_mode, score, score_completions
from .packing import Packer, Piece
from .shared_prefix import serve_shared_prefix
from .support import disagreement, unservable


__all__ = [
    "Completion",
    "Packer",
    "Piece",
    "Scores",
    "disagreement",
    "enable_scoring",
    "evaluation_mode",
    "score",
    "score_completions",
    "serve_shared_prefix",
    "unservable",
]
