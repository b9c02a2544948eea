"""The public interface for plug-ins: foreign adapter formats and exporters, and the registries that find them by name.

A distribution adds one by an entry point, in the same way as a pass:

    [project.entry-points."peftgraph.adapter_formats"]
    mine = "my_package.adapters:FORMAT"

    [project.entry-points."peftgraph.exporters"]
    tflite = "my_package.export:EXPORTER"

Code adds one for its own process by registering it: `EXPORTERS.register(Exporter(...))`.
"""

from peftgraph.interop.adapter_formats import ADAPTER_FORMATS as ADAPTER_FORMATS
from peftgraph.interop.adapter_formats import AdapterFormat as AdapterFormat
from peftgraph.ir.program import ProgramData as ProgramData
from peftgraph.rewrite.method import SHARED as SHARED
from peftgraph.rewrite.method import ParameterKey as ParameterKey
from peftgraph.rewrite.method import PassWithValues as PassWithValues
from peftgraph.runtime.export.registry import EXPORTERS as EXPORTERS
from peftgraph.runtime.export.registry import Exporter as Exporter
from peftgraph.utils.registry import Registry as Registry
