"""The mixers by name. Names of one class share their weights where they share a layer."""

from apps.LT2.mixers.attention import Attention
from apps.LT2.mixers.base import Mixer, MixerCache
from apps.LT2.mixers.gdn import GatedDeltaNet
from apps.LT2.mixers.nsa import NativeSparseAttention

MIXERS: dict[str, type[Mixer]] = {
    "full": Attention,
    "window": Attention,
    "gdn": GatedDeltaNet,
    "nsa": NativeSparseAttention,
}

__all__ = ["MIXERS", "Mixer", "MixerCache"]
