"""Weights that are stored as codes: how they are made and described."""

from peftgraph.ir.quantised import QuantisedWeight as QuantisedWeight
from peftgraph.rewrite.modules.loftq import loftq as loftq
from peftgraph.rewrite.quantiser import BLOCKS as BLOCKS
from peftgraph.rewrite.quantiser import FORMATS as FORMATS
from peftgraph.rewrite.quantiser import Codes as Codes
from peftgraph.rewrite.quantiser import Quantiser as Quantiser
from peftgraph.rewrite.quantiser import describe_codes as describe_codes
