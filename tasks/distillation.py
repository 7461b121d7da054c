"""Knowledge distillation: a student learns what a trained classifier, its teacher, says of the same images."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import labels
from recipes import Classification, Recipe
from utils import UserError


class Teacher:
    """A trained classifier in evaluation mode, without gradients. It is no part of the student.

    So DDP, the optimizer, the moving average and the checkpoints do not see it, it draws no random number, and its
    batch norms keep their statistics.
    """

    def __init__(self, model: nn.Module, taught_by: Recipe, *, recipe: Classification, classes: Sequence[str] = (),
                 digest: str = ''):
        """
        Args:
            model: on the device of the training.
            taught_by: the teacher's own recipe, whose normalisation its images have.
            recipe: the student's.
            classes: the names of the teacher's classes; none where they are not known.
            digest: SHA-256 of its weights and of what else decides its answers.
        """
        self.model, self.digest, self.num_classes = model.eval().requires_grad_(False), digest, taught_by.num_classes
        self._recipe, self._classes = recipe, list(classes)
        self._order: Tensor | None = None
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None
        if (recipe.mean, recipe.std) != (taught_by.mean, taught_by.std):
            device = next(model.parameters()).device
            means, stds = (torch.tensor(values, device=device).view(2, 3, 1, 1) for values in (
                (recipe.mean, taught_by.mean), (recipe.std, taught_by.std)))
            self._scale, self._shift = stds[0] / stds[1], (means[0] - means[1]) / stds[1]

    def learn_classes(self, classes: Sequence[str], num_classes: int) -> None:
        """Puts the teacher's answers into the order of the student's classes.

        Args:
            classes: the names of the student's classes; none where they are not known.

        Raises:
            UserError: where the teacher has others.
        """
        source = self._recipe.teacher
        if self.num_classes != num_classes:
            raise UserError(f'--teacher {source} tells {self.num_classes} classes apart, the student {num_classes}; '
                            'give a teacher that was trained, or fine-tuned, on the same classes')
        if not (classes and self._classes):
            return
        if apart := labels.difference(classes, self._classes, we='the data', they='the teacher'):
            raise UserError(f'--teacher {source} has other classes: {apart}; give one that was trained on the same')
        order = labels.find(classes, self._classes)
        if order != list(range(num_classes)):
            self._order = torch.tensor(order, device=next(self.model.parameters()).device)

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """Logits, float32 [B, classes], for the student's images [B, 3, H, W], normalised as the teacher's were."""
        if self._scale is not None:
            images = images * self._scale + self._shift
        logits = self.model(images).float()
        return logits if self._order is None else logits.index_select(1, self._order)

    def loss(self, logits: Tensor, images: Tensor) -> Tensor:
        """How far the student's logits [B, classes] are from the teacher's answer, the mean over the images.

        Hard: the cross-entropy of the teacher's likeliest class (arXiv 2012.12877). Soft: the divergence of the
        student's probabilities from the teacher's, both at the temperature tau, times tau squared, so that its gradient
        does not shrink with tau (arXiv 1503.02531).
        """
        answer = self.answer(images)
        if self._recipe.distill == 'hard':
            return F.cross_entropy(logits, answer.argmax(1))
        tau = self._recipe.distill_tau
        ours, theirs = (F.log_softmax(values.float() / tau, dim=1) for values in (logits, answer))
        return tau**2 * F.kl_div(ours, theirs, reduction='batchmean', log_target=True)
