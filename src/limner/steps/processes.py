"""Several processes (`accelerate launch`): they share training; what else a run does, one of them does while the others wait."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

from limner.steps.run import Run


def make_accelerator() -> Any:
    """An Accelerator under `accelerate launch` with several processes, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])  # others wait while one makes a pool


def by_one(step: Callable[..., object]) -> Callable[..., None]:
    """The step, done by the main process; all go on when it is done."""

    @wraps(step)
    def done(run: Run, *args: Any) -> None:
        accelerator = make_accelerator()
        if accelerator is None or accelerator.is_main_process:
            step(run, *args)
        if accelerator is not None:
            accelerator.wait_for_everyone()

    return done
