"""PELA's intermediate pre-training: a compressed student learns its task and its frozen original's features."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModel
from torch import Tensor

from mmdet_lors.classification.pretrained import read_weights
from mmdet_lors.engine.checkpoint.reading import check_fit
from mmdet_lors.errors import UserError

from .choice import OMIT
from .compressed import build_compressed, check_calibration, fit_outputs
from .low_rank import LowRank
from .tokens import BLOCKS, block_names, record_tokens


@MODELS.register_module()
class PELADistiller(BaseModel):
    r"""Trains a compressed model: :math:`L = L_{base} + \alpha L_{fd} + \beta L_{rwp}` (PELA paper, equation 7).

    The student starts as the factorised teacher. The teacher is always in evaluation mode and without
    gradients; it is in neither ``parameters()`` nor ``state_dict()``, and ``init_weights`` reads it from its
    own file, when training starts and when it resumes. For prediction this model is its student.

    Args:
        teacher: config of a classifier whose modes 'loss', 'predict' and 'tensor' are mmengine's, and which has its
            network as ``network``: :class:`~mmdet_lors.classification.TimmClassifier`.
        teacher_checkpoint: the network's weights, a file or 'timm://NAME'.
        ratio, omit, ranks, convolutions: see :func:`mmdet_lors.pela.compress`.
        student: settings of the student that differ from the teacher's, such as another drop path rate.
        feature_loss, perturbation_loss: configs of L_fd and L_rwp, whose ``loss_weight`` is alpha and beta; None leaves
            one out.
        blocks: see :func:`mmdet_lors.pela.tokens.block_names`.
        calibration: start from factors that fit the teacher's outputs, see
            :func:`~mmdet_lors.pela.compressed.calibration_batches`.

    Raises:
        UserError: a student without blocks or that cannot be compressed; in ``init_weights``, a checkpoint that is
            missing or of another architecture, or a student that does not have the teacher's blocks and weights.
    """

    def __init__(
        self,
        teacher: dict,
        teacher_checkpoint: str,
        ratio: float | None = None,
        omit: Sequence[str] = OMIT,
        ranks: Mapping[str, int] | None = None,
        student: dict | None = None,
        feature_loss: dict | None = None,
        perturbation_loss: dict | None = None,
        blocks: str = BLOCKS,
        convolutions: bool = False,
        calibration: dict | None = None,
    ) -> None:
        built: BaseModel = build_compressed(merged(teacher, student or {}), ratio, omit, ranks, convolutions)
        super().__init__(data_preprocessor=built.data_preprocessor)
        self.student = built
        self.feature_loss = MODELS.build(feature_loss) if feature_loss else None
        self.perturbation_loss = MODELS.build(perturbation_loss) if perturbation_loss else None
        self.blocks, self.teacher_config, self.teacher_checkpoint = blocks, teacher, teacher_checkpoint
        self.omit, self.convolutions, self.calibration = omit, convolutions, calibration
        if calibration is not None:
            check_calibration(calibration)
        # In a list, where nn.Module does not see it.
        self._teacher: list[BaseModel] = []
        try:
            block_names(built.network, blocks)
        except ValueError as error:
            raise UserError(f"model.{error}") from error

    @property
    def teacher(self) -> BaseModel:
        """The frozen original.

        Raises:
            UserError: before ``init_weights``, which loads it.
        """
        if not self._teacher:
            raise UserError("the teacher has no weights yet: call init_weights() first")
        return self._teacher[0]

    def init_weights(self) -> None:
        """Load the teacher, and fill the student with its weights, factorised."""
        teacher = MODELS.build(deepcopy(self.teacher_config))
        weights = read_weights(self.teacher_checkpoint)
        check_fit(teacher.network, weights, self.teacher_checkpoint)
        teacher.network.load_state_dict(weights)
        ours, theirs = (block_names(model.network, self.blocks) for model in (self.student, teacher))
        if ours != theirs:
            raise UserError(
                f"the student has {len(ours)} blocks, the teacher {len(theirs)}: model.student must not change them"
            )
        try:
            self.student.network.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the student cannot start from the teacher's weights: {reason}") from error
        device = next(self.student.parameters()).device
        self._teacher = [teacher.to(device).eval().requires_grad_(False)]
        if self.calibration is not None:
            fit_outputs(self.student, self.teacher, self.calibration, self.omit, self.convolutions)

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = "tensor"):
        """mmengine's three modes; 'predict' and 'tensor' are the student's own."""
        if mode == "loss":
            return self.loss(inputs, data_samples)
        return self.student(inputs, data_samples, mode=mode)

    def loss(self, inputs: Tensor, data_samples: list | None) -> dict[str, Tensor]:
        """The student's own losses, ``loss_feature`` and ``loss_perturbation``."""
        network = self.student.network
        # Mixup comes before the network: the teacher has to see the mixed images too.
        seen: list[Tensor] = []
        hook = network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with record_tokens(network, self.blocks) as student_tokens:
                losses = dict(self.student(inputs, data_samples, mode="loss"))
        finally:
            hook.remove()
        if self.feature_loss is not None:
            with torch.no_grad(), record_tokens(self.teacher.network, self.blocks) as teacher_tokens:
                self.teacher.network(*seen)
            losses["loss_feature"] = self.feature_loss(student_tokens, teacher_tokens)
        if self.perturbation_loss is not None:
            losses["loss_perturbation"] = self.perturbation_loss(self.pairs())
        return losses

    def pairs(self) -> list[tuple[LowRank, Tensor]]:
        """Every low-rank layer of the student, and the teacher's weight that it stands for."""
        return [
            (layer, self.teacher.get_submodule(name).weight)
            for name, layer in self.student.named_modules()
            if isinstance(layer, LowRank)
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PELADistiller":
        """Move the teacher along: ``to``, ``cuda`` and ``half`` end here."""
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def merged(config: Mapping, changes: Mapping) -> dict:
    """A config with these fields changed, also inside its dicts."""
    result = dict(config)
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if inner else value
    return result
