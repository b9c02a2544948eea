"""A word to the user where a pass leaves out sublayers of the kind that it is put on."""

from __future__ import annotations

from collections.abc import Sequence

from peftgraph.errors import LeftOut, warn
from peftgraph.rewrite.method import Pass
from peftgraph.sites import Absent


def warn_of(absent: Sequence[Absent], methods: Sequence[Pass]) -> None:
    """Warn of the sublayers that passes left out."""
    sublayers = list(dict.fromkeys(one for one in absent if one.site.role == "attention"))
    if not sublayers:
        return
    words = "\n  ".join(map(str, sublayers[:4])) + ("\n  ..." if len(sublayers) > 4 else "")
    warn(
        f"{' '.join(map(str, methods))} leaves out {len(sublayers)} attention(s) of this model:\n  {words}\n"
        "program.left_out lists them; attention.o and attention.core are sites there as well.",
        LeftOut,
    )
