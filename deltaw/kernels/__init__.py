"""The hot path: per-document attention and the loss on labelled tokens, each with a plain reference in its test."""

from deltaw.kernels.attention import document_attention
from deltaw.kernels.loss import labelled_loss, token_losses

__all__ = ["document_attention", "labelled_loss", "token_losses"]
