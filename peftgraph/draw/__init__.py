"""Models for people: `outline` says what a model is made of, `page` draws it, `picture` what passes did to a block."""

from .collect import outline as outline
from .document import fragment as fragment
from .document import page as page
from .parts import Outline as Outline
from .picture import Diff as Diff
from .picture import Picture as Picture
from .picture import picture as picture
