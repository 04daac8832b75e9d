"""Vectors of texts, against the encoders' own packages and against vectors that `transformers` gave."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.arrays import FloatArray
from trainer.encoders import EncoderError, TextEncoder, minilm, text_encoder, text_encoders, word_vectors
from trainer.encoders.weights import checked_sha256

TEXTS = [
    "Toy Story (1995). Animation, Children's, Comedy",
    "Heat",
    "Das Boot — ein Film über Ökonomie",
    "映画 七人の侍",
]
LONG = "A film in which a man walks to the sea and back. " * 60  # some 700 tokens


@pytest.fixture(scope="module", params=["wordllama", "minilm"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    package = {"wordllama": "wordllama", "minilm": minilm.PACKAGE}[request.param]
    pytest.importorskip("tokenizers")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    return text_encoder(request.param)


def test_vectors_of_an_encoder(encoder: TextEncoder) -> None:
    texts = [*TEXTS, LONG, "x"]
    vectors = encoder.encode(texts)
    assert vectors.shape == (6, encoder.width)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert vectors.any(axis=1).all()
    assert (encoder.encode(texts) == vectors).all()  # bit for bit
    order = [3, 0, 5, 4, 1, 2]
    np.testing.assert_allclose(encoder.encode([texts[place] for place in order]), vectors[order], atol=1e-6)
    np.testing.assert_allclose(encoder.encode(TEXTS * 40)[-4:], vectors[:4], atol=1e-6)  # whatever is beside it
    assert encoder.encode([]).shape == (0, encoder.width)


def test_texts_that_mean_alike_are_near(encoder: TextEncoder) -> None:
    films = ["A murder in a small town, and a detective", "Crime in the village, the police look into it"]
    vectors = encoder.encode([*films, "Cartoon animals sing and dance for children"])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.1 + unit[0] @ unit[2]


# The first four numbers of each text's vector, and the vector's product with 0, 1, ... 383, by `transformers` 5.24's
# BertModel, on batches padded to their longest text.
BY_TRANSFORMERS: list[tuple[list[float], float]] = [
    ([-0.0811287, 0.0185307, 0.0283808, -0.0159816], 35.8405),
    ([-0.0650170, 0.0335464, 0.0002676, 0.1150270], 204.2962),
    ([-0.0735293, 0.0692535, 0.0781225, -0.0090894], 274.0694),
    ([-0.0121171, 0.0845675, -0.0384880, 0.0213866], 50.8703),
]


def minilm_or_skip() -> TextEncoder:
    if importlib.util.find_spec(minilm.PACKAGE) is None:
        pytest.skip(f"needs the package {minilm.PACKAGE}")
    return text_encoder("minilm")


def test_minilm_gives_the_vectors_of_transformers_as_stored() -> None:
    vectors = minilm_or_skip().encode(TEXTS)
    np.testing.assert_allclose(vectors[:, :4], [first for first, _ in BY_TRANSFORMERS], atol=2e-6)
    np.testing.assert_allclose(vectors @ np.arange(384), [total for _, total in BY_TRANSFORMERS], atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_minilm_gives_the_vectors_of_transformers_here() -> None:
    transformers = pytest.importorskip("transformers")
    encoder = minilm_or_skip()
    spec = importlib.util.find_spec(minilm.PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    bert = transformers.BertModel.from_pretrained(folder).eval()
    given = transformers.AutoTokenizer.from_pretrained(folder)(
        [*TEXTS, LONG], padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.inference_mode():
        states = bert(**given).last_hidden_state
    mask = given["attention_mask"][..., None].float()
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    np.testing.assert_allclose(encoder.encode([*TEXTS, LONG]), pooled.numpy(), atol=2e-6)


def test_minilm_reads_256_tokens() -> None:
    encoder = minilm_or_skip()
    words = ["sea"] * 254  # and two marks
    vectors = encoder.encode([" ".join(words), " ".join([*words, "unread", "words"]), " ".join([*words[:-1], "read"])])
    assert (vectors[0] == vectors[1]).all()
    assert (vectors[0] != vectors[2]).any()


def test_wordllama_gives_the_vectors_of_its_package() -> None:
    wordllama = pytest.importorskip("wordllama")
    folder = Path(wordllama.__file__).parent
    theirs: FloatArray = wordllama.WordLlama.load(cache_dir=folder, disable_download=True).embed([*TEXTS, LONG])
    np.testing.assert_allclose(text_encoder("wordllama").encode([*TEXTS, LONG]), theirs, atol=1e-6)


def test_weights_that_are_not_those_expected(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(EncoderError, match=r"expected an encoder's weights at .*, found none"):
        checked_sha256(path, minilm.SHA256)
    path.write_bytes(b"")
    with pytest.raises(
        EncoderError, match=r"expected an encoder's weights of SHA-256 53aa51172d14…, found e3b0c44298fc…"
    ):
        checked_sha256(path, minilm.SHA256)


@pytest.mark.parametrize(("name", "package"), [("wordllama", "wordllama"), ("minilm", minilm.PACKAGE)])
def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    install = {"wordllama": word_vectors.INSTALL, "minilm": minilm.INSTALL}[name]
    with pytest.raises(EncoderError, match=f"needs the package {package}") as raised:
        text_encoder(name)
    assert f"`{install}`" in str(raised.value)


def test_an_encoder_that_there_is_not() -> None:
    assert text_encoders() == ["minilm", "wordllama"]
    with pytest.raises(EncoderError, match=r"expected a text encoder \(minilm, wordllama\), found 'bert'"):
        text_encoder("bert")
