"""Turn the arrays of the data loader (lingua/dataloader/packing.py) into batches of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apps.LT2.kernel.documents import upload_cu_seqlens
from lingua.dataloader.packing import NO_TARGET, document_offsets

if TYPE_CHECKING:
    import numpy as np

Batch = tuple[Tensor, Tensor, Tensor | None]  # x, target, cu_seqlens


def to_device(views_BTN: np.ndarray, doc_mask: bool, device: torch.device) -> Batch:
    """Copy an int64 array (B, T, views) to the device, asynchronously.

    With `doc_mask` the last view marks the first tokens of documents, and the batch becomes one
    packed row.
    """
    views = torch.from_numpy(views_BTN)
    x, target = views[..., 0].contiguous(), views[..., 1].contiguous()
    cu_seqlens = None
    if doc_mask:
        cu_seqlens = upload_cu_seqlens(document_offsets(views[..., -1]).tolist(), device)
        x, target = x.view(1, -1), target.view(1, -1)
    return copy_to(x, device), copy_to(target, device), cu_seqlens


def count_targets(views_BTN: np.ndarray) -> int:
    """Count the targets in an array (B, T, views); the last token of a document may have none."""
    return int((views_BTN[..., 1] != NO_TARGET).sum())


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
