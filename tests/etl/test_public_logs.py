"""conf/source/ describes public logs: each reads a few lines in the shape of the files that it names."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from etl.config import CleaningConfig, LogSource
from etl.settings import conf_root
from etl.sources.log import FileLog
from tests.etl.local_rows import LocalSpark

_BOOK = b'"0002005018";"Clara \\"C.\\" &amp; I";"R. B. Wright";"2001";"Flamingo"'
_GAME = "{{u'id': u'{0}', u'app_name': u'Game {0}', u'genres': [u'Action', u'Indie'], u'developer': u'D'}}\n"
# source -> files, events as (user, item, event type, value), items as (item, title, year, categories)
LOGS: dict[str, tuple[dict[str, bytes], list[tuple[Any, ...]], list[tuple[Any, ...]]]] = {
    "ml100k": (
        {
            "u.data": b"196\t242\t3\t881250949\n",
            "u.item": b"242|Kolya (1996)|24-Jan-1997||url|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n",
            "u.user": b"196|49|M|writer|55105\n",
        },
        [("196", "242", None, 3.0)],
        [("242", "Kolya", 1996, ["Comedy"])],
    ),
    "ml20m": (
        {
            "ml-20m.zip/ml-20m/ratings.csv": b"userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n",
            "ml-20m.zip/ml-20m/movies.csv": b'movieId,title,genres\n2,"Jumanji, The (1995)",Adventure|Fantasy\n',
            "ml-20m.zip/ml-20m/README.txt": b"",
        },
        [("1", "2", None, 3.5)],
        [("2", "Jumanji, The", 1995, ["Adventure", "Fantasy"])],
    ),
    "amazon": (
        {
            "reviews_Beauty_5.json.gz": b'{"reviewerID": "A", "asin": "B7", "overall": 5,"unixReviewTime": 1391040000}',
            "meta_Beauty.json.gz": b"{'asin': 'B7', 'title': \"It's\", 'categories': [['Beauty', 'Hair']]}\n"
            b"{'asin': 'B8', 'brand': 'X'}",
        },
        [("A", "B7", None, 5.0)],
        [("B7", "It's", None, ["Beauty", "Hair"]), ("B8", None, None, [])],
    ),
    "yelp": (
        {
            "yelp_academic_dataset_review.json": json.dumps(
                {"user_id": "u0", "business_id": "b0", "stars": 4.0, "date": "2018-07-07 22:09:11"}
            ).encode(),
            "yelp_academic_dataset_business.json": json.dumps(
                {
                    "business_id": "b0",
                    "name": "N",
                    "city": "C",
                    "categories": "Pubs, Bars",
                    "attributes": {"WiFi": "no"},
                }
            ).encode(),
            "yelp_academic_dataset_user.json": b'{"user_id": "u0", "friends": "u1, u2"}\n'
            b'{"user_id": "u3", "friends": "None"}',
        },
        [("u0", "b0", None, 4.0)],
        [("b0", "N", None, ["Pubs", "Bars"])],
    ),
    "mind": (
        {
            "train/behaviors.tsv": b"1\tU13\t11/11/2019 9:05:58 AM\tN5 N4\tN2-0 N3-1\n",
            "train/news.tsv": b'N3\tnews\tworld\tThe "3"\tabstract\turl\t[]\t[]\n',
        },
        [
            ("U13", "N5", "history", None),
            ("U13", "N4", "history", None),
            ("U13", "N2", "shown", None),
            ("U13", "N3", "clicked", None),
        ],
        [("N3", 'The "3"', None, ["news"])],
    ),
    "steam": (
        {
            "steam_reviews.json.gz": b"{u'username': u'x', u'product_id': u'725280', u'hours': 0.2, "
            b"u'date': u'2017-12-17'}\n",
            "steam_games.json.gz": _GAME.format("725280").encode(),
        },
        [("x", "725280", None, 0.2)],
        [("725280", "Game 725280", None, ["Action", "Indie"])],
    ),
    "retailrocket": (
        {
            "events.csv": b"timestamp,visitorid,event,itemid,transactionid\n"
            b"1433221332117,257597,view,355908,\n1433221333117,257597,transaction,355908,4000\n"
        },
        [("257597", "355908", "view", 1.0), ("257597", "355908", "transaction", 5.0)],
        [],
    ),
    "yoochoose": (
        {"yoochoose-clicks.dat": b"1,2014-04-07T10:51:09.277Z,214536502,0\n"},
        [("1", "214536502", None, None)],
        [],
    ),
    "lastfm1k": (
        {
            "userid-timestamp-artid-artname-traid-traname.tsv": b'u_1\t2009-05-04T23:08:57Z\t\tDJ "X"\t\tF (Live)\n',
            "userid-profile.tsv": b"#id\tgender\tage\tcountry\tregistered\nu_1\tm\t\tJapan\tAug 13, 2006\n",
        },
        [("u_1", 'DJ "X"', None, None)],
        [],
    ),
    "lastfm": (
        {
            "user_artists.dat": b"2\n1\n2\t51\t13883\n",
            "artists.dat": b"id\tname\n51\tDuran\n",
            "user_friends.dat": b"2\n1\n2\t275\n",
        },
        [("2", "51", None, 13883.0)],
        [("51", "Duran", None, [])],
    ),
    "gowalla": (
        {
            "loc-gowalla_totalCheckins.txt.gz": b"0\t2010-10-19T23:55:27Z\t30.2\t-97.7\t22847\n",
            "loc-gowalla_edges.txt.gz": b"0\t1\n1\t0\n",
        },
        [("0", "22847", None, None)],
        [],
    ),
    "bookcrossing": (
        {
            "BX-Book-Ratings.csv": b'"User-ID";"ISBN";"Book-Rating"\r\n"276725";"034545104X";"0"\r\n',
            "BX-Books.csv": b'"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher"\r\n' + _BOOK,
            "BX-Users.csv": b'"User-ID";"Location";"Age"\r\n"276725";"a\xf1o";NULL\r\n',
        },
        [("276725", "034545104X", None, 0.0)],
        [("0002005018", 'Clara "C." &amp; I', 2001, [])],
    ),
    "s3rec": (
        {"Beauty.txt": b"1 3 2\n2 5\n"},
        [("1", "3", None, None), ("1", "2", None, None), ("2", "5", None, None)],
        [],
    ),
    "recbole": (
        {
            "ml-100k.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n",
            "ml-100k.item": b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            b"242\tKolya\t1996\tComedy Drama\n",
            "ml-100k.user": b"user_id:token\tage:token\tgender:token\toccupation:token\n196\t49\tM\twriter\n",
        },
        [("196", "242", None, 3.0)],
        [("242", "Kolya", 1996, ["Comedy", "Drama"])],
    ),
    "otto": (
        {
            "otto-recsys-train.jsonl": b'{"session": 0, "events": [{"aid": 15, "ts": 1659304800025, "type": "clicks"}, '
            b'{"aid": 16, "ts": 1659304904511, "type": "carts"}]}\n'
        },
        [("0", "15", "clicks", None), ("0", "16", "carts", None)],
        [],
    ),
    "jester": ({"jester.csv": b"7,99,-2.5,99\n"}, [("7", "2", None, -2.5)], []),
}
_OTHER = {"delta", "table", "generator", "ml1m"}  # read by tests of their own


def _write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        archive, is_inside, member = name.partition(".zip/")
        path = root / (f"{archive}.zip" if is_inside else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_inside:
            with zipfile.ZipFile(path, "a") as opened:
                opened.writestr(member, content)
        else:
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def test_every_source_of_conf_has_an_example() -> None:
    assert {path.stem for path in (conf_root() / "source").glob("*.yaml")} == LOGS.keys() | _OTHER


@pytest.mark.parametrize("name", LOGS)
def test_a_public_log_is_read_as_described(tmp_path: Path, name: str) -> None:
    files, events, items = LOGS[name]
    _write(tmp_path, files)
    described = yaml.safe_load((conf_root() / "source" / f"{name}.yaml").read_text())
    if "edges" in described:
        described["edges"]["directed"] = True  # both directions are made by the engine
    config = LogSource.model_validate(described | {"root": str(tmp_path)})
    log = FileLog(config, CleaningConfig())
    rows = {}
    for kind in ("events", "items", "users", "edges"):
        frame = getattr(log, kind)(LocalSpark())
        rows[kind] = [] if frame is None else frame.toArrow().to_pylist()
        assert [row["reason"] for row in rows[kind] if row["reason"]] == []
        assert bool(rows[kind]) == (getattr(config, kind) is not None)
    ordered = sorted(rows["events"], key=lambda row: row["source_order"])
    assert [(row["user"], row["item"], row["event_type"], row["value"]) for row in ordered] == events
    assert [(row["item"], row["title"], row["year"], row["categories"]) for row in rows["items"]] == items
