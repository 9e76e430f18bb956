"""How completions are scored: what one forward sees, and the log-probabilities that come of it."""

from .completion import Completion
from .logprobs import Scores, evaluation_mode, score, score_completions
from .packing import Piece, make_piece


__all__ = ["Completion", "Piece", "Scores", "evaluation_mode", "make_piece", "score", "score_completions"]
