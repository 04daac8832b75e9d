"""The average of a text's word vectors: WordLlama's, 256 wide, which its package carries (MIT).

Miller, "WordLlama: Recycled Token Embeddings from Large Language Models" (2024). Nothing is fetched.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trainer.arrays import FloatArray, IntArray
from trainer.encoders.weights import checked_sha256, package_folder

SHA256 = "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"
INSTALL = "pip install graftrec[text]"


class WordLlamaEncoder:
    """See TextEncoder."""

    name = "wordllama"

    def __init__(self) -> None:
        folder = package_folder("wordllama", install=INSTALL)
        self.weights = checked_sha256(folder / "weights" / "l2_supercat_256.safetensors", SHA256)
        import wordllama

        # The folder is named since where it looks first has another name than where its files lie.
        model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
        self._tokenizer: Any = model.tokenizer
        self._vectors = torch.from_numpy(model.embedding)
        self.width = int(self._vectors.shape[1])
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """[N, 256], each the mean of its tokens' vectors; zero for a text without a token.

        Without the padding, and the array of all tokens' vectors, of the package's own `embed`.
        """
        ids = self.tokens(texts)
        lengths = torch.tensor([len(one) for one in ids], dtype=torch.int64)
        tokens = torch.tensor(list(itertools.chain.from_iterable(ids)), dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        with torch.inference_mode():
            pooled: FloatArray = F.embedding_bag(tokens, self._vectors, starts, mode="mean").numpy()
        return pooled

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's words and parts of words, as places of their vectors."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        last = len(self._vectors) - 1
        return [[min(token, last) for token in encoding.ids] for encoding in encodings]

    def vectors_of(self, tokens: IntArray) -> FloatArray:
        """[U, 256]"""
        found: FloatArray = self._vectors[torch.from_numpy(tokens)].numpy()
        return found
