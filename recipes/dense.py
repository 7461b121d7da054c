"""What the recipes of detectors and segmentors share: a network with heads over a timm backbone."""
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from recipes.fields import Recipe, Run, check, doc
from recipes.imagenet import is_moganet


@dataclass(frozen=True)
class Dense(Recipe):
    """All that can change the accuracy of a network that answers for places in an image."""

    known_classes: ClassVar[int] = 0  # of the data set of the rows
    descriptive = (*Recipe.descriptive, 'expected_parameters', 'expected_flops')
    fixed = (*Recipe.fixed, 'network', 'network_kwargs', 'freeze_bn')
    plain_bn_without_cuda = True
    backbone_weights = 'raw'  # as the authors, though S, B and L reach their ImageNet accuracy with the average

    expected_parameters: float | None = doc(None, 'published number of parameters, millions', flag=False)
    expected_flops: float | None = doc(None, 'published multiply-accumulates, billions', flag=False)

    # Model
    network: str = doc('', 'kind of the network, a name of models.dense.NETWORKS', flag=False)
    network_kwargs: dict[str, Any] = doc({}, "further arguments of the network's neck and heads, as name=value ...")
    gate: Literal['single', 'double'] = doc('single', "MogaNet's gate; 'double' applies SiLU twice (attn_force_fp32)")
    gate_fp32: bool = doc(False, 'keep the gating product in float32 under mixed precision (MogaNet)')

    # Fine-tuning
    freeze_bn: bool = doc(False, 'keep the batch norms of the backbone as they are: scales, shifts and statistics')

    def check(self) -> None:
        """Refuses values that cannot be meant. Raises UserError that names the flag."""
        super().check()
        check(self.repeated_aug == 1, '--repeated_aug is for classification; leave it out')

    def check_run(self, run: Run) -> None:
        """Refuses a way to run that this task cannot take. Raises UserError that names the flag."""
        check(not run.compile, f'--compile: the images of {self.name} vary in size, and torch would compile the model '
                               'for each size anew; leave it out')
        check(not (run.eval and run.pretrained), '--pretrained is an ImageNet classifier; give what is to be evaluated '
                                                 'by --checkpoint FILE')
        for name in ('class_map', 'valid_labels', 'real_labels', 'knn'):
            check(getattr(run, name) is None, f'--{name} is for classification; leave it out')

    def count_size(self) -> tuple[int, int]:
        """Height and width of the image for which multiply-accumulates are told."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """The arguments of the backbone's constructor, beside `model_kwargs`."""
        gates = {'gate': self.gate, 'gate_fp32': self.gate_fp32} if is_moganet(self.model) else {}
        return super().arguments() | gates

    def freezes(self) -> bool:
        """Whether a part of the model keeps the weights that it starts from."""
        return super().freezes() or self.freeze_bn

    def useless(self, model: str) -> list[str]:
        """The fields that do nothing for a model."""
        return [] if is_moganet(model) else ['gate', 'gate_fp32']
