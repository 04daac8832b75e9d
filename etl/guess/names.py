"""What columns are usually called."""

import re
from collections.abc import Sequence

_WORDS = {
    "user": "user userid uid username reviewer reviewerid customer customerid visitor visitorid member memberid "
    "account accountid person personid "
    "profileid listener viewer client clientid buyer buyerid session sessionid cookie cookieid device deviceid author "
    "authorid",
    "item": "item itemid iid movie movieid film filmid asin parentasin isbn product productid business businessid book "
    "bookid track trackid song songid artist artistid news newsid article articleid sku aid goods goodsid content "
    "contentid video videoid game gameid app appid venue venueid location locationid poi poiid restaurant recipe "
    "recipeid joke jokeid anime animeid course courseid itemidlist items",
    "time": "timestamp time ts eventtime unixreviewtime unixtime datetime date createdat created at when reviewtime "
    "reviewdate day dt ratedat et clicktime purchasedate times position",
    "value": "rating ratings score stars overall value bookrating plays playcount listencount weight hours count "
    "quantity amount",
    "event_type": "event eventtype type action actiontype behavior behaviour behaviortype interaction interactiontype "
    "kind types",
    "basket": "basket basketid order orderid invoice invoiceno transaction transactionid cart cartid session sessionid",
    "friend": "friend friendid friends target targetid followee followeeid trustee trusteeid followed followedid",
    "title": "title movietitle moviename itemname booktitle name appname productname",
    "year": "year releaseyear yearofpublication startyear",
    "categories": "genres genre categories category tags class maincategory",
}
WORDS = {role: words.split() for role, words in _WORDS.items()}
_TYPED = re.compile(r".+:(token|float)(_seq)?")


def plain(name: str | int) -> str:
    """A column's name without case, marks, outer keys and RecBole's type."""
    bare = re.sub(r":(token|float)(_seq)?$", "", str(name)).rsplit(".", 1)[-1]
    return re.sub(r"[^a-z0-9]", "", bare.lower())


def is_typed(names: Sequence[str]) -> bool:
    """Whether a header names types, as RecBole's do."""
    return all(_TYPED.fullmatch(name) for name in names)


def rank(name: str | int, role: str) -> int | None:
    """How usual the name is for a role, 0 the most; None: it isn't."""
    if not isinstance(name, str):
        return None
    known = WORDS[role]
    found = [known.index(word) for word in (plain(name), plain(name.replace(".", "_"))) if word in known]
    return min(found, default=None)


def is_known(name: str) -> bool:
    return any(rank(name, role) is not None for role in WORDS) or plain(name) in ("id", "userid", "text")
