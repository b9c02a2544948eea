"""Training runs: hooks are called in order, with steps; states continue; wrappers, trainers and processes agree."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peftgraph as pg
from peftgraph.authoring import Pass, Rule
from peftgraph.authoring.modules import init
from peftgraph.authoring.training import AdaptedSite, SeveralHooks, TrainingHooks
from peftgraph.passes import AdaLoRA, AdapterDrop, DiffPruning, LoRA, UniPELT
from peftgraph.training.lightning_callback import lightning_callback
from peftgraph.training.transformers_callback import STATE, PassesCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_lightning as lightning

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@dataclass(frozen=True, kw_only=True)
class Shift(Pass):
    """Adds a vector that is drawn towards zero, with gradients of one sign and entries of at most `bound`."""

    word = "shift"
    bound: float = 1e-5

    def rules(self) -> list[Rule]:
        def delta(m: Any, op: Any) -> Any:
            return m.along_features(op, op.param("shift", (m.features,), init.zeros))

        return [Rule(at=pg.attention.o, delta=delta, fold="it is a test")]

    def training_hooks(self, sites: Sequence[AdaptedSite], steps: int) -> TrainingHooks:
        return Bounded([one.parameters["shift"] for one in sites], self.bound)


class Bounded(TrainingHooks):
    def __init__(self, parameters: list[Tensor], bound: float) -> None:
        self.parameters, self.bound, self.seen = parameters, bound, []

    def penalty(self, step: int) -> Tensor:
        return torch.stack([one.square().sum() for one in self.parameters]).sum()

    def before_step(self, step: int) -> None:
        for one in self.parameters:
            assert one.grad is not None
            one.grad.abs_()

    def after_step(self, step: int) -> None:
        self.seen.append(step)
        with torch.no_grad():
            for one in self.parameters:
                one.clamp_(-self.bound, self.bound)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.seen = state["seen"].tolist()


def looped(net: nn.Module, run: Any, steps: range) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for _ in steps:
        output: Any = net(**zoo.example("nano"))
        (output["logits"].square().mean() + run.penalty()).backward()
        run.before_step()
        optimizer.step()
        run.step()
        optimizer.zero_grad()


def test_hooks_act_on_the_loss_gradients_and_parameters() -> None:
    tuned = zoo.traced("nano").apply(Shift(), LoRA(rank=2))
    net = tuned.module()
    run = tuned.training(net, steps=3)
    assert float(run.penalty().detach()) == 0
    looped(net, run, range(3))
    moved = [value.detach() for name, value in tuned.table.trainable.items() if name.endswith("shift")]
    assert all(float(one.max()) <= 0 and float(one.min()) >= -1e-5 for one in moved)
    assert any(float(one.min()) == pytest.approx(-1e-5) for one in moved)
    assert run.finished == 3
    with pytest.raises(pg.PeftGraphError, match="declared with steps=3, and all are done"):
        run.step()


def test_what_a_loop_leaves_out_is_told() -> None:
    tuned = zoo.traced("nano").apply(Shift())
    net = tuned.module()
    run = tuned.training(net, steps=3)
    run.penalty()
    with pytest.raises(pg.PeftGraphError, match=r"shift changes gradients: call run.before_step\(\)"):
        run.step()
    with pytest.raises(pg.PeftGraphError, match="at least 1, got 0"):
        tuned.training(net, steps=0)
    with pytest.raises(pg.PeftGraphError, match="No pass was applied"):
        zoo.traced("nano").training(net, steps=1)
    with pytest.raises(pg.PeftGraphError, match="The module has no parameter"):
        tuned.training(zoo.build("nano"), steps=1)
    plain = zoo.traced("nano").apply(LoRA(rank=1))
    free = plain.training(plain.module(), steps=1)
    assert float(free.penalty()) == 0
    free.step()


def test_a_run_continues_from_its_state_and_refuses_another() -> None:
    tuned = zoo.traced("nano").apply(Shift())
    net = tuned.module()
    run = tuned.training(torch.compile(net, backend="eager"), steps=4)
    looped(net, run, range(2))
    state = copy.deepcopy(run.state_dict())
    again = tuned.training(net, steps=4)
    again.load_state_dict(state)
    assert again.finished == 2
    assert again.state_dict()["0.shift/seen"].tolist() == [0, 1]
    other = zoo.traced("nano").apply(LoRA(rank=1))
    with pytest.raises(pg.PeftGraphError, match="a state of 0.shift, which this program has not"):
        other.training(other.module(), steps=1).load_state_dict(state)
    with pytest.raises(pg.PeftGraphError, match="lacks 'seen' of 0.shift"):
        again.load_state_dict({"step": torch.tensor(1)})


@pytest.mark.parametrize(
    "method",
    [
        UniPELT(methods=(LoRA(rank=2, alpha=2.0), AdaLoRA(at="ffn.*", rank=2, target_rank=1, name="a"))),
        AdapterDrop(adapter=AdaLoRA(at="ffn.*", rank=2, target_rank=1), layers=1),
    ],
    ids=lambda method: method.word,
)
def test_methods_inside_methods_take_part(method: Pass) -> None:
    tuned = zoo.randomise(zoo.traced("nano").apply(method))
    net = tuned.module()
    run = tuned.training(net, steps=2)
    assert run.penalty().requires_grad
    looped(net, run, range(2))
    assert any(int((value == 0).sum()) for name, value in tuned.table.trainable.items() if name.endswith("adalora_e"))


def test_hooks_of_several_passes_are_one() -> None:
    parts = [Bounded([nn.Parameter(torch.full((2,), value))], 1.0) for value in (2.0, 3.0)]
    both = SeveralHooks(parts)
    penalty = both.penalty(0)
    assert penalty is not None
    assert float(penalty.detach()) == 2 * 4 + 2 * 9
    both.after_step(5)
    fresh = SeveralHooks([Bounded([], 1.0), Bounded([], 1.0)])
    fresh.load_state_dict(both.state_dict())
    assert [part.seen for part in fresh.parts] == [[5], [5]]  # type: ignore
    assert SeveralHooks([TrainingHooks()]).penalty(0) is None


# trainers


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, zoo.VOCAB, (6,), generator=generator)  # one text, so that no order of them matters
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 8


@pytest.fixture(scope="module")
def llama() -> pg.Program:
    model: Any = zoo.build("llama", dtype=torch.float64)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return pg.trace(model, transformers.default_data_collator(rows()[:2]))


METHOD = AdaLoRA(at="attention.q|attention.v", rank=4, target_rank=2, warmup=1, final=2, orthogonality=0.3)
STEPS = 8


def fresh(base: pg.Program) -> pg.Program:
    torch.manual_seed(3)
    return base.apply(METHOD)


def trainer(tuned: pg.Program, where: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(where), use_cpu=True, max_steps=STEPS, learning_rate=0.02, report_to=[], disable_tqdm=True,
        lr_scheduler_type="constant", max_grad_norm=0.0,
        **{"per_device_train_batch_size": 2, "save_strategy": "no", **options},
    )  # fmt: skip
    return Trainer(tuned.module(), arguments, train_dataset=rows(), callbacks=[PassesCallback(tuned)])


def values(tuned: pg.Program) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tuned.table.trainable.items()}


@pytest.fixture(scope="module")
def looped_llama(llama: pg.Program) -> dict[str, Tensor]:
    """What a plain loop ends at."""
    tuned = fresh(llama)
    net = tuned.module().train()
    run = tuned.training(net, steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    batch = transformers.default_data_collator(rows()[:2])
    for _ in range(STEPS):
        (net(**batch).loss + run.penalty()).backward()
        optimizer.step()
        run.step()
        optimizer.zero_grad()
    found = values(tuned)
    assert sum(int((value != 0).sum()) for name, value in found.items() if name.endswith("_e")) == 2 * 2 * 2
    return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}], ids=str)
def test_the_trainer_ends_where_a_plain_loop_does(
    options: dict[str, int], llama: pg.Program, looped_llama: dict[str, Tensor], tmp_path: Path
) -> None:
    tuned = fresh(llama)
    trainer(tuned, tmp_path, **options).train()
    assert distance(values(tuned), looped_llama) < 1e-9


def test_the_trainer_resumes_to_the_bit(llama: pg.Program, tmp_path: Path) -> None:
    whole = fresh(llama)
    trainer(whole, tmp_path, save_strategy="steps", save_steps=5).train()
    resumed = fresh(llama)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert distance(values(resumed), values(whole)) == 0
    (tmp_path / "checkpoint-5" / STATE).unlink()
    with pytest.raises(pg.PeftGraphError, match=f"contains no {STATE}"):
        trainer(fresh(llama), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_lightning_ends_where_a_plain_loop_does(
    llama: pg.Program, looped_llama: dict[str, Tensor], tmp_path: Path
) -> None:
    tuned = fresh(llama)
    net = tuned.module().train()
    callback = lightning_callback(tuned, net)

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(**batch).loss + callback.run.penalty()

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.net.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)

    loader = torch.utils.data.DataLoader(rows(), batch_size=2, collate_fn=transformers.default_data_collator)  # type: ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[callback], default_root_dir=str(tmp_path),
        ).fit(Task(), loader)  # fmt: skip
    assert distance(values(tuned), looped_llama) < 1e-9
    assert int(callback.state_dict()["step"]) == STEPS


def test_a_checkpoint_of_a_pass_with_a_stored_form_has_the_module_s_tensors(llama: pg.Program, tmp_path: Path) -> None:
    """Once the entries are chosen, the adapter's file has these alone, which the Trainer could not load."""
    torch.manual_seed(0)
    whole = llama.apply(DiffPruning(target=0.1, final=4))
    trainer(whole, tmp_path, save_strategy="steps", save_steps=8).train()
    torch.manual_seed(1)
    resumed = llama.apply(DiffPruning(target=0.1, final=4))
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert distance(values(resumed), values(whole)) == 0
    # Weights of others are never replaced, whichever form the adapter has.
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(pg.PeftGraphError, match="holds other weights"):
        whole.module().save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    fresh(llama).module().save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    assert load_file(tmp_path / "model.safetensors").keys() == {"w"}
