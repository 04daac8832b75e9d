"""What a user is, told by the user's vector: user-profile prediction (PeterRec: Yuan et al. 2020; survey 3.3).

It ranks no items: `query` gives the vector, and the head `HEAD` a score of each class for it.
"""

import torch.nn.functional as F
from torch import Tensor

from trainer.config import ProfileConfig
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.tasks.loss import wide
from trainer.tasks.user_vector import user_vectors

HEAD = "profile"


class Profile:
    """The task. `class_U`: the class of each user, by global index, whom it is trained on; -1 for others. None: it is
    only asked."""

    def __init__(self, config: ProfileConfig, class_U: Tensor | None = None) -> None:
        self.config, self.class_U = config, class_U

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(cross-entropy summed over the users who are trained on, their number) of this rank's slice."""
        assert self.class_U is not None, "a task that is trained has classes"
        owners = batch.users if batch.owners is None else batch.owners
        self.class_U = self.class_U.to(owners.device)  # once
        class_B = self.class_U[owners]
        known_B = class_B >= 0
        scores_NC = model.task_heads[HEAD](self.query(model, batch))[known_B]
        return F.cross_entropy(wide(scores_NC), class_B[known_B], reduction="sum"), known_B.sum()

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """User vectors [B, D]."""
        return user_vectors(
            model, batch.items, batch.mask_BT, batch.users, causal=self.config.causal, table_VD=table_VD
        )
