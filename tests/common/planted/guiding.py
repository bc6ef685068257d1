"""A guider and an attention processor as they should be, and the same with one fault each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from diffusers_ext.enabling import HookConfig, disable, enable

from ._checks import check_number


class PlantedGuider(BaseGuidance):
    """Classifier-free guidance."""

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self, guidance_scale: float = 3.0, start: float = 0.0, stop: float = 1.0, enabled: bool = True
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale

    def prepare_inputs(self, data: Any) -> list[Any]:
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, number, name) for number, name in enumerate(names)]

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        pred = pred_cond if pred_uncond is None else pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if self._is_on() else 1

    def _is_on(self) -> bool:
        if not self._enabled or self._num_inference_steps is None:
            return self._enabled
        first, last = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        return first <= self._step < last


class GuidesAlways(PlantedGuider):
    """Knows no start, no stop and no off."""

    def _is_on(self) -> bool:
        return True


class Amplifies(PlantedGuider):
    """Scales what there is nothing to guide in."""

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        other = pred_cond if pred_uncond is None else pred_uncond
        return GuiderOutput(
            pred=pred_cond * (1 if pred_uncond is None else 1.1), pred_cond=pred_cond, pred_uncond=other
        )


class Remembers(PlantedGuider):
    """Momentum that outlives the run."""

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        output = super().forward(pred_cond, pred_uncond)
        last = self.__dict__.get("last", 0.0)
        self.last = output.pred
        return GuiderOutput(pred=output.pred + 0.1 * last, pred_cond=pred_cond, pred_uncond=pred_uncond)


class LosesItsScale(PlantedGuider):
    """The parent writes its default over the scale in the config."""

    @register_to_config
    def __init__(
        self, guidance_scale: float = 3.0, start: float = 0.0, stop: float = 1.0, enabled: bool = True
    ) -> None:
        super().__init__(start=start, stop=stop, enabled=enabled)


# --- attention processors --------------------------------------------------------------------------------------------


class _Halved(AttnProcessor2_0):
    """Attention whose output is halved."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 0.5 * super().__call__(attn, hidden_states, *args, **kwargs)


@dataclass
class PlantedAttentionConfig(HookConfig):
    """Halves what every attention layer of a U-Net gives."""

    key: ClassVar[str] = "planted_attention"

    share: float = 0.5

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, 1)

    @classmethod
    def supports(cls, module: nn.Module) -> str | None:
        good = hasattr(module, "set_attn_processor") and hasattr(module, "conv_in")
        return None if good else "it is no U-Net with attention processors"

    def check(self, module: nn.Module, on_pipeline: bool) -> None:
        if (reason := self.supports(module)) is not None:
            raise ValueError(f"planted_attention does not work on {type(module).__name__}: {reason}.")

    def apply(self, module: Any) -> None:
        module.__dict__["_planted_before"] = dict(module.attn_processors)
        module.set_attn_processor({name: _Halved() for name in module.attn_processors})

    @classmethod
    def remove(cls, module: Any) -> None:
        module.set_attn_processor(module.__dict__.pop("_planted_before"))


def apply_planted_attention(module: nn.Module, config: PlantedAttentionConfig) -> None:
    enable(module, config)


def remove_planted_attention(module: nn.Module) -> None:
    disable(module, "planted_attention")


@dataclass
class PutsOthersBack(PlantedAttentionConfig):
    """Off, the processors are new ones of the default kind."""

    @classmethod
    def remove(cls, module: Any) -> None:
        del module.__dict__["_planted_before"]
        module.set_attn_processor(AttnProcessor2_0())


@dataclass
class SwitchesTheBackend(PlantedAttentionConfig):
    """Switches the attention of the whole process."""

    def apply(self, module: Any) -> None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        _AttentionBackendRegistry.set_active_backend("_native_math")
        super().apply(module)
