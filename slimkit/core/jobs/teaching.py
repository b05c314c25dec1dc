"""Whether a distillation asks its teacher at every step or once: answers are kept on disk where that is cheaper."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from slimkit.core import files
from slimkit.core.distill.config import KnowledgeDistillConfig
from slimkit.core.distill.sampling import temperatures
from slimkit.core.distill.teacher_cache import targets
from slimkit.core.errors import ConfigError
from slimkit.core.jobs.framework import JobFramework, Lesson, Supervised
from slimkit.core.jobs.measurement import show
from slimkit.core.jobs.options import DistillOptions
from slimkit.core.log import logger

# Classes kept of each row. Where the losses read a distribution they are drawn without bias, 384 bytes a row: the loss
# on SmolLM2's likeliest 64 alone, the rest even, is 28 % off (docs/distill.md). Other losses get the likeliest.
KEPT = 64
# Of a row at most: the likeliest classes, their places and what is left.
BYTES = 8 * KEPT + 6
# Of the disk's free room, so much at most.
_SHARE = 0.5


def reason_against(
    read: Supervised, config: KnowledgeDistillConfig, options: DistillOptions, asked: str, room: Path, rows: int
) -> str:
    """Why the teacher is asked at every step; empty where its answers are kept.

    Keeping them costs one pass of the teacher over the data and saves one for each time a sample is seen, so it pays
    from the second time on.

    Args:
        read: the data.
        config: what is compared.
        options: of the job.
        asked: "auto", "online" or "cached".
        room: a folder on the disk in question.
        rows: rows of logits in the whole data.

    Raises:
        ConfigError: answers are to be kept that cannot be.
    """
    changing = read.collate is None or not read.even
    if asked == "cached" and changing:
        raise ConfigError(
            "--teacher cached: answers are found again only in arrays and in a language model's plain text"
        )
    if asked != "auto":
        return "" if asked == "cached" else "as asked for"
    if changing:
        return "its answers would change with a batch's padding"
    if not all(target["logits"] for target in targets(config.spec())):
        return "hidden states are compared, which are too large to keep"
    seen = options.epochs * read.count
    if options.max_steps is not None:
        seen = min(seen, options.max_steps * options.batch_size)
    if seen < 2 * read.count:
        return f"each of {read.count} samples is seen {seen / read.count:.2g} times"
    needed, free = rows * BYTES, shutil.disk_usage(room).free
    if needed > free * _SHARE:
        return f"its answers would take {show(needed, 'bytes')} of {show(free, 'bytes')} that are free"
    return ""


def draws(config: KnowledgeDistillConfig) -> int | None:
    """How many classes of a row are drawn; None where the losses need logits or several temperatures."""
    spec = config.spec()
    try:
        temperatures(spec, [True] * len(spec.soft_labels))
    except ConfigError:
        return None
    return KEPT


def taught(
    face: JobFramework,
    given: Lesson,
    config: KnowledgeDistillConfig,
    options: DistillOptions,
    asked: str,
    state: Path,
) -> Any:
    """The teacher, or its answers on disk; the log says which and why, and a run that goes on does as it did.

    Args:
        face: the framework.
        given: teacher, student and data.
        config: what is compared.
        options: of the job.
        asked: "auto", "online" or "cached".
        state: the run's folder, in which answers are kept; a build that was stopped there goes on.

    Returns:
        What `get_distill_model` takes as the teacher.
    """
    rows = int(given.read.facts.get("tokens", given.read.count))
    decision = state / "teacher.json"

    def decide() -> str:
        if decision.exists():
            against = files.read_json(decision)["against"]
        elif not face.keeps_answers():
            against = "answers are not read from files in this mode of the framework"
        else:
            against = reason_against(given.read, config, options, asked, state, rows)
        files.write_json(decision, {"against": against})
        return str(against)

    against = face.once(decide)
    if against:
        logger.info("the teacher runs at every step: %s", against)
        return given.teacher.model
    size = show(rows * BYTES, "bytes")
    logger.info("the teacher runs once; its answers, at most %s, are kept until the student is done", size)

    def build() -> None:
        batches = given.read.batches(options.batch_size)
        place = state / "teacher"
        face.slim.TeacherCache.build(given.teacher.model, batches, config, place, top_k=KEPT, sampled=draws(config))

    face.once(build)
    return face.slim.TeacherCache(state / "teacher")
