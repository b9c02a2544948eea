"""One trace at a time, and nothing of what the caller has switched on in it: torch.export and the pieces around it
patch what all threads share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from peftgraph.capture.diagnosis import EXPORT_LOCK
from peftgraph.capture.eager_run import generators_restored


@contextmanager
def isolated_trace(model: nn.Module) -> Iterator[None]:
    """Wait for other traces, then enable gradients, disable autocast, and restore the random generators at the end."""
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} - {"meta"}
    with EXPORT_LOCK, ExitStack() as stack:
        stack.enter_context(generators_restored(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in sorted(devices | {"cpu"}):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
