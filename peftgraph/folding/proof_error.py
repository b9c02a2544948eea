"""The error of a proof that fails."""

from peftgraph.errors import PeftGraphError


class ProofError(PeftGraphError):
    """The proof of a fold failed. Nothing was changed."""
