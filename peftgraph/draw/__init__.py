"""Models for people: `outline` says what a model is made of, `page` draws it, `picture` what passes did to a block."""

from peftgraph.draw.collect_outline import outline as outline
from peftgraph.draw.html_page import fragment as fragment
from peftgraph.draw.html_page import page as page
from peftgraph.draw.model_outline import Outline as Outline
from peftgraph.draw.rewrite_picture import Diff as Diff
from peftgraph.draw.rewrite_picture import Picture as Picture
from peftgraph.draw.rewrite_picture import picture as picture
