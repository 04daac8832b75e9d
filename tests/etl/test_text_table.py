"""Tables as text: columns line up, and no line ends in spaces."""

from etl.text_table import aligned, markdown


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
