"""Knowledge distillation: a smaller student learns from the answers, and if asked the features, of larger models.

Which losses there are says tfopt.distillation; this step makes the student and trains it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from mobile_bench.inputs import InputSpec
from mobile_bench.records import StepReport
from tfopt.distillation.settings import Distillation, is_number
from tfopt.errors import InputError, RecipeError
from tfopt.technique import Context, OptimizedModel, Property, Technique, register
from tfopt.training import TrainConfig

if TYPE_CHECKING:
    import keras

_FILES = (".keras", ".h5", ".hdf5")


@register
@dataclass(frozen=True, kw_only=True)
class Distill(Technique):
    """Train a student on the teachers' outputs.

    student: 'narrow' takes the model's own architecture at `width` times its channels; 'self' the model as the steps
    before left it; 'channels' the model with channels removed, with the settings of that technique in `channels`; the
    name of a builder (resnet8, mobilenet, …) with its `width`; or a .keras file of the same classes and image size.
    start: 'teacher' picks evenly spaced channels of the model's weights where a student that was built here has a layer
    of the same name (weight selection, Xu et al. 2024, arXiv:2311.18823); 'random' does not.
    temperature, alpha, hints, attention, relational, pairs, teachers: see tfopt.distillation.settings.Distillation; no
    teachers means the model that the study began with.
    """

    name: ClassVar[str] = "distill"
    adds: ClassVar[frozenset[Property]] = frozenset({Property.NARROW})

    student: str = "narrow"
    width: float = 0.5
    channels: dict = field(default_factory=dict)
    start: str = "teacher"
    temperature: float = 4.0
    alpha: float = 0.7
    hints: float = 0.0
    attention: float = 0.0
    relational: float = 0.0
    pairs: dict = field(default_factory=dict)
    teachers: tuple = ()
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=8, learning_rate=3e-3))

    def __post_init__(self):
        for name, value in self.losses.numbers().items():
            object.__setattr__(self, name, value)
        if not (is_number(self.width) and 0 < self.width <= 4):
            raise InputError("width is out of range", received=repr(self.width), allowed="above 0, up to 4")
        if self.start not in ("teacher", "random"):
            raise InputError("start is unknown", received=repr(self.start), allowed="teacher, random")
        if not isinstance(self.student, str) or not self.student:
            raise InputError("The student is no text", received=repr(self.student), allowed="narrow, self, channels, …")
        if not isinstance(self.channels, dict) or (self.channels and self.student != "channels"):
            raise InputError(
                "channels has settings that no student uses", received=repr(self.channels),
                allowed="a table, with student: channels",
            )  # fmt: skip
        if self.train.distill is not None:
            raise RecipeError("distill inside a distill step says it twice", received=repr(self.train.distill.plain()))
        object.__setattr__(self, "teachers", self.losses.teachers)
        if self.student == "channels":
            self._channels()
        if self.student in ("self", "channels"):
            # What these students are made of is the model itself, so its narrower and thinner kernels stay.
            object.__setattr__(self, "keeps", frozenset({Property.NARROW, Property.LOW_RANK}))
        if self.student == "self":
            object.__setattr__(self, "adds", frozenset())

    @property
    def losses(self) -> Distillation:
        """What the student learns from; raises InputError for what makes no sense."""
        return Distillation(
            temperature=self.temperature, alpha=self.alpha, hints=self.hints, attention=self.attention,
            relational=self.relational, pairs=self.pairs, teachers=self.teachers,
        )  # fmt: skip

    @property
    def _is_file(self) -> bool:
        return self.student.endswith(_FILES) or "/" in self.student

    def files(self) -> tuple[str, ...]:
        own = (self.student,) if self._is_file else ()
        own += self._channels().files() if self.student == "channels" else ()
        return (*own, *(teacher.path for teacher in self.teachers))

    @property
    def renames(self) -> bool:
        return self.student not in ("self", "channels")

    def check(self, model: keras.Model, spec: InputSpec) -> None:
        from tfopt.distillation import features, hook, students, teachers

        panel = teachers.load(self.losses, model, spec)
        classes = int(model.output_shape[-1])
        student = None
        if self._is_file:
            student, _ = students.from_file(self.student, classes, spec)
        elif self.student not in ("self", "channels"):
            student = students.built(self.student, self.width, model, spec)
        teachers.check(panel, (student or model).name, classes, spec)
        if student is not None:
            hook.lesson(student, panel[0].model, self.losses)
        else:
            features.check_teacher(panel[0].model, self.pairs)

    def apply(self, optimized: OptimizedModel, context: Context) -> tuple[OptimizedModel, StepReport]:
        import keras

        from tfopt import training
        from tfopt.distillation import riding, teachers
        from tfopt.distillation.hook import distilling
        from tfopt.graph import count_macs, count_parameters, flat_layers

        started = time.monotonic()
        spec, before = optimized.spec, optimized.model
        self.check(before, spec)
        panel = teachers.load(self.losses, context.teacher, spec)
        keras.utils.set_random_seed(context.seed)
        student, notes = self._student(optimized, context)
        teachers.check(panel, student.name, int(student.output_shape[-1]), spec)
        with distilling(student, panel, self.losses, spec) as (hook, pairs):
            judged = riding.judged(panel, riding.judges(self.train, context))
            report = training.fit(
                student, context.data["train"], context.data["validation"], spec, self.train, keras=keras,
                seed=context.seed, loss_hook=hook, callbacks=context.callbacks, progress=context.progress,
            )  # fmt: skip
        notes += [*teachers.notes(panel), *riding.worse(judged, report.accuracy_after)]
        result = OptimizedModel(student, spec, optimized.properties | self.adds)
        return result, StepReport(
            technique=self.name,
            settings=self.settings(),
            touched=tuple(layer.name for layer in flat_layers(student) if layer.weights),
            skipped=(),
            parameters_before=count_parameters(before),
            parameters_after=count_parameters(student),
            macs_before=count_macs(before),
            macs_after=count_macs(student),
            seconds=round(time.monotonic() - started, 3),
            training=report.to_dict(),
            properties={
                "temperature": self.temperature, "student": student.name, "pairs": pairs, "teachers": judged,
            },
            notes=tuple(notes),
        )  # fmt: skip

    def _student(self, optimized: OptimizedModel, context: Context) -> tuple[keras.Model, list[str]]:
        """The network to train, and what a reader of the report must know of it."""
        import keras

        from tfopt import training
        from tfopt.distillation import students
        from tfopt.graph import flat_layers, rewrite

        spec, model = optimized.spec, optimized.model
        if self.student == "self":
            return rewrite(model), ["The student is the model itself"]
        if self.student == "channels":
            return self._channels().cut_once(optimized, context), []
        if self._is_file:
            return students.from_file(self.student, int(model.output_shape[-1]), spec)
        student = students.built(self.student, self.width, model, spec)
        inherited = students.select_weights(model, student) if self.start == "teacher" else []
        if inherited:
            training.recalibrate(student, context.data["train"], spec, keras=keras)
        layers = sum(bool(layer.weights) for layer in flat_layers(student))
        return student, [f"{len(inherited)} of {layers} layers start from the teacher"]

    def _channels(self):
        from tfopt.technique import make

        if "train" in self.channels or "rounds" in self.channels:
            raise InputError(
                "The student loses its channels in one round and is trained as the distill step says",
                received=", ".join(sorted({"train", "rounds"} & set(self.channels))),
            )  # fmt: skip
        return make("channels", self.channels)
