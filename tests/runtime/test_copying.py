"""Programs and modules are copied, and say what to save instead of a pickle."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import peftgraph as pg
from peftgraph.passes import LoRA

X = torch.randn(2, 4)


@pytest.fixture(scope="module")
def tuned() -> pg.Program:
    return pg.trace(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), (X,)).apply(
        LoRA(at="head", rank=2)
    )


@pytest.mark.parametrize("what", ["module", "program"])
def test_a_pickle_is_refused_with_what_to_save(what: str, tuned: pg.Program) -> None:
    item = tuned.module() if what == "module" else tuned
    for write in (lambda: torch.save(item, io.BytesIO()), *(lambda p=p: pickle.dumps(item, p) for p in range(2, 6))):
        with pytest.raises(pg.NoPickle, match=r"save_adapter.*state_dict\(\).*write_back.*export") as error:
            write()
        assert isinstance(error.value, TypeError)


def test_copies_and_state_dicts_work(tuned: pg.Program) -> None:
    net = tuned.module().eval()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    again = tuned.module().eval()
    again.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.copy(net), copy.deepcopy(net), again, copy.deepcopy(tuned).module().eval()):
        assert torch.equal(twin(X), net(X))
    deep = copy.deepcopy(net)
    with torch.no_grad():
        deep.get_parameter("2.weight").zero_()
    assert not torch.equal(deep(X), net(X))
