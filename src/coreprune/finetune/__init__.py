"""Fine-tuning for users who have labels."""

from coreprune.finetune.batches import Batches, accuracy
from coreprune.finetune.loop import fine_tune_
from coreprune.finetune.tuning import Tuning

__all__ = ["Batches", "Tuning", "accuracy", "fine_tune_"]
