"""The mixers by name. Names of one class share their weights where they share a layer."""

from apps.LT2.mixers.attention import Attention
from apps.LT2.mixers.base import Mixer, MixerCache
from apps.LT2.mixers.dsa import SparseAttention
from apps.LT2.mixers.gdn import GatedDeltaNet

MIXERS: dict[str, type[Mixer]] = {
    "full": Attention,
    "window": Attention,
    "gdn": GatedDeltaNet,
    "dsa": SparseAttention,
}

__all__ = ["MIXERS", "Mixer", "MixerCache"]
