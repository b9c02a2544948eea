"""P-tuning: its encoders against torch.nn's, and its places in a template against the model on embeddings."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import LoRA, PTuning

F64 = torch.float64
LENGTH, TOKEN = 3, 7


class Encoder(nn.Module):
    """h in plain PyTorch."""

    def __init__(self, lstm: bool, width: int, hidden: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(LENGTH, width))
        self.lstm = nn.LSTM(width, hidden, 2, bidirectional=True, batch_first=True) if lstm else None
        sizes = (2 * hidden, 2 * hidden, width) if lstm else (width, hidden, hidden, width)
        self.layers = nn.ModuleList(nn.Linear(inner, outer) for inner, outer in pairwise(sizes))

    def forward(self) -> Tensor:
        x = self.start if self.lstm is None else self.lstm(self.start[None])[0][0]
        for i, layer in enumerate(self.layers):
            x = layer(x.relu() if i else x)
        return x


def reference(program: pg.Program, lstm: bool, hidden: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The encoder with the program's values, and its parameters by our names."""
    encoder = Encoder(lstm, zoo.WIDTH, hidden).to(F64)
    same: dict[str, nn.Parameter] = {}
    theirs = dict(encoder.named_parameters())
    for name, parameter in program.table.trainable.items():
        leaf = name.rpartition(".")[2]
        key = leaf if leaf == "start" else leaf.replace("lstm_", "lstm.", 1)
        if leaf.startswith("layer"):
            key = f"layers.{leaf[5]}.{leaf.partition('_')[2]}"
        same[name] = theirs[key]
        with torch.no_grad():
            same[name].copy_(parameter)
    assert len(same) == len(theirs)
    return encoder, same


@pytest.mark.parametrize(("encoder", "hidden"), [("lstm", None), ("lstm", 5), ("mlp", 6)])
def test_pseudo_tokens_are_embedded_as_the_encoder_s_rows(encoder: str, hidden: int | None) -> None:
    torch.manual_seed(0)
    program = zoo.randomise(
        zoo.traced("gpt2", "sdpa", F64).apply(PTuning(length=LENGTH, token=TOKEN, encoder=encoder, hidden=hidden))
    )
    inputs = zoo.example("gpt2", 2, 9, F64)
    inputs["input_ids"][inputs["input_ids"] == TOKEN] = TOKEN + 1
    places = torch.tensor([[0, 3, 5], [1, 2, 6]])
    inputs["input_ids"].scatter_(1, places, TOKEN)
    theirs, same = reference(program, encoder == "lstm", hidden or zoo.WIDTH // 2)
    model = zoo.build("gpt2", dtype=F64).requires_grad_(False)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    index = places.unsqueeze(-1).expand(-1, -1, zoo.WIDTH)
    embedded = embedded.scatter(1, index, theirs().expand(2, -1, -1))
    wanted = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
    ours = program.module().eval()(**inputs).logits
    assert float((ours - wanted).abs().max().detach()) < 1e-12 * float(wanted.abs().max().detach())
    for out in (ours, wanted):
        out.square().sum().backward()
    scale = max(float(p.grad.abs().max()) for p in same.values())
    for name, parameter in program.table.trainable.items():
        assert parameter.grad is not None
        assert float(same[name].grad.abs().max()) > 0, name
        assert float((parameter.grad - same[name].grad).abs().max()) < 1e-11 * scale, name


def test_a_token_beyond_the_vocabulary_is_never_looked_up() -> None:
    base = zoo.traced("bert", "sdpa", F64)
    inside, beyond = (base.apply(PTuning(length=2, token=token, encoder="none")) for token in (TOKEN, zoo.VOCAB + 5))
    with torch.no_grad():
        for one, other in zip(inside.table.trainable.values(), beyond.table.trainable.values(), strict=True):
            other.copy_(one)
    inputs = zoo.example("bert", 2, 9, F64)
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == TOKEN, TOKEN + 1)
    outputs = []
    for program, token in ((inside, TOKEN), (beyond, zoo.VOCAB + 5)):
        inputs["input_ids"] = ids.clone()
        inputs["input_ids"][:, 2:4] = token
        outputs.append(program.module().eval()(**inputs).last_hidden_state)
    assert torch.equal(*outputs)
    assert beyond.remove().text() == base.text()


def test_pseudo_tokens_beyond_the_last_row_stay_what_they_are() -> None:
    base = zoo.traced("gpt2", "sdpa", F64)
    program = base.apply(PTuning(length=1, token=TOKEN, encoder="none"))
    with torch.no_grad():  # the row is the token's own embedding: nothing may change
        next(iter(program.table.trainable.values())).copy_(base.table["transformer.wte.weight"].tensor[TOKEN][None])
    inputs = zoo.example("gpt2", 2, 9, F64)
    inputs["input_ids"][:, 2:6] = TOKEN
    assert torch.equal(*(one.module().eval()(**inputs).logits for one in (base, program)))


@pytest.mark.parametrize("token", [None, TOKEN])
def test_finalize_keeps_the_outputs_and_drops_the_encoder(token: int | None, tmp_path) -> None:
    base = zoo.traced("llama", "sdpa", F64)
    program = zoo.randomise(base.apply(PTuning(length=LENGTH, token=token), LoRA(rank=2)))
    final = program.finalize()
    inputs = zoo.example("llama", 2, 9, F64)
    inputs["input_ids"][:, 1:4] = TOKEN
    assert torch.equal(*(one.module().eval()(**inputs).logits for one in (program, final)))
    assert final.text() == base.apply(PTuning(length=LENGTH, token=token, encoder="none"), LoRA(rank=2)).text()
    loaded = base.load_adapter(final.save_adapter(tmp_path / "final"))
    assert loaded.table.hashes() == final.table.hashes()


def test_counts() -> None:
    """peft's on a BERT-base with 20 rows, and the authors' LSTM of D / 2."""
    count = lambda **options: zoo.traced("bert").apply(PTuning(**options)).count().trainable  # noqa: E731
    width, rows = zoo.WIDTH, 4
    assert count(length=rows, encoder="none") == rows * width
    assert count(length=rows, encoder="mlp") == rows * width + 3 * (width * width + width)
    hidden = width // 2
    lstm = 2 * (4 * hidden * (width + hidden) + 8 * hidden) + 2 * (4 * hidden * (2 * hidden + hidden) + 8 * hidden)
    assert count(length=rows) == rows * width + lstm + 2 * (width * width + width)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "length must"),
        ({"token": -1}, "token must"),
        ({"encoder": "gru"}, "encoder must be"),
        ({"hidden": 0}, "hidden must"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(pg.RecipeError, match=words):
        PTuning(**options)
