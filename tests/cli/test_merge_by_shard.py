"""merge, shard by shard: the default for several files, kill -9 and resume, and a folder that appears whole."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import faults
import peft
import pytest
import sharded
import torch
import zoo
from sharded import contents, differing
from transformers import AutoModel

import peftgraph as pg
from peftgraph.cli import merge_by_shard
from peftgraph.cli.resumable_folder import is_finished, resumable_folder, work_folder
from peftgraph.model_folders.output_folder import MADE, atomic_folder, note_made
from peftgraph.utils import atomic_files
from peftgraph.utils.atomic_files import atomic_file

KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from peftgraph.cli import merge_by_shard

@contextmanager
def until(total):
    written = [0]
    def wrote(count):
        written[0] += count
        if written[0] > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)
    yield wrote

assert hasattr(merge_by_shard, '_progress_bar')
merge_by_shard._progress_bar = until
merge_by_shard.merge(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), force=False)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT in shards, with a file that stands for its tokenizer."""
    folder = sharded.saved("bert", tmp_path_factory.mktemp("base") / "model")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def theirs(base: Path) -> Path:
    """An adapter of peft."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(zoo.build("bert"), config).save_pretrained(str(base.parent / "theirs"))  # pyright: ignore
    return base.parent / "theirs"


def listed(folder: Path) -> list[str]:
    """The names in a folder, without what says that the command made it."""
    return sorted(path.name for path in folder.iterdir() if path.name != MADE)


def test_several_files_are_merged_by_shard(cli, base: Path, tmp_path: Path) -> None:
    tuned = zoo.randomise(zoo.traced("bert").apply(pg.load_recipe("lora{rank=2}; ia3{}")))
    tuned.save_adapter(tmp_path / "a")
    result = cli("merge", base, tmp_path / "a", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    assert "equal to the base's text" in result.stdout
    assert "0 of them kept from before" in result.stdout
    assert listed(tmp_path / "merged") == listed(base)
    expected = pg.fold(tuned).write_back(zoo.build("bert"))
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in merged.state_dict().items())
    assert listed(tmp_path) == ["a", "merged"]


def test_a_merge_that_was_killed_goes_on(cli, base: Path, theirs: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "merged", tmp_path / "merged.unfinished"
    done = subprocess.run([sys.executable, "-c", KILLED, base, theirs, out], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert listed(tmp_path) == ["merged.unfinished"]
    finished = {path.name: path.read_bytes() for path in (work / "new").glob("*.safetensors")}
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(finished) == shards[: len(finished)]
    assert 0 < len(finished) < len(shards)
    assert len(listed(work / "new")) == len(finished) + 1  # and the half-written one, under another name
    result = cli("merge", base, theirs, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert f"{len(finished)} of them kept from before" in result.stdout
    assert listed(tmp_path) == ["merged"]
    assert listed(out) == listed(base)
    assert cli("merge", base, theirs, "--out", tmp_path / "anew").exit_code == 0
    assert all((out / name).read_bytes() == (tmp_path / "anew" / name).read_bytes() for name in listed(out))
    assert len(differing(contents(out), contents(base))) == 4


def test_everything_is_refused_before_anything_is_written(cli, base: Path, theirs: Path, tmp_path: Path) -> None:
    config = json.loads((theirs / "adapter_config.json").read_text())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "VERA"}))
    result = cli("merge", base, tmp_path / "a", "--out", tmp_path / "merged")
    assert result.exit_code == 1
    assert "VERA" in result.stderr
    assert cli("merge", base, tmp_path, "--out", tmp_path / "merged").exit_code == 1
    assert "needs --whole" in cli("merge", base, theirs, "--out", tmp_path / "merged", "--untie", "--by-shard").stderr
    more = ("--prove", "outputs", "--by-shard")
    assert "needs --whole" in cli("merge", base, theirs, "--out", tmp_path / "merged", *more).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    result = cli("merge", base, theirs, "--out", tmp_path / "full")
    assert result.exit_code == 1
    assert "--force replaces it" in result.stderr
    assert listed(tmp_path) == ["a", "full"]
    result = cli("merge", base, theirs, "--out", tmp_path / "full", "--force")
    assert result.exit_code == 1
    assert "was not made by this command, and --force replaces no other" in result.stderr
    assert listed(tmp_path / "full") == ["precious.txt"]
    assert listed(tmp_path) == ["a", "full"]


def test_force_replaces_what_this_command_made(cli, base: Path, theirs: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert cli("merge", base, theirs, "--out", out).exit_code == 0
    (out / "stale.txt").write_text("from before")
    assert "--force" in cli("merge", base, theirs, "--out", out).stderr
    assert cli("merge", base, theirs, "--out", out, "--force").exit_code == 0
    assert listed(out) == listed(base)
    assert listed(tmp_path) == ["merged"]


def test_what_the_run_reads_is_never_replaced(cli, base: Path, theirs: Path, tmp_path: Path) -> None:
    source, adapter = tmp_path / "in" / "model", tmp_path / "in" / "adapter"
    shutil.copytree(base, source)
    shutil.copytree(theirs, adapter)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shard = next(source.glob("*.safetensors"))
    shard.rename(blobs / "1")
    shard.symlink_to(blobs / "1")
    for folder in (source, adapter, tmp_path / "in", blobs):
        note_made(folder, "job")
    before = sorted(tmp_path.rglob("*"))
    for out in (source, adapter, tmp_path / "in", tmp_path / "link", blobs):
        for how in ("--by-shard", "--whole"):
            result = cli("merge", source, adapter, "--out", out, "--force", how)
            assert result.exit_code == 1
            assert "which is read here; choose another folder" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("changed", ["config.json", "model-00001", "adapter_config.json"])
def test_a_source_that_changes_meanwhile_is_noticed(
    changed: str, cli, base: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(base, source)
    shutil.copytree(theirs, adapter)
    (path,) = (one for folder in (source, adapter) for one in folder.iterdir() if one.name.startswith(changed))
    write = merge_by_shard.write_shards

    def meanwhile(*args: Any) -> int:
        kept = write(*args)
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)  # the same, as far as a size tells
        return kept

    monkeypatch.setattr(merge_by_shard, "write_shards", meanwhile)
    result = cli("merge", source, adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 1
    assert f"{path} has changed while it was read" in result.stderr.replace("\n", "")
    monkeypatch.undo()
    assert not (tmp_path / "merged").exists()
    result = cli("merge", source, adapter, "--out", tmp_path / "merged")
    assert "0 of them kept from before" in result.stdout
    assert listed(tmp_path / "merged") == listed(source)


def test_an_adapter_of_peft_is_merged_in_memory_too(cli, base: Path, theirs: Path, tmp_path: Path) -> None:
    result = cli("merge", base, theirs, "--out", tmp_path / "whole", "--whole")
    assert result.exit_code == 0, result.stderr
    assert "outputs" in result.stdout  # compared, which merging by shard cannot do
    assert cli("merge", base, theirs, "--out", tmp_path / "sharded").exit_code == 0
    assert differing(contents(tmp_path / "whole"), contents(tmp_path / "sharded")) == []


def interrupted(target: Path, job: str, found: list[str]) -> None:
    """A try that finds some files, finishes one, begins another, and is interrupted."""

    def attempt() -> None:
        with resumable_folder(target, job, ["whole", "part"]) as new:
            assert listed(new) == found
            (new / "whole").write_text(job)
            (new / "other").write_text(job)
            (new / ".part-1").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()


def test_finished_files_are_kept_for_the_same_job_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    interrupted(target, "one", [])
    assert not target.exists()
    interrupted(target, "one", ["whole"])
    with resumable_folder(target, "two", ["whole", "part"]) as new:
        assert listed(new) == []
        (new / "whole").write_text("two")
    assert (target / "whole").read_text() == "two"
    assert listed(tmp_path) == ["target"]


def test_a_kill_around_the_last_step_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    interrupted(target, "one", [])
    work = work_folder(target)
    (work / "old").mkdir()  # moved away, and the new one is not there yet
    (work / "old" / "precious").write_text("mine")
    note_made(work / "old", "another")
    with pytest.raises(pg.PeftGraphError, match="--force"), resumable_folder(target, "one", ["whole"]):
        pass
    assert (target / "precious").read_text() == "mine"
    (work / "old").mkdir()  # replaced, and the old one not deleted yet
    (work / "old" / "stale").write_text("old")
    with resumable_folder(target, "one", ["whole"], force=True) as new:
        assert listed(new) == ["whole"]
    assert listed(target) == ["whole"]
    assert listed(tmp_path) == ["target"]


def make(target: Path, what: str, force: bool) -> None:
    """A job of two files, as a merge does it."""
    if is_finished(target, what):
        return
    with resumable_folder(target, what, ["whole"], force) as new:
        if not (new / "whole").exists():
            with atomic_file(new / "whole") as temporary:
                temporary.write_text(what)
        (new / "other").write_text(what)


def content(target: Path) -> list[str]:
    return [(target / name).read_text() for name in ("whole", "other")]


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("force", [False, True])
def test_a_kill_at_any_step_is_gone_on_from(
    force: bool, in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one_step:
        monkeypatch.setattr(atomic_files, "_exchange", lambda a, b: False)
    target = tmp_path / "in" / "target"

    def start() -> None:
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        target.parent.mkdir()
        if force:
            make(target, "before", False)

    start()
    count = faults.steps(lambda: make(target, "after", force))
    assert count > 10
    for at in range(1, count + 1):
        start()
        faults.killed(at, lambda: make(target, "after", force))
        if force and in_one_step:
            assert content(target) in (["before", "before"], ["after", "after"])
        make(target, "after", force)
        assert content(target) == ["after", "after"], at
        assert listed(target) == ["other", "whole"]
        assert listed(target.parent) == ["target"], at


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_that_is_replaced_as_a_whole_survives_a_kill(
    in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one_step:
        monkeypatch.setattr(atomic_files, "_exchange", lambda a, b: False)
    target = tmp_path / "in" / "target"

    def save(what: str, force: bool = True) -> None:
        with atomic_folder(target, force) as new:
            (new / "whole").write_text(what)

    save("before", False)
    count = faults.steps(lambda: save("after"))
    for at in range(1, count + 1):
        shutil.rmtree(tmp_path / "in")
        save("before", False)
        faults.killed(at, lambda: save("after"))
        atomic_files.remove_leftovers(target.parent)
        assert (target / "whole").read_text() in ("before", "after")
        save("after")
        assert (target / "whole").read_text() == "after"
        assert listed(target.parent) == ["target"], at


def test_two_runs_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with resumable_folder(target, "one", ["whole"]) as new:
        (new / "whole").write_text("one")
        with pytest.raises(pg.PeftGraphError, match="Another process is merging into"):
            make(target, "two", False)
    assert (target / "whole").read_text() == "one"
    assert listed(tmp_path) == ["target"]


def test_a_foreign_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    work = work_folder(tmp_path / "target")
    work.mkdir()
    (work / "precious").write_text("mine")
    with pytest.raises(pg.PeftGraphError, match="is in the way"), resumable_folder(tmp_path / "target", "one", []):
        pass
    assert listed(work) == ["precious"]
    (work / "precious").unlink()
    (work / ".job-1").mkdir()  # killed before it said what it is
    with resumable_folder(tmp_path / "target", "one", []):
        pass
    assert listed(tmp_path) == ["target"]
