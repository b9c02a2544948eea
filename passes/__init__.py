"""The methods, one file each."""

from .adapter_drop import AdapterDrop as AdapterDrop
from .adapter_fusion import AdapterFusion as AdapterFusion
from .adapter_plus import AdapterPlus as AdapterPlus
from .bitfit import BitFit as BitFit
from .ciat import CIAT as CIAT
from .compacter import Compacter as Compacter
from .compacter import CompacterPP as CompacterPP
from .dora import DoRA as DoRA
from .freeze import Freeze as Freeze
from .freeze_statistics import FreezeStatistics as FreezeStatistics
from .houlsby import Houlsby as Houlsby
from .ia3 import IA3 as IA3
from .invertible import Invertible as Invertible
from .lora import LoRA as LoRA
from .loreft import LoReFT as LoReFT
from .mam import MAM as MAM
from .parallel_adapter import ParallelAdapter as ParallelAdapter
from .pfeiffer import Pfeiffer as Pfeiffer
from .prefix import Prefix as Prefix
from .prompt import Prompt as Prompt
from .ptuning import PTuning as PTuning
from .serial_adapter import SerialAdapter as SerialAdapter
from .trainable_tokens import TrainableTokens as TrainableTokens
from .unipelt import UniPELT as UniPELT
from .zero_init_prefix import ZeroInitPrefix as ZeroInitPrefix
