"""Models for people: `outline(program, sites)` says what a model is made of, `page(outline)` draws it."""

from .collect import outline as outline
from .document import fragment as fragment
from .document import page as page
from .parts import Outline as Outline
