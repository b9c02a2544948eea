"""Models for people: `outline` says what a model is made of, `page` draws it, `picture` what passes did to a block."""

from peftgraph.draw.collect import outline as outline
from peftgraph.draw.document import fragment as fragment
from peftgraph.draw.document import page as page
from peftgraph.draw.parts import Outline as Outline
from peftgraph.draw.picture import Diff as Diff
from peftgraph.draw.picture import Picture as Picture
from peftgraph.draw.picture import picture as picture
