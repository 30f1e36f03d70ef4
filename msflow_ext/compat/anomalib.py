"""MSFlow as a model that anomalib's ``Engine`` trains and tests; needs the extra ``anomalib``."""

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

    The learning rate of Adam follows the trainer's ``max_epochs``, see :class:`msflow_ext.training.recipe.Recipe`. If
    the model standardizes features, their statistics come from the training images before the first epoch.

    Without masks, anomalib uses the threshold of the scores for the pixels too. By default a score is therefore the
    top-k mean of the map, which has the unit of the map.

    Args:
        backbone, image_size, pretrained, blocks, cond_channels, out_indices, top_k: see :class:`msflow_ext.MSFlow`.
        score: ``"map"``, in the unit of the map, or another score of :class:`msflow_ext.MSFlow`, such as the paper's
            ``"log"``. Those have other units. Without masks, the pixels' threshold is then halfway between the
            smallest and the largest map value of the validation images.
        lr: learning rate between warm-up and decay.
        pre_processor: by default it resizes to ``image_size``. Another one must return images of that size in 0..1
            without ``Normalize``, because the backbone normalizes.
        post_processor, evaluator, visualizer: as in anomalib.

    Attributes:
        detector: the :class:`msflow_ext.MSFlow`.

    Raises:
        ValueError: if an argument or the pre-processor does not fit.
        RuntimeError: if the pretrained weights cannot be found.

    Examples:
        >>> from anomalib.data import Folder
        >>> from anomalib.engine import Engine
        >>> from msflow_ext.compat.anomalib import MSFlow
        >>> data = Folder("plates", root="plates", normal_dir="good", abnormal_dir="bad", num_workers=0)
        >>> engine = Engine(max_epochs=2)  # the paper trains 100
        >>> model = MSFlow("efficientnet_lite0", image_size=192)
        >>> engine.fit(model, datamodule=data)
        >>> (metrics,) = engine.test(model, datamodule=data)
        >>> batches = engine.predict(model, datamodule=data)  # batch.pred_score, batch.anomaly_map
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
        """Return a pre-processor that resizes to ``image_size``, by default the paper's 512, and keeps values in 0..1."""
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
            raise ValueError(
                f"MSFlow: max_epochs must be 1 or more, got {epochs}; the learning rate depends on it"
            )
        recipe = Recipe(epochs=epochs, lr=self.lr)
        adam = torch.optim.Adam(self.detector.head.parameters(), lr=recipe.lr)
        rate = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda epoch: recipe.learning_rate(epoch) / recipe.lr
        )
        return {"optimizer": adam, "lr_scheduler": rate}

    def on_train_start(self) -> None:
        """Set the statistics that standardize features from the training images of all processes."""
        if not self.detector.standardize:
            return
        self.detector.forget_statistics()
        sums: list[Tensor] = []
        batches: Any = self.trainer.train_dataloader
        for batch in batches:
            images = self._transformed(batch.image.to(self.device))
            maps = [f.cpu().double() for f in self.detector.features(images)]
            moments = [torch.stack([(f**k).sum((0, 2, 3)) for k in (0, 1, 2)]) for f in maps]
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
                f"MSFlow: pre_processor must return images of {side} x {side} pixels with values in 0..1, "
                f"got {tuple(white.shape[2:])} with values up to {white.max():.3g} for a white image"
            )

    def _transformed(self, images: Tensor) -> Tensor:
        transform = getattr(self.pre_processor, "transform", None)
        return images if transform is None else transform(images)


class _Model(nn.Module):
    """A detector whose forward returns what anomalib's models return."""

    def __init__(self, detector: msflow.MSFlow) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        found = self.detector(images)
        return InferenceBatch(pred_score=found.score, anomaly_map=found.anomaly_map)
