"""Learners for streams, one a file: `create("er", memory=500)`; `chain` makes several one."""

from lamina.platform.incremental.learners.chain import chain
from lamina.platform.incremental.learners.table import LEARNERS, create

__all__ = ["LEARNERS", "chain", "create"]
