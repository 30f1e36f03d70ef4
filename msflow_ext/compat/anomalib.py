"""MSFlow as a model of anomalib, which its ``Engine`` trains, tests and predicts with (extra ``anomalib``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Resize

from msflow_ext.choices import Score
from msflow_ext.models import msflow
from msflow_ext.training.recipe import Recipe

try:
    from anomalib import LearningType  # pyright: ignore[reportMissingImports]
    from anomalib.data import InferenceBatch  # pyright: ignore[reportMissingImports]
    from anomalib.models.components import AnomalibModule  # pyright: ignore[reportMissingImports]
    from anomalib.post_processing import PostProcessor  # pyright: ignore[reportMissingImports]
    from anomalib.pre_processing import PreProcessor  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"msflow_ext.compat.anomalib needs anomalib: pip install 'msflow-ext[anomalib]' ({error})"
    ) from None


__all__ = ["MSFlow"]


class MSFlow(AnomalibModule):
    """:class:`msflow_ext.MSFlow` for ``anomalib.engine.Engine``, trained as in the paper.

    The rate of Adam follows the trainer's ``max_epochs`` as :class:`msflow_ext.training.recipe.Recipe` says. Where features are
    to be standardised, their statistics are taken from the training images before the first epoch.

    >>> from anomalib.data import Folder
    >>> from anomalib.engine import Engine
    >>> from msflow_ext.compat.anomalib import MSFlow
    >>> data = Folder("plates", root="plates", normal_dir="good", abnormal_dir="bad", num_workers=0)
    >>> engine = Engine(max_epochs=2)  # the paper's recipe is for 100
    >>> model = MSFlow("efficientnet_lite0", image_size=192)
    >>> engine.fit(model, datamodule=data)
    >>> (metrics,) = engine.test(model, datamodule=data)
    >>> batches = engine.predict(model, datamodule=data)  # batch.pred_score, batch.anomaly_map

    Without masks, anomalib takes the threshold of the scores for that of the pixels, and so scores must be in the unit of
    the map. Therefore a score is the mean of the largest ``top_k`` share of the map, unless ``score`` says otherwise.

    Args:
        backbone, image_size, pretrained, blocks, cond_channels, out_indices, top_k: see :class:`msflow_ext.MSFlow`.
        score: ``"map"``, in the unit of the map; or one of the others of :class:`msflow_ext.MSFlow`, such as the paper's
            ``"log"``. Their units are others, and without masks the pixels' threshold is then the middle between the
            smallest and the largest map value of the validation images.
        lr: learning rate between warm-up and decay.
        pre_processor: by default it resizes to ``image_size``. Another one must give images of that size in 0..1,
            without ``Normalize``: the backbone does that itself.
        post_processor, evaluator, visualizer: anomalib's.

    Attributes:
        detector: the :class:`msflow_ext.MSFlow`.

    Raises:
        ValueError: an argument does not fit, or the pre-processor does not. RuntimeError: no pretrained weights within
            reach.
    """

    model: Any

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        image_size: int | None = None,
        pretrained: bool | str = True,
        blocks: Sequence[int] = (2, 5, 8),
        cond_channels: int | Sequence[int] = 64,
        out_indices: Sequence[int] | None = None,
        score: Score = "map",
        top_k: float = 0.03,
        lr: float = Recipe.lr,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Any = True,
        visualizer: Any = True,
    ) -> None:
        detector = msflow.MSFlow(
            backbone,
            image_size=image_size,
            pretrained=pretrained,
            blocks=blocks,
            cond_channels=cond_channels,
            out_indices=out_indices,
            score=score,
            top_k=top_k,
        )
        if pre_processor is True:
            pre_processor = self.configure_pre_processor((detector.image_size, detector.image_size))
        if post_processor is True:
            post_processor = PostProcessor(enable_threshold_matching=score == "map")
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.lr = Recipe(lr=lr).lr
        self.model = _Model(detector)
        self._check_pre_processor()

    @property
    def detector(self) -> msflow.MSFlow:
        return self.model.detector

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to ``image_size``, the paper's 512 by default, and leave the values in 0..1."""
        return PreProcessor(Resize(image_size or (512, 512), antialias=True))

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        return {"gradient_clip_val": Recipe.clip, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> Any:
        return LearningType.ONE_CLASS  # pyright: ignore[reportAttributeAccessIssue]

    def configure_optimizers(self) -> Any:
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(f"MSFlow needs max_epochs, on which its rate depends, got {epochs}")
        recipe = Recipe(epochs=epochs, lr=self.lr)
        adam = torch.optim.Adam(self.detector.head.parameters(), lr=recipe.lr)
        rate = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda epoch: recipe.learning_rate(epoch) / recipe.lr
        )
        return {"optimizer": adam, "lr_scheduler": rate}

    def on_train_start(self) -> None:
        """Standardise features, where they are, by the statistics of the training images of all processes."""
        if not self.detector.standardize:
            return
        self.detector.forget_statistics()
        sums: list[Tensor] = []
        batches: Any = self.trainer.train_dataloader
        for batch in batches:
            images = self._transformed(batch.image.to(self.device))
            wide = [f.cpu().double() for f in self.detector.features(images)]
            moments = [torch.stack([(f**k).sum((0, 2, 3)) for k in (0, 1, 2)]) for f in wide]
            sums = [a + b for a, b in zip(sums, moments, strict=True)] if sums else moments
        if self.trainer.world_size > 1:
            reduce = self.trainer.strategy.reduce
            sums = [reduce(m.to(self.device), reduce_op="sum").cpu() for m in sums]
        means = [first / count for count, first, _ in sums]
        squares = [second / count for count, _, second in sums]
        stds = [(s - m.square()).clamp_min(0).sqrt() for s, m in zip(squares, means, strict=True)]
        self.detector.set_statistics(means, stds)

    def training_step(self, batch: Any, *_: Any) -> dict[str, Tensor]:
        loss = self.detector.loss(batch.image)
        self.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, logger=True)
        return {"loss": loss}

    def validation_step(self, batch: Any, *_: Any) -> Any:
        return batch.update(**self.model(batch.image)._asdict())

    def _check_pre_processor(self) -> None:
        side = self.detector.image_size
        white = self._transformed(torch.ones(1, 3, side, side))
        if white.shape[2:] != (side, side) or not torch.allclose(white, torch.ones(())):
            raise ValueError(
                f"MSFlow: pre_processor must give images of {side} x {side} pixels and leave them in 0..1, "
                f"of a white one it makes {tuple(white.shape[2:])} with values up to {white.max():.3g}"
            )

    def _transformed(self, images: Tensor) -> Tensor:
        transform = getattr(self.pre_processor, "transform", None)
        return images if transform is None else transform(images)


class _Model(nn.Module):
    """A detector of ours that answers as anomalib's models do."""

    def __init__(self, detector: msflow.MSFlow) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        found = self.detector(images)
        return InferenceBatch(pred_score=found.score, anomaly_map=found.anomaly_map)
