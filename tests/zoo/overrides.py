"""What the general rules of `shrink` cannot know of a model type."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
CLASSES: dict[str, str] = {}
INPUTS: dict[str, Any] = {}
UNBUILT: dict[str, str] = {}
