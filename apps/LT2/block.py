"""One physical layer: norm -> mixer -> add -> norm -> SwiGLU -> add."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apps.LT2.kernel.decode_linear import Norm, decode_linear
from apps.LT2.kernel.skipped_loops import SkippedLoops
from apps.LT2.mixers import MIXERS, Mixer, MixerArgs, MixerCache, Prompts, build_mixer
from apps.LT2.mixers.parts import decode_weight
from apps.LT2.pattern import LayerSpec
from lingua.transformer import FeedForward, RMSNorm


class Block(nn.Module):
    """A layer that all loops share.

    It owns one mixer of each family that some loop runs: `attention` serves full and window layers,
    `gdn` the gated delta rule. The LayerSpec of the loop says which one runs.
    """

    def __init__(self, args: MixerArgs, specs: tuple[LayerSpec, ...]):
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        for family in dict.fromkeys(MIXERS[spec.mixer] for spec in specs):
            self.add_module(family.module_name, build_mixer(family, args))
        self.feed_forward = FeedForward(
            args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier
        )

    def mixer(self, spec: LayerSpec) -> Mixer:
        return self.get_submodule(MIXERS[spec.mixer].module_name)  # pyright: ignore[reportReturnType]

    def mixers(self) -> list[Mixer]:
        return [child for child in self.children() if isinstance(child, Mixer)]

    def forward(
        self,
        h: Tensor,
        spec: LayerSpec,
        cu_seqlens: Tensor | None = None,
        with_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return h after this layer and, with `with_loss`, the mixer's own loss if it has one."""
        mixer, loss = self.mixer(spec), None
        options = {"cu_seqlens": cu_seqlens, "window": spec.window}
        x = self.attention_norm(h)
        if with_loss and mixer.own_loss is not None:
            mixed, loss = mixer.forward_with_loss(x, **options)
        else:
            mixed = mixer(x, **options)
        return self._add(h, mixed), loss

    def prefill(self, h: Tensor, spec: LayerSpec, cache: MixerCache, prompts: Prompts) -> Tensor:
        x = self.attention_norm(h)
        return self._add(h, self.mixer(spec).prefill(x, cache, prompts, spec.window))

    def step(self, h: Tensor, spec: LayerSpec, cache: MixerCache) -> Tensor:
        h = self.mixer(spec).add_step(h, self.attention_norm, cache)
        ffn, norm = self.feed_forward, self.ffn_norm
        gate_up, down = decode_weight(ffn.fused_linears()), decode_weight((ffn.w2,))
        if gate_up is None or down is None:
            return h + ffn(norm(h))
        h_BD = h[:, 0]
        x = decode_linear(h_BD, gate_up, norm=Norm(norm.weight, norm.eps), swiglu=True)
        return decode_linear(x, down, residual_BN=h_BD)[:, None]

    def repeat_step(
        self,
        h: Tensor,
        spec: LayerSpec,
        cache: MixerCache,
        last_spec: LayerSpec,
        last_cache: MixerCache,
        skipped: SkippedLoops,
    ) -> None:
        """Extend the cache of a loop that the token skips, once `skipped` has run.

        h, last_spec and last_cache belong to the last loop that ran.
        """
        mixer = self.mixer(spec)
        source = last_cache if self.mixer(last_spec) is mixer else None
        mixer.repeat_step(h, self.attention_norm, cache, source, skipped)

    def _add(self, h: Tensor, mixed: Tensor) -> Tensor:
        """Add the mixer's and the feed-forward network's output to the residual stream."""
        h = h + mixed
        return h + self.feed_forward(self.ffn_norm(h))

    @torch.no_grad()
    def init_weights(self, init_std: float | None, factor: float) -> None:
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()
        for mixer in self.mixers():
            mixer.reset_parameters(init_std, factor)
        self.feed_forward.reset_parameters(init_std, factor)
