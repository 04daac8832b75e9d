"""Tables as text: columns line up, and no line ends in spaces."""

from etl.text_table import aligned, markdown, with_sign
from trainer.evaluation.significance import gain_text


def test_words_stand_left_and_numbers_right():
    rows = [["model", "NDCG@10", "p"], ["a long name", "0.1", ""], [], ["b", "10.0000", "0.05"]]
    assert aligned(rows) == [
        "model        NDCG@10     p",
        "a long name      0.1",
        "",
        "b            10.0000  0.05",
    ]
    assert aligned(rows, words=2, gap=1, rule=True)[1:3] == ["─" * 24, "a long name 0.1"]


def test_a_markdown_table_says_how_its_columns_stand():
    assert markdown(["name", "x"], [["a", "1"]]) == ["| name | x |", "| :-- | --: |", "| a | 1 |"]


def test_a_difference_that_rounds_to_zero_has_no_sign():
    assert [with_sign(value, 1) for value in (0.04, -0.04, 0.0, 0.06, -0.06)] == ["0.0", "0.0", "0.0", "+0.1", "-0.1"]
    assert gain_text(-0.0001, -0.0001) == "0.0 %"
