"""peft's prefixes in a decoder beside an encoder: what they are, read and written.

peft hands every layer the rows of two attentions and empties the cache of the second; positions count from the prefix's
length on. BART takes no positions, so that ours are traced with a table that starts that many rows later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import peft_directories as pd
import pytest
import torch
import transformers
import zoo
from torch import nn

import peftgraph as pg
from peftgraph.passes import Prefix

LENGTH, TABLE = 4, "model.decoder.embed_positions.weight"
AT = 'attention.core & stack("decoder") & kind("self")'


def bart(layers: int, later: int = 0) -> nn.Module:
    """A small random BART whose decoder's positions start some rows later."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=zoo.VOCAB, d_model=48, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, init_std=0.3,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        table = model.get_parameter(TABLE)
        table.copy_(table.roll(-later, 0))
    return model


def inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, -2:] = 0
    tokens = {name: torch.randint(3, zoo.VOCAB, (2, size)) for name, size in (("input", 7), ("decoder_input", 5))}
    return {f"{name}_ids": value for name, value in tokens.items()} | {"attention_mask": mask}


def traced(layers: int, later: int = LENGTH) -> pg.Program:
    return pg.trace(bart(layers, later), inputs())


@pytest.mark.parametrize(("layers", "hidden"), [(1, None), (2, None), (3, 6)])
def test_a_prefix_that_peft_wrote(layers: int, hidden: int | None, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=LENGTH,
        prefix_projection=hidden is not None,
        encoder_hidden_size=hidden,
    )
    theirs = pd.wrapped("bart", config, bart(layers))
    directory = pd.saved(theirs, tmp_path)
    with pytest.warns(UserWarning, match=f"Trace a model whose {TABLE} starts 4 rows later") as caught:
        loaded = traced(layers).load_adapter(directory)
    assert caught[0].filename == __file__
    wanted = pd.asked(theirs, inputs())
    assert pd.difference(pd.asked(loaded.module(), inputs()), wanted) < 1e-6
    assert pd.difference(pd.asked(bart(layers), inputs()), wanted) > 1e-2
    assert len(loaded.edits) == layers


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_prefix_for_peft(layers: int, tmp_path: Path) -> None:
    tuned = zoo.randomise(traced(layers).apply(Prefix(at=AT, length=LENGTH, hidden=None)), 0.2)
    if layers == 2:
        with pytest.raises(pg.AdapterError, match="gives layers 0 and 1 of the decoder one prefix, and these differ"):
            tuned.save_adapter(tmp_path / "adapter", format="peft")
        assert not (tmp_path / "adapter").exists()
        rows = [parameter for name, parameter in tuned.table.trainable.items() if "layers.1." in name]
        first = [parameter for name, parameter in tuned.table.trainable.items() if "layers.0." in name]
        with torch.no_grad():
            for parameter, other in zip(rows, first, strict=True):
                parameter.copy_(other)
    with pytest.warns(UserWarning, match="starts 4 rows later for the answers that peft gives") as caught:
        directory = tuned.save_adapter(tmp_path / "adapter", format="peft")
    assert caught[0].filename == __file__
    theirs = pd.read_by_peft("bart", directory, bart(layers))
    assert pd.difference(pd.asked(theirs, inputs()), pd.asked(tuned.module(), inputs())) < 1e-6


def test_the_position_table_makes_the_difference(tmp_path: Path) -> None:
    theirs = pd.wrapped("bart", peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH), bart(2))
    with pytest.warns(UserWarning, match="without that tokens keep their own positions"):
        loaded = traced(2, later=0).load_adapter(pd.saved(theirs, tmp_path))
    assert pd.difference(pd.asked(loaded.module(), inputs()), pd.asked(theirs, inputs())) > 1e-3


@pytest.mark.parametrize("attn", zoo.ATTENTIONS)
def test_t5_gives_the_prefix_biases(attn: str, tmp_path: Path) -> None:
    theirs = pd.wrapped("t5", peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH))
    loaded = zoo.traced("t5", attn).load_adapter(pd.saved(theirs, tmp_path))
    example = zoo.example("t5", 2, 9)
    wanted = pd.asked(theirs, example)
    assert "placed=true" in str(loaded.recipe)
    assert pd.difference(pd.asked(loaded.module(), example), wanted) < 1e-6
    assert pd.difference(pd.asked(zoo.build("t5"), example), wanted) > 1e-2
    again = pd.read_by_peft("t5", loaded.save_adapter(tmp_path / "again", format="peft"))
    assert pd.difference(pd.asked(again, example), wanted) < 1e-6


def test_a_prefix_without_them_is_not_pefts(tmp_path: Path) -> None:
    tuned = zoo.traced("t5").apply(Prefix(at=AT, length=LENGTH, hidden=None))
    with pytest.raises(pg.AdapterError, match="biases of the distance fall on its prefix, as with placed=true"):
        tuned.save_adapter(tmp_path / "adapter", format="peft")


def test_a_prefix_in_all_attentions_is_not_pefts(tmp_path: Path) -> None:
    tuned = traced(1).apply(Prefix(length=LENGTH, hidden=None))
    with pytest.raises(pg.AdapterError, match="its prefix occurs once in every self-attention of the decoder"):
        tuned.save_adapter(tmp_path / "adapter", format="peft")
