"""Models for people: `outline` says what a model is made of, `page` draws it, `picture` what passes did to a block."""

from peftgraph.draw.collect_outline import outline as outline
from peftgraph.draw.html_page import fragment as fragment
from peftgraph.draw.html_page import page as page
from peftgraph.draw.layer_text import layer_texts as layer_texts
from peftgraph.draw.model_outline import Outline as Outline
from peftgraph.draw.picture_files import Picture as Picture
from peftgraph.draw.picture_files import check_suffix as check_suffix
from peftgraph.draw.rewrite_picture import Diff as Diff
from peftgraph.draw.rewrite_picture import model_picture as model_picture
from peftgraph.draw.rewrite_picture import picture as picture
