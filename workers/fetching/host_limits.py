"""A host's rate, connections and Retry-After: limits that all workers keep together, in Redis."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import redis

if TYPE_CHECKING:
    from collections.abc import Callable

    from earmark.core import settings

#: A late worker may catch up within this; too little to change the rate.
BURST_S = 0.25
#: Beyond a download's own deadline: then a dead worker's slot is free again.
SLOT_GRACE_S = 5.0
FULL_S = 0.25
LONGEST_WAIT_S = 60.0
#: While Redis is away only the worker's own limit holds, and Redis is not asked for this long.
AWAY_S = 5.0
#: Where a host has neither a rate nor slots, others are told this much later that it asked for a pause.
FREE_S = 1.0
HOSTS = 1000

#: Milliseconds to stay away, 0 for go. The rate is GCRA: `due` is when the next request would be on time; who comes
#: too early is `told` a moment of its own, so that all come back one interval apart instead of together.
GO = """
local slots, interval, member = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local slot_ms, burst_ms, full_ms, longest_ms = unpack(ARGV, 4)
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local blocked = redis.call('PTTL', KEYS[1])
if blocked > 0 then return tostring(blocked) end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
if slots > 0 and redis.call('ZCARD', KEYS[3]) >= slots then return full_ms end
if interval > 0 then
  local due = math.max(now, tonumber(redis.call('HGET', KEYS[2], 'due') or 0))
  if due > now + burst_ms then
    local told = math.max(due, interval + tonumber(redis.call('HGET', KEYS[2], 'told') or 0))
    told = math.min(told, now + longest_ms)
    redis.call('HSET', KEYS[2], 'told', told)
    return tostring(told - now)
  end
  redis.call('HSET', KEYS[2], 'due', due + interval)
  redis.call('PEXPIRE', KEYS[2], math.ceil(longest_ms + interval))
end
if slots > 0 then
  redis.call('ZADD', KEYS[3], now + slot_ms, member)
  redis.call('PEXPIRE', KEYS[3], slot_ms)
end
return '0'
"""

#: A shorter wish never ends a longer one.
BLOCK = "if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], '', 'PX', ARGV[1]) end"


class HostLimits:
    """Says when a host may be asked; one per worker process, shared by its threads."""

    def __init__(
        self, redis_client: redis.Redis, limits: settings.Fetch, ledger: settings.Ledger
    ) -> None:
        self._redis = redis_client
        self._go = redis_client.register_script(GO)
        self._block = redis_client.register_script(BLOCK)
        self._limits = limits
        self._longest_block_s = ledger.retry_cap_s
        self._lock = threading.Lock()
        self._asking: Counter[str] = Counter()
        self._slots: defaultdict[str, list[str]] = defaultdict(list)
        self._away_until = 0.0
        self._free_until: dict[str, float] = {}

    def wait_s(self, host: str) -> float:
        """Take a slot and return 0, or take nothing and return how long to stay away."""
        member = uuid.uuid4().hex
        with self._lock:
            if self._asking[host] + len(self._slots[host]) >= self._limits.host_concurrency:
                return FULL_S
            self._asking[host] += 1
        wait_ms = 0.0 if self._is_free(host) else self._ask_to_go(host, member)
        with self._lock:
            self._asking[host] -= 1
            if not wait_ms:
                self._slots[host].append(member)
            self._tidy(host)
        return wait_ms / 1000 * random.uniform(1.0, 1.05)  # noqa: S311 (so that not all come at once)

    def done(self, host: str) -> None:
        """Give a slot back."""
        with self._lock:
            member = self._slots[host].pop()
            self._tidy(host)
        if self._limits.host_slots:
            self._asked(lambda: self._redis.zrem(_keys(host)[2], member))

    def block(self, host: str, seconds: float) -> None:
        """Keep all workers away from the host as long as it asked for, up to the longest pause of the settings."""
        wait_ms = int(min(seconds, self._longest_block_s) * 1000)
        if wait_ms > 0:
            self._free_until.pop(host, None)
            self._asked(lambda: self._block(_keys(host)[:1], [wait_ms]))

    def _is_free(self, host: str) -> bool:
        return time.monotonic() < self._free_until.get(host, 0.0)

    def _ask_to_go(self, host: str, member: str) -> float:
        """Return the milliseconds to stay away, and remember for a moment that there are none."""
        wait_ms: float = (
            self._asked(lambda: float(self._go(_keys(host), self._arguments(member)))) or 0.0
        )
        if not (wait_ms or self._limits.host_rate or self._limits.host_slots):
            if len(self._free_until) >= HOSTS:
                self._free_until.clear()
            self._free_until[host] = time.monotonic() + FREE_S
        return wait_ms

    def _arguments(self, member: str) -> list[Any]:
        interval_ms = 1000 / self._limits.host_rate if self._limits.host_rate else 0
        slot_s = self._limits.timeout_s + SLOT_GRACE_S
        lengths = [int(seconds * 1000) for seconds in (slot_s, BURST_S, FULL_S, LONGEST_WAIT_S)]
        return [self._limits.host_slots, interval_ms, member, *lengths]

    def _tidy(self, host: str) -> None:
        if not self._asking[host] and not self._slots[host]:
            del self._asking[host], self._slots[host]

    def _asked(self, question: Callable[[], Any]) -> Any:
        """Return Redis's answer, or None without one."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return question()
        except redis.RedisError:
            self._away_until = time.monotonic() + AWAY_S
            return None


def _keys(host: str) -> list[str]:
    return [f"earmark:host:{{{host}}}:{what}" for what in ("blocked", "rate", "slots")]
