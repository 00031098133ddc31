"""The disk cache's index: what is kept, what is fresh, what goes. A core on a database that it is given, with the time.

One row a medium, one row of totals which triggers keep, so that nothing is ever counted by walking over files or rows. A
medium is fresh for the TTL from when it was *written* or the host said that it has not changed; use moves it only in the
order in which media go. Several processes work on one database: each method is one transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmprep.digest import HashName
from mmprep.errors import MmprepError
from mmprep_frontend.media.policy import UrlPolicy
from mmprep_frontend.media.storing import Validators

#: What files are counted in, bytes: many small ones take more room than their lengths.
BLOCK = 4096

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS media (
        key BLOB PRIMARY KEY, name TEXT NOT NULL UNIQUE, nbytes INTEGER NOT NULL, charge INTEGER NOT NULL,
        hash TEXT NOT NULL, digest BLOB NOT NULL, origins TEXT NOT NULL, source BLOB NOT NULL, private INTEGER NOT NULL,
        etag TEXT NOT NULL, modified TEXT NOT NULL, ask INTEGER NOT NULL, written REAL NOT NULL, used REAL NOT NULL,
        turn INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS by_use ON media (turn)",
    "CREATE TABLE IF NOT EXISTS totals (one INTEGER PRIMARY KEY, nbytes INTEGER NOT NULL, turn INTEGER NOT NULL)",
    "INSERT OR IGNORE INTO totals VALUES (1, 0, 0)",
    """CREATE TRIGGER IF NOT EXISTS comes AFTER INSERT ON media BEGIN
        UPDATE totals SET nbytes = nbytes + NEW.charge; END""",
    """CREATE TRIGGER IF NOT EXISTS goes AFTER DELETE ON media BEGIN
        UPDATE totals SET nbytes = nbytes - OLD.charge; END""",
)
_COLUMNS = "key, name, nbytes, hash, digest, origins, source, private, etag, modified, ask, written, used"


@dataclass(frozen=True, slots=True)
class Kept:
    """One medium of the cache.

    Attributes
    ----------
    key: SHA-256 of its URL and scope.
    nbytes: its length.
    hash_name, digest: of its bytes.
    origins: of the URLs that led to it, in order: scheme, host and port. URLs are not kept: they may hold secrets.
    source: the digest of the URL that gave it.
    private: whether private addresses might be dialled for it.
    validators: to ask its host with.
    ask: whether the host is to be asked before each use.
    name: of the file with its bytes; never used twice.
    written: when it was written, or last found unchanged; seconds of the wall clock.
    used: when it was last used; the order in which media go does not depend on it.
    """

    key: bytes
    nbytes: int
    hash_name: HashName
    digest: bytes
    origins: tuple[str, ...]
    source: bytes
    private: bool
    validators: Validators
    ask: bool
    name: str = ""
    written: float = 0.0
    used: float = 0.0

    @property
    def charge(self) -> int:
        """What it counts, in bytes: whole blocks."""
        return -(-self.nbytes // BLOCK) * BLOCK

    def is_fresh(self, now: float, ttl: float) -> bool:
        """Whether it may be used unasked; a clock that was set back makes it stale."""
        return not self.ask and 0 <= now - self.written < ttl

    def may_be_read(self, policy: UrlPolicy) -> bool:
        """Whether the policy of today lets pass what led to it."""
        try:
            for origin in self.origins:
                policy.judge_url(origin)
        except MmprepError:
            return False
        return self.private == policy.allow_private


@dataclass(frozen=True, slots=True)
class Change:
    """What has become of a medium that was offered.

    Attributes
    ----------
    kept: whether it is in the index now.
    gone: names of the files that nothing in the index means any more.
    evicted: how many media went to make room.
    """

    kept: bool
    gone: tuple[str, ...] = ()
    evicted: int = 0


class Index:
    """The rules on one connection, of which nothing else begins transactions.

    Parameters
    ----------
    connection:
        To a database that is this index's alone.
    max_bytes:
        Of all media, counted in blocks.
    ttl:
        Seconds for which a medium is fresh.
    """

    def __init__(self, connection: sqlite3.Connection, *, max_bytes: int, ttl: float) -> None:
        connection.isolation_level = None
        self._db = connection
        self._max_bytes = max_bytes
        self._ttl = ttl

    def prepare(self) -> None:
        """Make the tables where there are none."""
        with self._transaction():
            for statement in _SCHEMA:
                self._db.execute(statement)

    def find(self, key: bytes) -> Kept | None:
        """Return what is kept under ``key``; it may be stale."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM media WHERE key = ?", (key,)).fetchone()  # noqa: S608 -- constants
        return None if row is None else _kept(row)

    def put(self, kept: Kept, *, fetched: float, now: float) -> Change:
        """Keep a medium whose file is there, in place of what its key had, and let go what finds no room any more.

        What was fetched before the one at hand was written is not kept: it is the older one.
        """
        if kept.charge > self._max_bytes:
            return Change(False, (kept.name,))
        with self._transaction():
            known = self.find(kept.key)
            # Where the clock was set back, "later" is a time that has not come yet.
            if known is not None and fetched <= known.written <= now:
                return Change(False, (kept.name,))
            gone = self._delete([] if known is None else [known.name])
            room = self._max_bytes - kept.charge
            victims = self._victims(room)
            gone += self._delete(victims)
            self._db.execute(
                "INSERT INTO media VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    kept.key,
                    kept.name,
                    kept.nbytes,
                    kept.charge,
                    kept.hash_name,
                    kept.digest,
                    json.dumps(kept.origins),
                    kept.source,
                    int(kept.private),
                    kept.validators.etag,
                    kept.validators.modified,
                    int(kept.ask),
                    kept.written,
                    kept.used,
                    self._turn(),
                ),
            )
        return Change(True, tuple(gone), len(victims))

    def touch(self, names: Iterable[str], now: float) -> None:
        """Note that media were used, in this order. Their freshness stays."""
        with self._transaction():
            for name in names:
                self._db.execute("UPDATE media SET turn = ?, used = ? WHERE name = ?", (self._turn(), now, name))

    def renew(self, name: str, validators: Validators, *, ask: bool, now: float) -> None:
        """Note that the host says that a medium has not changed: its TTL begins anew."""
        with self._transaction():
            self._db.execute(
                "UPDATE media SET written = ?, etag = ?, modified = ?, ask = ? WHERE name = ?",
                (now, validators.etag, validators.modified, int(ask), name),
            )

    def drop(self, names: Iterable[str]) -> list[str]:
        """Forget media; return the names of those that were there."""
        with self._transaction():
            return self._delete(names)

    def drop_dead(self, now: float) -> list[str]:
        """Forget media that are stale and cannot be asked about, and what exceeds a limit that was lowered."""
        stale = "(written > ? OR written <= ?) AND etag = '' AND modified = ''"
        with self._transaction():
            rows = self._db.execute(f"SELECT name FROM media WHERE {stale}", (now, now - self._ttl))  # noqa: S608 -- constants
            gone = self._delete([name for (name,) in rows.fetchall()])
            return gone + self._delete(self._victims(self._max_bytes))

    def clear(self) -> list[Kept]:
        """Forget all media; return them."""
        with self._transaction():
            gone = list(self.all())
            self._db.execute("DELETE FROM media")
        return gone

    def all(self) -> Iterator[Kept]:
        """Yield all media, the one that was used last first."""
        for row in self._db.execute(f"SELECT {_COLUMNS} FROM media ORDER BY turn DESC"):  # noqa: S608 -- constants
            yield _kept(row)

    def count(self) -> int:
        """Return how many media there are."""
        (number,) = self._db.execute("SELECT COUNT(*) FROM media").fetchone()
        return int(number)

    def names(self) -> set[str]:
        """Return the names of all media's files."""
        return {name for (name,) in self._db.execute("SELECT name FROM media")}

    def knows(self, name: str) -> bool:
        """Whether a file of this name is a medium's."""
        return self._db.execute("SELECT 1 FROM media WHERE name = ?", (name,)).fetchone() is not None

    def nbytes(self) -> int:
        """Return the bytes of all media, in whole blocks."""
        (total,) = self._db.execute("SELECT nbytes FROM totals").fetchone()
        return int(total)

    def _victims(self, room: int) -> list[str]:
        """Return the least recently used media without which the rest fits into ``room`` bytes."""
        excess = self.nbytes() - room
        victims: list[str] = []
        if excess > 0:
            for name, charge in self._db.execute("SELECT name, charge FROM media ORDER BY turn"):
                victims.append(name)
                excess -= charge
                if excess <= 0:
                    break
        return victims

    def _delete(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self._db.execute("DELETE FROM media WHERE name = ?", (name,)).rowcount]

    def _turn(self) -> int:
        """Return a number that rises: the order of use, whatever the clocks say."""
        self._db.execute("UPDATE totals SET turn = turn + 1")
        (turn,) = self._db.execute("SELECT turn FROM totals").fetchone()
        return int(turn)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE: the lock is taken, or refused, before anything is read.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # A full disk has rolled back already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _kept(row: tuple[Any, ...]) -> Kept:
    key, name, nbytes, hash_name, digest, origins, source, private, etag, modified, ask, written, used = row
    return Kept(
        key=key,
        nbytes=nbytes,
        hash_name=hash_name,
        digest=digest,
        origins=tuple(json.loads(origins)),
        source=source,
        private=bool(private),
        validators=Validators(etag, modified),
        ask=bool(ask),
        name=name,
        written=written,
        used=used,
    )
