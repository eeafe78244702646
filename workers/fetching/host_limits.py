"""A host's rate, slots and Retry-After: limits that all workers keep together, in Redis."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import redis

from earmark.core import settings

#: A late worker may catch up by this much, too little to change the rate.
BURST_S = 0.25
#: A dead worker's slot is freed this long after its download's deadline.
SLOT_GRACE_S = 5.0
#: The wait for a host whose slots are all taken.
FULL_S = 0.25
LONGEST_WAIT_S = 60.0
#: Redis is not asked again for this long after a failure; only the worker's own limit holds then.
AWAY_S = 5.0
#: Redis is asked this often about a host without rate and slots. Its Retry-After reaches other
#: workers this late.
FREE_S = 1.0
#: Hosts remembered as free.
HOSTS = 1000

#: Returns the milliseconds to wait; 0: go. The rate is GCRA: `due` is the time of the next request
#: that is on time. Each early caller gets its own later slot, `promised` being the last one given
#: out, so that early callers come back one interval apart and not together.
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
    local last = tonumber(redis.call('HGET', KEYS[2], 'promised') or 0)
    local promised = math.max(due, interval + last)
    promised = math.min(promised, now + longest_ms)
    redis.call('HSET', KEYS[2], 'promised', promised)
    return tostring(promised - now)
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

#: A shorter Retry-After never ends a longer one.
BLOCK = """
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then
  redis.call('SET', KEYS[1], '', 'PX', ARGV[1])
end
"""


class HostLimits:
    """Says when a host may be asked, so that all workers together keep its limits.

    Use one per worker process, shared by its threads: call `wait_s(host)` before each request,
    `done(host)` after each one it let through, and `block` when the server asks for a pause.
    Hosts are names with their port, in lower case. It never raises: without Redis only this
    process's own limit (EARMARK_FETCH__HOST_CONCURRENCY) holds.
    """

    def __init__(
        self,
        redis_client: redis.Redis,
        fetch_settings: settings.Fetch,
        ledger_settings: settings.Ledger,
    ) -> None:
        self._redis = redis_client
        self._go = redis_client.register_script(GO)
        self._block = redis_client.register_script(BLOCK)
        self._settings = fetch_settings
        self._longest_block_s = ledger_settings.retry_cap_s
        self._lock = threading.Lock()
        self._asking: Counter[str] = Counter()
        self._slots: defaultdict[str, list[str]] = defaultdict(list)
        self._away_until = 0.0
        self._free_until: dict[str, float] = {}

    def wait_s(self, host: str) -> float:
        """Take a slot and return 0.0, or take none and return the seconds to wait."""
        member = uuid.uuid4().hex
        with self._lock:
            if self._asking[host] + len(self._slots[host]) >= self._settings.host_concurrency:
                return FULL_S
            self._asking[host] += 1
        wait_ms = 0.0 if self._is_free(host) else self._ask_to_go(host, member)
        with self._lock:
            self._asking[host] -= 1
            if not wait_ms:
                self._slots[host].append(member)
            self._tidy(host)
        return wait_ms / 1000 * random.uniform(1.0, 1.05)  # noqa: S311 (jitter)

    def done(self, host: str) -> None:
        """Give a slot back."""
        with self._lock:
            member = self._slots[host].pop()
            self._tidy(host)
        if self._settings.host_slots:
            self._ask(lambda: self._redis.zrem(_keys(host)[2], member))

    def block(self, host: str, seconds: float) -> None:
        """Keep all workers away from the host, at most for EARMARK_LEDGER__RETRY_CAP_S."""
        wait_ms = int(min(seconds, self._longest_block_s) * 1000)
        if wait_ms > 0:
            self._free_until.pop(host, None)
            self._ask(lambda: self._block(_keys(host)[:1], [wait_ms]))

    def _is_free(self, host: str) -> bool:
        return time.monotonic() < self._free_until.get(host, 0.0)

    def _ask_to_go(self, host: str, member: str) -> float:
        """Return the milliseconds to wait; remember for a moment that a host is free."""
        answer = self._ask(lambda: self._go(_keys(host), self._arguments(member)))
        wait_ms = float(answer or 0)
        if not (wait_ms or self._settings.host_rate or self._settings.host_slots):
            if len(self._free_until) >= HOSTS:
                self._free_until.clear()
            self._free_until[host] = time.monotonic() + FREE_S
        return wait_ms

    def _arguments(self, member: str) -> list[Any]:
        rate = self._settings.host_rate
        interval_ms = 1000 / rate if rate else 0
        slot_s = self._settings.timeout_s + SLOT_GRACE_S
        lengths = [int(seconds * 1000) for seconds in (slot_s, BURST_S, FULL_S, LONGEST_WAIT_S)]
        return [self._settings.host_slots, interval_ms, member, *lengths]

    def _tidy(self, host: str) -> None:
        if not self._asking[host] and not self._slots[host]:
            del self._asking[host], self._slots[host]

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Return Redis's answer, or None if it gives none."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return question()
        except redis.RedisError:
            self._away_until = time.monotonic() + AWAY_S
            return None


def _keys(host: str) -> list[str]:
    return [f"earmark:host:{{{host}}}:{part}" for part in ("blocked", "rate", "slots")]
