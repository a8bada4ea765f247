"""Distillation that rides along with the fine-tuning of any step, by the `distill` of its training settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mobile_bench.inputs import InputSpec

if TYPE_CHECKING:
    from tfopt.distillation.teachers import Loaded
    from tfopt.technique import Context
    from tfopt.training import LossHook, TrainConfig


@contextmanager
def riding(config: TrainConfig, model, context: Context, spec: InputSpec) -> Iterator[LossHook | None]:
    """The loss hook for a fine-tuning of the Keras 3 `model`, or None where the settings want none."""
    if config.distill is None:
        yield None
        return
    import keras

    from tfopt.distillation.hook import distilling

    panel = panel_of(config, context, spec, model.name, int(model.output_shape[-1]))
    with distilling(model, panel, config.distill, spec, keras) as (hook, _):
        yield hook


def panel_of(config: TrainConfig, context: Context, spec: InputSpec, student: str, classes: int) -> list[Loaded]:
    """The teachers of a training, checked against the student's classes and images."""
    from tfopt.distillation import teachers

    panel = teachers.load(config.distill, context.teacher, spec)
    teachers.check(panel, student, classes, spec)
    return panel
