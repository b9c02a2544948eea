"""The Trainer of embedding pairs: the contrastive loss of a batch, and retrieval over the evaluation part.

Shapes: B pairs, S tokens, D features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from peftgraph.errors import PeftGraphError
from peftgraph.training.transformers_callback import PassesCallback

TEMPERATURE = 0.05
Pool = Callable[[Tensor, Tensor], Tensor]


def mean_pool(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the mean of the states of a text's tokens, (B, D)."""
    mask_BS1 = mask_BS.unsqueeze(-1).to(hidden_BSD.dtype)
    return (hidden_BSD * mask_BS1).sum(1) / mask_BS1.sum(1)


def first_pool(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the state of the first token, (B, D)."""
    return hidden_BSD[:, 0]


def pooling(model: Path) -> Pool:
    """Return how a folder's states become a vector: as its file for sentence-transformers says, else by their mean.

    Raises:
        PeftGraphError: the file says another way.
    """
    path = model / "1_Pooling" / "config.json"
    if not path.is_file():
        return mean_pool
    document = json.loads(path.read_text(encoding="utf-8"))
    chosen = {
        key.removeprefix("pooling_mode_")
        for key, on in document.items()
        if key.startswith("pooling_mode_") and on is True
    }
    chosen |= {document["pooling_mode"]} if isinstance(document.get("pooling_mode"), str) else set()
    if chosen == {"mean_tokens"} or chosen == {"mean"}:
        return mean_pool
    if chosen == {"cls_token"} or chosen == {"cls"}:
        return first_pool
    raise PeftGraphError(
        f"{path} pools by {', '.join(sorted(chosen)) or 'nothing'}; only mean and cls are trained here."
    )


class EmbeddingTrainer(Trainer):
    """A Trainer whose loss compares every anchor with all positives of its batch (InfoNCE, both ways)."""

    def __init__(self, *args: Any, pool: Pool, passes: PassesCallback, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pool, self._passes = pool, passes

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch, with the terms of the passes."""
        a_BD, b_BD = self._vectors(model, inputs)
        scores_BB = a_BD @ b_BD.T / TEMPERATURE
        own_B = torch.arange(len(scores_BB), device=scores_BB.device)
        entropy = nn.functional.cross_entropy
        loss = (entropy(scores_BB, own_B) + entropy(scores_BB.T, own_B)) / 2
        return loss if self._passes.run is None else loss + self._passes.run.penalty()

    def _vectors(self, model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
        hidden_BSD = model(**inputs).last_hidden_state
        unit_BD = nn.functional.normalize(self._pool(hidden_BSD, inputs["attention_mask"]), dim=-1)
        half = len(unit_BD) // 2
        return unit_BD[:half], unit_BD[half:]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure how often an anchor's nearest positive, among all of the evaluation part, is its own."""
        model, anchors, positives = self.model, [], []
        assert isinstance(model, nn.Module)
        training = model.training
        model.eval()
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                a_BD, b_BD = self._vectors(model, self._prepare_inputs(batch))
                anchors.append(a_BD)
                positives.append(b_BD)
        model.train(training)
        scores_NN = torch.cat(anchors) @ torch.cat(positives).T
        own_N = torch.arange(len(scores_NN), device=scores_NN.device)
        loss = nn.functional.cross_entropy(scores_NN / TEMPERATURE, own_N)
        recall = (scores_NN.argmax(-1) == own_N).float().mean()
        found = {"eval_loss": float(loss), "eval_recall": float(recall)}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found
