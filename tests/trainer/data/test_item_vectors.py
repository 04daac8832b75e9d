"""Vectors of items as a run reads them: of its split, whitened by its training items alone."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etl.jobs import features, releases
from etl.lake import spark_io
from etl.lake.encodings import Encoding
from etl.tables import FEATURES, FIRST_INDEX, ITEMS
from trainer.arrays import FloatArray
from trainer.config import ItemFeaturesConfig
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.item_vectors import SHRINKAGE, read_vectors, rows_of_items
from trainer.data.release import DataError, Release, pin


def lake_with(
    tiny_lake: str,
    folder: Path,
    vectors: dict[tuple[str, str], FloatArray],
    *,
    items: range,
    inputs: dict[str, int] | None = None,
) -> Release:
    """A copy of the tiny lake with vectors, (encoder, split) -> [N, F], of the items at these places of its
    vocabulary."""
    shutil.copytree(tiny_lake, folder)
    lake = str(folder)
    known = pin(lake, 1).read(ITEMS, ["item", "index"]).to_pylist()
    chosen = [known[place] for place in items]
    index = np.array([row["index"] for row in chosen])
    with spark_io.writing(lake, FEATURES):
        for (encoder, split), whole in vectors.items():
            encoding = Encoding(kind="item", encoder=encoder, split=split, width=whole.shape[1], inputs=inputs or {})
            features.write_arrays(lake, [row["item"] for row in chosen], index, whole, encoding)
        version = spark_io.current_version(lake, FEATURES)
        assert version is not None
        releases.release_with(lake, {FEATURES.name: version})
    return pin(lake, None)


RAW = (np.random.default_rng(0).normal(size=(30, 4)) @ np.diag([5, 1, 0.5, 0.1]) + 3).astype(np.float32)


@pytest.fixture(scope="module")
def release(tiny_lake: str, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Vectors of 30 of 40 items: `text`, and `graph` of the split last-5 and of another one."""
    vectors = {("text", ""): RAW, ("graph", "last-5"): RAW[:, :2].copy(), ("graph", "causal"): RAW[:, 2:].copy()}
    return lake_with(tiny_lake, tmp_path_factory.mktemp("vectors") / "lake", vectors, items=range(30))


@pytest.fixture(scope="module")
def catalogue(release: Release) -> Catalogue:
    return read_catalogue(release, "all")


def trained(catalogue: Catalogue, last: int = FIRST_INDEX + 20) -> Any:
    rows = np.arange(len(catalogue))
    return (rows >= FIRST_INDEX) & (rows < last)


def config(*encoders: str, **settings: Any) -> ItemFeaturesConfig:
    return ItemFeaturesConfig(encoders=encoders, **settings)


def test_vectors_lie_at_their_items_rows(release: Release, catalogue: Catalogue) -> None:
    one = read_vectors(
        release, rows_of_items(catalogue), config("text", whitening=False), split="last-5", trained_V=trained(catalogue)
    )["text"]
    raw = {int(index): vector for index, vector in zip(range(FIRST_INDEX, FIRST_INDEX + 30), RAW, strict=True)}
    for row, index in enumerate(catalogue.global_index.tolist()):
        assert one.has_V[row] == (row >= FIRST_INDEX and index in raw)
        expected = raw[index] if one.has_V[row] else np.zeros(4)
        np.testing.assert_allclose(one.vectors_VF[row], expected, rtol=1e-3)
    assert one.vectors_VF.dtype == np.float16


def test_whitening_is_fitted_on_training_items_alone(release: Release, catalogue: Catalogue) -> None:
    is_trained = trained(catalogue)
    given = {"split": "last-5", "trained_V": is_trained}
    one = read_vectors(release, rows_of_items(catalogue), config("text"), **given)["text"]
    seen = is_trained & one.has_V
    raw = read_vectors(release, rows_of_items(catalogue), config("text", whitening=False), **given)["text"].vectors_VF
    covariance = np.cov(raw[seen].astype(float).T, bias=True)
    variances = np.linalg.eigvalsh(covariance)
    np.testing.assert_allclose(one.vectors_VF[seen].astype(float).mean(0), 0, atol=2e-3)
    whitened = np.cov(one.vectors_VF[seen].astype(float).T, bias=True)
    np.testing.assert_allclose(whitened - np.diag(np.diag(whitened)), 0, atol=1e-2)
    shrunk = variances / (variances + SHRINKAGE * variances.mean())
    np.testing.assert_allclose(np.sort(np.diag(whitened)), np.sort(shrunk), atol=1e-2)
    fewer = read_vectors(
        release,
        rows_of_items(catalogue),
        config("text"),
        split="last-5",
        trained_V=trained(catalogue, FIRST_INDEX + 19),
    )["text"]
    assert (fewer.whitening.mean_F != one.whitening.mean_F).any()


def test_vectors_of_items_that_are_not_trained_on_change_no_whitening(
    tiny_lake: str, release: Release, catalogue: Catalogue, tmp_path: Path
) -> None:
    is_trained = trained(catalogue)
    rows = catalogue.rows(np.arange(FIRST_INDEX, FIRST_INDEX + 30))
    other = RAW.copy()
    other[~is_trained[rows]] += 9
    assert (other != RAW).any()
    shifted = lake_with(tiny_lake, tmp_path / "lake", {("text", ""): other}, items=range(30))
    one, two = (
        read_vectors(lake, rows_of_items(catalogue), config("text"), split="last-5", trained_V=is_trained)["text"]
        for lake in (release, shifted)
    )
    assert (one.whitening.mean_F == two.whitening.mean_F).all()
    assert (one.whitening.transform_FF == two.whitening.transform_FF).all()
    assert (one.vectors_VF[is_trained] == two.vectors_VF[is_trained]).all()
    assert (one.vectors_VF != two.vectors_VF).any()


