"""The methods, one file each."""

from peftgraph.passes.bitfit import BitFit as BitFit
from peftgraph.passes.ia3 import IA3 as IA3
from peftgraph.passes.lora import LoRA as LoRA
from peftgraph.passes.serial_adapter import SerialAdapter as SerialAdapter
