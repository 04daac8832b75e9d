"""A text's vector by a network that is trained with the recommender: a convolution over the vectors of its words, which
stay as they were pre-trained, and attention over its places (survey 2.1; the words of a title in Wu et al. 2019, NAML).

Shape letters: ``N`` any number of rows, ``V`` catalogue rows, ``L`` words of a text, ``U`` different words, ``F`` width
of a word's vector, ``W`` width of a text's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS_AT_ONCE = 4_096  # texts that go through the layers together: some 100 MB in training


class DocumentTable(NamedTuple):
    """Texts of catalogue rows as rows of a table of words, int [V, L], 0 behind a text's end, and those words' vectors
    [U, F], of which the first is zero."""

    words_VL: Tensor
    vectors_UF: Tensor


class DocumentEncoder(nn.Module):
    """Catalogue rows -> vectors [N, W] of their texts; zero where there is none."""

    def __init__(self, table: DocumentTable, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("words_VL", table.words_VL.int(), persistent=False)
        self.register_buffer("vectors_UF", table.vectors_UF.float(), persistent=False)
        self.convolution = nn.Linear(window * table.vectors_UF.shape[1], width)
        self.attention = nn.Linear(width, width)
        self.query = nn.Linear(width, 1, bias=False)

    def forward(self, rows: Tensor | None) -> Tensor:
        """`rows` of the catalogue, of any shape [N]; None: all, in order."""
        words_VL = self.get_buffer("words_VL")
        words_NL = words_VL if rows is None else words_VL[rows]
        parts = [self._encoded(part) for part in torch.split(words_NL.flatten(0, -2), ROWS_AT_ONCE)]
        return torch.cat(parts).view(*words_NL.shape[:-1], -1)

    def _encoded(self, words_NL: Tensor) -> Tensor:
        real_NL1 = (words_NL != 0)[..., None]
        before = (self.window - 1) // 2
        padded = F.pad(F.embedding(words_NL, self.get_buffer("vectors_UF")), (0, 0, before, self.window - 1 - before))
        around_NLX = padded.unfold(1, self.window, 1).transpose(2, 3).flatten(2)
        found_NLW = F.relu(self.convolution(around_NLX))
        scores_NL1 = self.query(torch.tanh(self.attention(found_NLW)))
        # Finite, so that a text without a word gets weights, of nothing.
        weights_NL1 = torch.softmax(scores_NL1.masked_fill(~real_NL1, torch.finfo(scores_NL1.dtype).min), dim=1)
        pooled_NW: Tensor = (weights_NL1 * found_NLW * real_NL1).sum(1)
        return pooled_NW
