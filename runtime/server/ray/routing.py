"""Which replica a request is given to: the one that has computed most of how its prompt begins, while loads are alike.

An ingress remembers what it gave to whom; replicas are not asked. A beginning is known by hashes of it, each of a block more.
"""

import json
import random
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Generic, TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

_BLOCK = 64  # characters, of some 16 tokens
_MOST_BLOCKS = 512  # of a prompt; what comes after them decides nothing
_REMEMBERED = 1 << 16  # blocks of all prompts
_BEFORE = ("model", "tools", "chat_template_kwargs")  # fields that change how a prompt begins
_Replica = TypeVar("_Replica", bound=Hashable)


def beginnings(body: bytes) -> tuple[bytes, ...]:
    """Of a request's prompt, the shortest first; none of what is no request for an answer: the application refuses it."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(fields, dict):
        return ()
    prompt = fields.get("messages", fields.get("prompt"))
    if not prompt:
        return ()
    try:
        text = json.dumps([[fields.get(name) for name in _BEFORE], prompt])
    except RecursionError:
        return ()
    found, digest = [], blake2b(digest_size=8)
    for end in range(_BLOCK, min(len(text), _BLOCK * _MOST_BLOCKS) + 1, _BLOCK):
        digest.update(text[end - _BLOCK : end].encode())
        found.append(digest.digest())
    return tuple(found)


class Affinity(Generic[_Replica]):
    """Who was given which beginnings; the eldest are forgotten. Loads are alike up to a difference of `slack` requests."""

    def __init__(self, slack: int, most: int = _REMEMBERED) -> None:
        self._slack, self._most = slack, most
        self._holders: OrderedDict[bytes, set[_Replica]] = OrderedDict()

    def choose(self, prompt: Sequence[bytes], loads: Mapping[_Replica, int]) -> _Replica:
        """One of those that have a load: which has the longest beginning, and of several the idlest."""
        least = min(loads.values())
        near = {replica for replica, load in loads.items() if load <= least + self._slack}
        for beginning in reversed(prompt):
            if holders := self._holders.get(beginning, set()) & near:
                return _idlest(holders, loads)
        return _idlest(loads, loads)

    def remember(self, prompt: Iterable[bytes], replica: _Replica) -> None:
        """It was given to it."""
        for beginning in prompt:
            self._holders.setdefault(beginning, set()).add(replica)
            self._holders.move_to_end(beginning)
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def forget(self, gone: _Replica) -> None:
        """It is no more."""
        for holders in self._holders.values():
            holders.discard(gone)


def _idlest(replicas: Iterable[_Replica], loads: Mapping[_Replica, int]) -> _Replica:
    """Any of the idlest: several ingresses that all took the first would meet there."""
    return min(replicas, key=lambda replica: (loads[replica], random.random()))


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Ray's side of it: a request has its beginnings as the argument `prompt`."""

    def initialize_state(self, slack: int) -> None:
        """See RequestRouter."""
        self._affinity: Affinity[ReplicaID] = Affinity(slack)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen one, then, if that is full, the others."""
        loads = {one.replica_id: self.replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas}
        if not loads:
            return []
        chosen = self._affinity.choose(_prompt(pending_request), loads)
        ranks: tuple[list[RunningReplica], list[RunningReplica]] = ([], [])
        for one in candidate_replicas:
            ranks[one.replica_id != chosen].append(one)
        return [rank for rank in ranks if rank]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """See RequestRouter."""
        self._affinity.remember(_prompt(pending_request), replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """See RequestRouter."""
        super().on_replica_actor_died(replica_id)
        self._affinity.forget(replica_id)


def _prompt(request: PendingRequest | None) -> Sequence[bytes]:
    found: Any = () if request is None else request.kwargs.get("prompt", ())
    return tuple(found)
