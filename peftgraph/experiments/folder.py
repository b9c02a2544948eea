"""The folder of an experiment: new, begun anew, or continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from peftgraph.errors import PeftGraphError, shortened
from peftgraph.experiments.settings import Settings
from peftgraph.model_folders.output_folder import check_target, note_made
from peftgraph.utils.atomic_files import atomic_file, read_regular_file

SETTINGS, CHECKPOINTS = "experiment.json", "checkpoints"


def check_folder(settings: Settings, resume: bool, force: bool) -> None:
    """Check that a folder may be written, or continued, without changing it.

    Raises:
        PeftGraphError: it may not; where it holds another experiment, the message names what differs.
    """
    out, begun = settings.out, (settings.out / SETTINGS).is_file()
    if resume:
        _check_same(settings)
    elif begun and not force:
        raise PeftGraphError(f"{out} holds an experiment: --resume continues it, --force begins anew.")
    else:
        check_target(out, force, [settings.model])
        read = (settings.data, settings.eval_data, Path(settings.recipe) if "{" not in settings.recipe else None)
        inside = next(
            (path for path in read if path is not None and path.resolve().is_relative_to(out.resolve())), None
        )
        if inside is not None:
            raise PeftGraphError(f"{out} holds {inside}, which is read here; choose another folder.")


def begin(settings: Settings, resume: bool) -> None:
    """Make the folder, empty; or leave it as it is."""
    if resume:
        return
    shutil.rmtree(settings.out, ignore_errors=True)
    settings.out.mkdir(parents=True, exist_ok=True)
    note_made(settings.out, "train")
    with atomic_file(settings.out / SETTINGS) as path:
        path.write_text(json.dumps(settings.as_json(), indent=1), encoding="utf-8")


def last_checkpoint(out: Path) -> Path | None:
    """Return the last complete checkpoint of an experiment; None where there is none."""
    found = [path for path in (out / CHECKPOINTS).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _check_same(settings: Settings) -> None:
    path = settings.out / SETTINGS
    try:
        before: dict[str, Any] = json.loads(read_regular_file(path))
    except (OSError, ValueError):
        raise PeftGraphError(f"{settings.out} holds no experiment to resume; leave out --resume.") from None
    now = settings.as_json()
    for name in now:
        if name in ("model", "data", "eval_data", "recipe"):
            continue  # a path may have moved; the content counts
        if before.get(name) != now[name]:
            old, new = (shortened(str(one)) for one in (before.get(name), now[name]))
            raise PeftGraphError(
                f"{settings.out} cannot be resumed: {name} was {old} and is {new}. Begin anew in another folder."
            )
