"""Tests of a model on its way: where there is room, in a thread of their own while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from msflow_ext.evaluation.evaluator import Evaluation


class Examiner(AbstractContextManager["Examiner"]):
    """Tests a model as it is at some epochs of its training, one test after the other.

    Leaving the context waits for the test that runs.

    Args:
        model: that is trained; it has its ``backbone``, which is not.
        test: evaluates a model.
        beside: test a copy of the model, which shares its backbone, in a thread of its own. Then :meth:`begin`
            returns at once; the copy takes as much memory as the model without its backbone. Else the model itself
            is tested before :meth:`begin` returns.
    """

    def __init__(self, model: Any, test: Callable[[Any], Evaluation], *, beside: bool) -> None:
        self._model, self._test = model, test
        self._thread = self._copy = None
        if beside:
            self._thread = ThreadPoolExecutor(1, "test")
            self._copy = copy.deepcopy(model, {id(model.backbone): model.backbone}).eval()
        self._begun: tuple[int, Future[Evaluation]] | None = None

    def begin(self, epoch: int) -> None:
        """Begin to test the model as it is now, after so many epochs; the test before must have been taken."""
        if self._begun is not None:
            raise RuntimeError(f"the test of epoch {self.epoch} was not taken")
        if self._thread and self._copy:
            self._copy.load_state_dict(self._model.state_dict())
            found = self._thread.submit(self._test, self._copy)
        else:
            found = Future[Evaluation]()
            try:
                found.set_result(self._test(self._model))
            except Exception as error:
                found.set_exception(error)
        self._begun = epoch, found

    @property
    def epoch(self) -> int:
        """Of the test that was begun and is not taken; 0 if there is none."""
        return self._begun[0] if self._begun else 0

    def take(self, *, wait: bool = True) -> Evaluation | None:
        """What the test found that was begun; None if none was, or it is not done and not waited for.

        Raises:
            what the test raises.
        """
        if self._begun is None or not (wait or self._begun[1].done()):
            return None
        (_, found), self._begun = self._begun, None
        return found.result()

    def __exit__(self, *error: object) -> None:
        if self._thread:
            self._thread.shutdown()