def test_a_parents_whitening_is_taken(release: Release, catalogue: Catalogue) -> None:
    few, many = trained(catalogue, FIRST_INDEX + 12), trained(catalogue)
    parent = read_vectors(release, rows_of_items(catalogue), config("text", "graph"), split="last-5", trained_V=few)
    grafted = read_vectors(
        release, rows_of_items(catalogue), config("text", "graph"), split="last-5", trained_V=many, fitted=parent
    )
    assert (grafted["text"].vectors_VF == parent["text"].vectors_VF).all()
    narrow = {"text": parent["graph"]}
    with pytest.raises(DataError, match="expected vectors by text as wide as the parent's, 2, found 4"):
        read_vectors(release, rows_of_items(catalogue), config("text"), split="last-5", trained_V=many, fitted=narrow)


def test_the_mean_stands_for_what_is_missing(release: Release, catalogue: Catalogue) -> None:
    is_trained = trained(catalogue)
    one = read_vectors(
        release,
        rows_of_items(catalogue),
        config("text", whitening=False, missing="mean"),
        split="last-5",
        trained_V=is_trained,
    )["text"]
    lacking = ~one.has_V
    lacking[:FIRST_INDEX] = False
    assert lacking.any()
    mean = one.vectors_VF[is_trained & one.has_V].astype(float).mean(0)
    np.testing.assert_allclose(one.vectors_VF[lacking].astype(float), np.tile(mean, (lacking.sum(), 1)), rtol=2e-3)
    assert not one.vectors_VF[:FIRST_INDEX].any()


def test_a_run_reads_vectors_of_its_split_or_of_none(release: Release, catalogue: Catalogue) -> None:
    read = {
        split: read_vectors(
            release,
            rows_of_items(catalogue),
            config("graph", whitening=False),
            split=split,
            trained_V=trained(catalogue),
        )["graph"].vectors_VF
        for split in ("last-5", "causal")
    }
    assert (read["last-5"] != read["causal"]).any()
    with pytest.raises(
        DataError, match=r"by 'graph' for split 'joint-5', found those by graph, text .* causal, last-5"
    ):
        read_vectors(release, rows_of_items(catalogue), config("graph"), split="joint-5", trained_V=trained(catalogue))


def test_vectors_of_a_split_are_of_the_releases_own_sequences(tiny_lake: str, tmp_path: Path) -> None:
    release = lake_with(tiny_lake, tmp_path / "lake", {("graph", "last-5"): RAW}, items=range(30), inputs={"items": 0})
    given = {"split": "last-5", "trained_V": trained(read_catalogue(release, "all"))}
    catalogue = read_catalogue(release, "all")
    read_vectors(release, rows_of_items(catalogue), config("graph"), **given)  # of items: they grow
    with spark_io.writing(release.lake, FEATURES):
        one = Encoding(kind="item", encoder="graph", split="last-5", width=4, inputs={"sequences": 9})
        features.write_arrays(release.lake, ["i05"], np.array([5]), RAW[:1], one)
        version = spark_io.current_version(release.lake, FEATURES)
        assert version is not None
        releases.release_with(release.lake, {FEATURES.name: version})
    with pytest.raises(DataError, match=r"made from version 1 of sequences, which release 3 of .*, found version 9"):
        read_vectors(pin(release.lake, None), rows_of_items(catalogue), config("graph"), **given)


def test_an_encoder_that_there_is_not(release: Release, catalogue: Catalogue, tiny_lake: str) -> None:
    with pytest.raises(DataError, match=r"by 'bert' for split 'last-5', found those by graph, text in release 2"):
        read_vectors(release, rows_of_items(catalogue), config("bert"), split="last-5", trained_V=trained(catalogue))
    bare = pin(tiny_lake, None)
    with pytest.raises(DataError, match=r"expected vectors of items, .* has none; run `python -m trainer features`"):
        read_vectors(bare, rows_of_items(catalogue), config("text"), split="last-5", trained_V=trained(catalogue))


def test_a_domain_without_a_vector(tiny_lake: str, tmp_path: Path) -> None:
    every = pin(tiny_lake, None).read(ITEMS, ["index"])["index"].to_pylist()
    target = set(read_catalogue(pin(tiny_lake, None), "target").global_index.tolist())
    outside = [place for place, index in enumerate(every) if index not in target]
    shutil.copytree(tiny_lake, tmp_path / "lake")
    lake = str(tmp_path / "lake")
    ids = pin(lake, 1).read(ITEMS, ["item"])["item"].to_pylist()
    encoding = Encoding(kind="item", encoder="text", width=4)
    vectors = np.random.default_rng(0).normal(size=(len(outside), 4)).astype(np.float32)
    features.write_arrays(
        lake, [ids[place] for place in outside], np.array([every[place] for place in outside]), vectors, encoding
    )
    with spark_io.writing(lake, FEATURES):
        version = spark_io.current_version(lake, FEATURES)
        assert version is not None
        releases.release_with(lake, {FEATURES.name: version})
    release = pin(lake, None)
    catalogue = read_catalogue(release, "target")
    with pytest.raises(DataError, match="expected vectors by 'text' of items that are read, found none of"):
        read_vectors(release, rows_of_items(catalogue), config("text"), split="last-5", trained_V=trained(catalogue))
