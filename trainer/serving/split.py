"""Two versions share the traffic by a hash of the user: a user always gets the same one, on every server."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.inference.recommender import Answer, Request, RequestError
from trainer.registry.loading import Served


def hash_of(user: str, salt: str) -> float:
    """BLAKE2b of "<salt>/<raw id>" as a number in [0, 1). Another salt gives another, independent, split."""
    digest = hashlib.blake2b(f"{salt}/{user}".encode(errors="surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


@dataclass(frozen=True)
class Split:
    """`other` answers users below `share`; `own` all others, and requests that name no user."""

    own: Served
    other: Served
    share: float
    salt: str

    def of_domain(self, domain: str) -> "Split":
        """For another domain's items. Raises RequestError."""
        return replace(self, own=self.own.of_domain(domain), other=self.other.of_domain(domain))

    def answer(self, requests: Sequence[Request], k: int) -> list[Answer]:
        """One answer for each request, in order. Raises RequestError."""
        found: dict[int, Answer] = {}
        for answering, is_other in ((self.own, False), (self.other, True)):
            places = [place for place, request in enumerate(requests) if self._is_other(request) is is_other]
            if not places:
                continue
            try:
                found |= zip(places, answering.answer([requests[place] for place in places], k), strict=True)
            except RequestError as error:
                raise self._at_its_place(requests, k) or error from None
        return [found[place] for place in range(len(requests))]

    def _is_other(self, request: Request) -> bool:
        return request.user is not None and hash_of(request.user, self.salt) < self.share

    def _at_its_place(self, requests: Sequence[Request], k: int) -> RequestError | None:
        """The first request's error that is refused alone, with its place among all."""
        for place, request in enumerate(requests):
            try:
                (self.other if self._is_other(request) else self.own).answer([request], k)
            except RequestError as error:
                return RequestError(str(error).replace("record 0:", f"record {place}:", 1))
        return None
