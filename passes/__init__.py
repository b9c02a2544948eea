"""The methods, one file each."""

from .bitfit import BitFit as BitFit
from .ia3 import IA3 as IA3
from .lora import LoRA as LoRA
from .serial_adapter import SerialAdapter as SerialAdapter
