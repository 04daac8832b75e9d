"""Columns as vectors."""

import numpy as np
import pytest

from trainer.encoders import EncoderError
from trainer.encoders.attributes import attribute_vectors, reduced


def test_flags_and_standardised_numbers() -> None:
    vectors, names = attribute_vectors(
        {"genres": [["b", "a", "a"], ["a"], None, ["unknown", "rare"], ["b"]], "sex": ["F", "M", "F", "", "M"]},
        {"age": ["18", "x", "24", None, "30"]},
        min_things=2,
    )
    assert names == ("genres=a", "genres=b", "sex=F", "sex=M", "age", "age known")
    z = 6 / np.sqrt(24)  # of 18, 24 and 30: mean 24, variance 24
    expected = [
        [1, 1, 1, 0, -z, 1],
        [1, 0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 1],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, z, 1],
    ]
    np.testing.assert_allclose(vectors, np.array(expected, np.float32), rtol=1e-6)


def test_a_constant_number_is_known_and_no_more() -> None:
    vectors, _ = attribute_vectors({}, {"year": [1999, 1999, None]}, min_things=2)
    assert vectors.tolist() == [[0, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize("cells", [[None, "", "[]"], [["unknown"], None, []], ["a", "b", "c"]])
def test_a_column_that_holds_nothing(cells: list[str]) -> None:
    with pytest.raises(EncoderError, match="genres: expected a value that 2 have at least, found none of"):
        attribute_vectors({"genres": cells}, {}, min_things=2)
    with pytest.raises(EncoderError, match="genres: expected numbers, found none"):
        attribute_vectors({}, {"genres": cells}, min_things=2)


def test_reduced_vectors_keep_the_products_of_the_largest_directions():
    """Products of reduced vectors are those of the best matrix of that rank (Eckart and Young 1936)."""
    random = np.random.default_rng(0)
    for shape in ((30, 8), (8, 30)):
        vectors = random.normal(size=shape).astype(np.float32)
        vectors[3] = 0  # lacks everything
        found = reduced(vectors, 3)
        assert found.shape == (shape[0], 3)
        assert not found[3].any()
        some = [row for row in range(shape[0]) if row != 3]
        centred = vectors[some] - vectors[some].mean(0)
        left, singular, right = np.linalg.svd(centred, full_matrices=False)
        best = (left[:, :3] * singular[:3]) @ right[:3]
        np.testing.assert_allclose(found[some] @ found[some].T, best @ best.T, atol=1e-4)
        assert (np.diff((found**2).sum(0)) < 0).all()
    assert reduced(vectors, 100).shape[1] == 6  # seven rows, centred
