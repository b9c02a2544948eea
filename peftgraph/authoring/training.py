"""What a pass is written with that takes part in training: terms of the loss, masks, schedules."""

from peftgraph.interop.site_selection import selector_for as selector_for
from peftgraph.ir.site_statistics import SiteStatistics as SiteStatistics
from peftgraph.ir.site_statistics import Statistic as Statistic
from peftgraph.rewrite.adapted_sites import AdaptedSite as AdaptedSite
from peftgraph.rewrite.distributed import agreed as agreed
from peftgraph.rewrite.distributed import assign as assign
from peftgraph.rewrite.distributed import full as full
from peftgraph.rewrite.method import ParameterKey as ParameterKey
from peftgraph.rewrite.method import PassWithValues as PassWithValues
from peftgraph.rewrite.training_hooks import SeveralHooks as SeveralHooks
from peftgraph.rewrite.training_hooks import TrainingHooks as TrainingHooks
