"""Rotary angles, with the scaling of the frequencies that stretches a model to longer contexts.

`model.rope_scaling` has the names, defaults and equations of `rope_scaling` in transformers, so the
value of a config.json can be copied. A pair with frequency f turns f / (2 pi) times per token.

    linear   f / factor
    llama3   f / factor for pairs that turn less than low_freq_factor times in the original context,
             f for more than high_freq_factor times, and a linear mix between (Llama 3.1)
    yarn     the same kind of mix over the index of the pair, from beta_fast to beta_slow turns; cos
             and sin are multiplied by attention_factor (https://arxiv.org/abs/2309.00071)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lingua import transformer
from lingua.errors import UserError
from lingua.transformer import cos_sin, rotary_frequencies

# The options of each type, besides factor.
OPTIONS_OF = {
    "linear": frozenset[str](),
    "llama3": frozenset(
        {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    ),
    "yarn": frozenset(
        {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
        | {"mscale", "mscale_all_dim", "truncate"}
    ),
}


@dataclass(kw_only=True)
class RopeScalingArgs:
    rope_type: str  # linear | llama3 | yarn
    factor: float  # how much longer the context becomes
    original_max_position_embeddings: int | None = None  # context before; of llama3 and yarn
    low_freq_factor: float = 1.0  # llama3: turns in that context, below which f is divided
    high_freq_factor: float = 4.0  # llama3: turns above which f stays
    beta_fast: float = 32.0  # yarn: turns above which f stays
    beta_slow: float = 1.0  # yarn: turns below which f is divided
    attention_factor: float | None = None  # yarn: of cos and sin; null = 1 + ln(factor) / 10
    mscale: float | None = None  # yarn: multiplies that logarithm, if mscale_all_dim is set too
    mscale_all_dim: float | None = None  # yarn: the same for a factor that divides the first
    truncate: bool = True  # yarn: round the ends of the mix to whole pairs

    def __post_init__(self) -> None:
        section = "model.rope_scaling"
        if self.rope_type not in OPTIONS_OF:
            raise UserError(
                f"{section}.rope_type={self.rope_type} must be one of {', '.join(OPTIONS_OF)}; for "
                "rotary positions without scaling use model.rope_scaling=null"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise UserError(f"{section}.{name}={getattr(self, name)} must be above 0")
        context = self.original_max_position_embeddings
        if self.rope_type != "linear" and (context is None or context < 1):
            raise UserError(
                f"{section}.original_max_position_embeddings={context} must be the context length "
                f"before the scaling, which rope_type={self.rope_type} needs; e.g. 8192"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                raise UserError(
                    f"{section}.{low}={getattr(self, low)} must be below {high}="
                    f"{getattr(self, high)}"
                )

    def unused_options(self) -> list[str]:
        """Return the options that are set and that another rope_type reads."""
        others = frozenset().union(*OPTIONS_OF.values()) - OPTIONS_OF[self.rope_type]
        return [
            f.name for f in fields(self) if f.name in others and getattr(self, f.name) != f.default
        ]

    def amplitude(self) -> float:
        """Return the factor of cos and sin."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        grown = 0.1 * math.log(max(self.factor, 1.0))
        if self.mscale and self.mscale_all_dim:
            return (1 + self.mscale * grown) / (1 + self.mscale_all_dim * grown)
        return 1 + grown

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the new frequencies, (K / 2,) in fp32."""
        slow = frequencies / self.factor
        if self.rope_type == "linear":
            return slow
        context = self.original_max_position_embeddings
        assert context is not None, "checked at the start"
        if self.rope_type == "llama3":
            turns = context / (2 * math.pi) * frequencies
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = (turns - low) / (high - low)
        else:
            n_pairs = len(frequencies)

            def pair_that_turns(times: float) -> float:
                """Solve context * theta ** (-i / n_pairs) / (2 pi) = times for i."""
                return n_pairs * math.log(context / (2 * math.pi * times), theta)

            first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, 2 * n_pairs - 1)
            pairs = torch.arange(n_pairs, device=frequencies.device, dtype=torch.float32)
            kept = 1 - (pairs - first) / (last - first if last != first else 1e-3)
        kept = kept.clamp(0, 1)
        return (1 - kept) * slow + kept * frequencies


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScalingArgs | None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (..., K / 2) in fp32 for integer positions (...)."""
    if scaling is None:
        return transformer.rotary_angles(positions, head_dim, theta)
    frequencies = scaling.scale(rotary_frequencies(head_dim, theta, positions.device), theta)
    cos, sin = cos_sin(positions.float().unsqueeze(-1) * frequencies)
    amplitude = scaling.amplitude()
    return cos * amplitude, sin * amplitude
