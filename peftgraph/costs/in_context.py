"""What learning in context costs, beside training: operations by the number of parameters and tokens.

A token costs 2 N operations at inference and 6 N in training, for N parameters; half of that in an encoder-decoder,
where each token passes one of its two halves.
Source: Kaplan et al., arXiv 2001.08361, section 2.1; T-Few, arXiv 2205.05638, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftgraph.errors import PeftGraphError


@dataclass(frozen=True)
class InContext:
    """Learning from examples in the prompt.

    Attributes:
        examples: k.
        tokens: of each example, and of what is asked.
        operations: of one prediction.
    """

    examples: int
    tokens: int
    operations: float

    @classmethod
    def of(cls, parameters: int, examples: int, tokens: int, *, encoder_decoder: bool) -> InContext:
        """Count a prediction. Arguments and errors as for `in_context_operations`."""
        operations = in_context_operations(parameters, examples, tokens, tokens, encoder_decoder=encoder_decoder)
        return cls(examples, tokens, operations)

    def __str__(self) -> str:
        return f"in context, {self.examples} examples of {self.tokens} tokens"


def in_context_operations(
    parameters: int, examples: int, example_tokens: int, query_tokens: int, *, encoder_decoder: bool = False
) -> float:
    """Return the operations of one prediction with `examples` in the prompt, without a cache of them.

    Args:
        parameters: N.
        examples: k, the examples in the prompt.
        example_tokens: tokens of an example.
        query_tokens: tokens of what is asked, with the answer.
        encoder_decoder: whether the model is one.

    Example:
        >>> in_context_operations(175_000_000_000, 41, 98, 103)  # GPT-3 as T-Few counts it
        1442350000000000.0
    """
    _check(parameters, example_tokens, query_tokens)
    if examples < 0:
        raise PeftGraphError(f"examples must be at least 0, got {examples}.")
    return (1.0 if encoder_decoder else 2.0) * parameters * (examples * example_tokens + query_tokens)


def training_operations(
    parameters: int, steps: int, batch: int, tokens: int, *, encoder_decoder: bool = False
) -> float:
    """Return the operations of a training in which gradients flow through the whole model.

    Args:
        parameters: N.
        steps: of the optimiser.
        batch: rows of a step.
        tokens: of a row.
        encoder_decoder: whether the model is one.
    """
    _check(parameters, steps, batch, tokens)
    return (3.0 if encoder_decoder else 6.0) * parameters * steps * batch * tokens


def _check(*numbers: int) -> None:
    if any(number < 1 for number in numbers):
        raise PeftGraphError(f"Parameters, steps, rows and tokens must be at least 1, got {numbers}.")
