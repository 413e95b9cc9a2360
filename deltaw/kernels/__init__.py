"""The hot path: what a decoder layer computes, forward and backward, each piece with a plain reference in its test."""

from deltaw.kernels.attention import document_attention
from deltaw.kernels.block import Heads, gated_sum, normed, normed_projections, projected_sum, rotary_attention
from deltaw.kernels.linear import Branch
from deltaw.kernels.loss import labelled_loss, log_probabilities, token_losses
from deltaw.kernels.pointwise import Norm
from deltaw.kernels.tiles import Span, continued_spans, spans_of

__all__ = [
    "Branch",
    "Heads",
    "Norm",
    "Span",
    "continued_spans",
    "document_attention",
    "gated_sum",
    "labelled_loss",
    "log_probabilities",
    "normed",
    "normed_projections",
    "projected_sum",
    "rotary_attention",
    "spans_of",
    "token_losses",
]
