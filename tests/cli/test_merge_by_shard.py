"""merge, shard by shard: the default for several files, kill -9 and resume, and a folder that appears whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import sharded
import torch
import zoo
from sharded import contents, differing
from transformers import AutoModel

import peftgraph as pg
from peftgraph.cli.unfinished import unfinished_folder, work_folder

KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from peftgraph.cli import merge_shards

@contextmanager
def until(total):
    written = [0]
    def wrote(count):
        written[0] += count
        if written[0] > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)
    yield wrote

merge_shards._bar = until
merge_shards.merge(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), force=False)
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
    return sorted(path.name for path in folder.iterdir())


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
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    result = cli("merge", base, theirs, "--out", tmp_path / "full")
    assert result.exit_code == 1
    assert "--force replaces it" in result.stderr
    assert listed(tmp_path) == ["a", "full"]
    assert cli("merge", base, theirs, "--out", tmp_path / "full", "--force").exit_code == 0
    assert listed(tmp_path / "full") == listed(base)
    assert listed(tmp_path) == ["a", "full"]


def test_an_adapter_of_peft_is_merged_in_memory_too(cli, base: Path, theirs: Path, tmp_path: Path) -> None:
    result = cli("merge", base, theirs, "--out", tmp_path / "whole", "--whole")
    assert result.exit_code == 0, result.stderr
    assert "outputs" in result.stdout  # compared, which merging by shard cannot do
    assert cli("merge", base, theirs, "--out", tmp_path / "sharded").exit_code == 0
    assert differing(contents(tmp_path / "whole"), contents(tmp_path / "sharded")) == []


def interrupted(target: Path, job: str, found: list[str]) -> None:
    """A try that finds some files, finishes one, begins another, and is interrupted."""

    def attempt() -> None:
        with unfinished_folder(target, job, ["whole", "part"]) as new:
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
    with unfinished_folder(target, "two", ["whole", "part"]) as new:
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
    with pytest.raises(pg.PeftGraphError, match="--force"), unfinished_folder(target, "one", ["whole"]):
        pass
    assert (target / "precious").read_text() == "mine"
    (work / "old").mkdir()  # replaced, and the old one not deleted yet
    (work / "old" / "stale").write_text("old")
    with unfinished_folder(target, "one", ["whole"], force=True) as new:
        assert listed(new) == ["whole"]
    assert listed(target) == ["whole"]
    assert listed(tmp_path) == ["target"]


def test_a_foreign_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    work = work_folder(tmp_path / "target")
    work.mkdir()
    (work / "precious").write_text("mine")
    with pytest.raises(pg.PeftGraphError, match="is in the way"), unfinished_folder(tmp_path / "target", "one", []):
        pass
    assert listed(work) == ["precious"]
    (work / "precious").unlink()
    (work / ".job-1").mkdir()  # killed before it said what it is
    with unfinished_folder(tmp_path / "target", "one", []):
        pass
    assert listed(tmp_path) == ["target"]
