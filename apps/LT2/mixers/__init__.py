"""The mixers by name. Names of one class share their weights within a layer."""

from apps.LT2.mixers.attention import Attention
from apps.LT2.mixers.base import Mixer, MixerArgs, MixerCache, Prompts
from apps.LT2.mixers.deltanet import DeltaNet
from apps.LT2.mixers.dsa import SparseAttention
from apps.LT2.mixers.gdn import GatedDeltaNet
from apps.LT2.mixers.gla import GatedLinearAttention
from apps.LT2.mixers.hgrn2 import HGRN2
from apps.LT2.mixers.kda import KimiDeltaAttention
from apps.LT2.mixers.mamba2 import Mamba2
from apps.LT2.mixers.nsa import NativeSparseAttention
from apps.LT2.mixers.retnet import RetNet

MIXERS: dict[str, type[Mixer]] = {
    "full": Attention,
    "window": Attention,
    "gdn": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "mamba2": Mamba2,
    "hgrn2": HGRN2,
    "deltanet": DeltaNet,
    "retnet": RetNet,
    "nsa": NativeSparseAttention,
    "dsa": SparseAttention,
    "gla": GatedLinearAttention,
}


def build_mixer(family: type[Mixer], args: MixerArgs) -> Mixer:
    """Build a mixer with the options of its section, such as `model.gdn`."""
    return family(args, getattr(args, family.module_name, None))


__all__ = ["MIXERS", "Mixer", "MixerArgs", "MixerCache", "Prompts", "build_mixer"]
