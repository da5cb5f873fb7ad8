"""The profile store: profiles that were uploaded or built here, by their content, and which of them each model uses.

A file arrives under a temporary name, bounded in size; a child process reads it with the library's own validation,
bounded in time and memory; then it is moved to `<sha256>.safetensors` in one step and recorded. What is published is
never written again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from server import errors, state_tables
from server.aio import within
from server.child_env import child_environment
from server.config import ModelSettings
from server.state import State
from spectral import resources

CHECK_SECONDS = 120.0
BASE_MEMORY, MEMORY_PER_BYTE = 2 << 30, 16
"""Address space of the checking process: the libraries, and the file's half-precision bases in double precision."""
SHIPPED = "shipped"
ROLLBACK = "rollback of switch "
_CHUNK = 1 << 20


def conflict(message: str, code: str) -> errors.ApiError:
    """409."""
    return errors.ApiError(409, message, code=code)


async def inspect_file(path: Path, seconds: float = CHECK_SECONDS) -> dict[str, Any]:
    """What a profile file holds, read by a child process. Raises ApiError 422 where it is no valid profile."""
    size = path.stat().st_size
    memory = BASE_MEMORY + MEMORY_PER_BYTE * size
    command = [sys.executable, "-m", "server.profile_child", "check", str(path), str(memory), str(int(seconds) + 1)]
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # A thread pool reserves address space for every core, and there is nothing here to compute in parallel.
        env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
    )
    try:
        out, said = await within(seconds, child.communicate())
    except asyncio.TimeoutError:
        message = f"the profile could not be checked within {seconds:g} s; it is damaged or far too large"
        raise errors.ApiError(422, message, code="invalid_profile") from None
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if child.returncode != 0:
        lines = said.decode("utf-8", "replace").strip().splitlines()
        why = lines[-1] if lines else f"the checking process ended with status {child.returncode}"
        raise errors.ApiError(422, f"this is not a usable profile: {why}", code="invalid_profile")
    facts: dict[str, Any] = json.loads(out)
    return facts


class ProfileStore:
    """The store of one server. `limit`: largest file in bytes."""

    def __init__(self, state: State, limit: int) -> None:
        self._state = state
        self._limit = limit
        self._folder = state.folder / "profiles"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for left_over in self._folder.glob("incoming-*"):  # of a server that was killed in the middle of an upload
            left_over.unlink()
        self._shipped: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._changing = asyncio.Lock()  # files and rows of the table must agree
        self._kept: Counter[str | None] = Counter()

    def path(self, sha256: str) -> Path:
        """Where the file of a published profile lies."""
        return self._folder / f"{sha256}.safetensors"

    # -- taking in ------------------------------------------------------------------------------------------------

    async def receive(self, model: str, chunks: AsyncIterable[bytes], fingerprint: str = "") -> dict[str, Any]:
        """Take in an upload. `fingerprint`: the model's own, where it is known. Raises ApiError 409, 413 or 422."""
        name = ""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # somebody may have tidied up
            descriptor, name = tempfile.mkstemp(prefix="incoming-", suffix=".safetensors", dir=self._folder)
            await self._write(descriptor, chunks)
            return await self.publish(model, Path(name), "upload", fingerprint)
        except OSError as error:  # a client that is gone raises another kind
            raise errors.storage_failed(error) from error
        finally:
            with suppress(OSError):  # what is left over is removed at the next start
                os.unlink(name)

    async def _write(self, descriptor: int, chunks: AsyncIterable[bytes]) -> None:
        total = 0
        with os.fdopen(descriptor, "wb") as file:
            async for piece in chunks:
                total += len(piece)
                if total > self._limit:
                    raise errors.body_too_large(self._limit)
                await asyncio.to_thread(file.write, piece)
            if not total:
                raise errors.bad_request("the body is empty; send the profile file's bytes", code="empty_body")

    async def publish(self, model: str, file: Path, origin: str, fingerprint: str = "") -> dict[str, Any]:
        """Check a finished file in the store's folder, move it to its place and record it. Raises ApiError 409, 422."""
        facts = await inspect_file(file)
        self._must_fit(model, facts, fingerprint)
        size = file.stat().st_size
        async with self._changing:
            sha256 = await asyncio.to_thread(self._settle, file, facts["content_hash"])
            add = state_tables.add_profile
            new = await self._state.run(lambda db: add(db, model, sha256, size, origin, facts))
        return {"model": model, "sha256": sha256, "new": new, **summary(facts)}

    def _must_fit(self, model: str, facts: dict[str, Any], fingerprint: str) -> None:
        if fingerprint and facts["fingerprint"] != fingerprint:
            message = (
                f"this profile was made for {facts['model']!r} (fingerprint {facts['fingerprint'][:12]}) and the model "
                f"{model!r} has fingerprint {fingerprint[:12]}; build one with `spectral profile build`"
            )
            raise conflict(message, "profile_mismatch")

    def _settle(self, file: Path, expected: str) -> str:
        """Flush the file to the disk and give it its name. The hash is taken here, not believed."""
        digest = hashlib.sha256()
        with file.open("rb") as reading:
            while piece := reading.read(_CHUNK):
                digest.update(piece)
            os.fsync(reading.fileno())
        sha256 = digest.hexdigest()
        if sha256 != expected:
            raise errors.ApiError(422, "the file changed while it was checked; send it again", code="invalid_profile")
        file.chmod(0o444)
        os.replace(file, self.path(sha256))
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return sha256

    # -- looking up -----------------------------------------------------------------------------------------------

    async def rows(self, model: str | None = None) -> list[dict[str, Any]]:
        """Published profiles, newest first."""
        return await self._state.run(lambda db: state_tables.profiles(db, model))

    async def find(self, model: str, given: str) -> str:
        """The full hash for a hash or an unambiguous beginning of at least 8 characters. Raises ApiError 404."""
        matches = []
        if re.fullmatch(r"[0-9a-f]{8,64}", given):
            matches = [row["sha256"] for row in await self.rows(model) if row["sha256"].startswith(given)]
        if len(matches) != 1:
            what = "is ambiguous" if matches else "does not exist"
            message = f"the profile {errors.shorten(given, 70)!r} of {model!r} {what}; GET /admin/profiles lists them"
            raise errors.ApiError(404, message, code="profile_not_found")
        return str(matches[0])

    async def facts(self, settings: ModelSettings, given: str) -> dict[str, Any]:
        """Everything a profile holds but its tensors; `given`: a hash, or "shipped". Raises ApiError 404."""
        if given == SHIPPED:
            return await self._shipped_facts(settings)
        sha256 = await self.find(settings.name, given)
        facts = await self._state.run(lambda db: state_tables.profile_facts(db, settings.name, sha256))
        assert facts is not None
        return facts

    async def _shipped_facts(self, settings: ModelSettings) -> dict[str, Any]:
        path = configured_profile(settings)
        if path is None:
            message = f"no profile is configured or shipped for {settings.name!r}; upload or build one"
            raise errors.ApiError(404, message, code="profile_not_found")
        status = path.stat()
        key = (str(path), status.st_mtime_ns, status.st_size)
        if key not in self._shipped:
            self._shipped[key] = await inspect_file(path)
        return self._shipped[key]

    async def active(self, model: str) -> str | None:
        """The hash of the profile in force, or None for the configured or shipped one."""
        return (await self._state.run(state_tables.active)).get(model)

    async def history(self, model: str) -> list[dict[str, Any]]:
        """Switches, newest first."""
        return await self._state.run(lambda db: state_tables.activations(db, model))

    # -- switching ------------------------------------------------------------------------------------------------

    @contextmanager
    def kept(self, sha256: str | None) -> Iterator[None]:
        """While this is held the profile cannot be deleted."""
        self._kept[sha256] += 1
        try:
            yield
        finally:
            self._kept[sha256] -= 1

    async def usable_path(self, sha256: str) -> Path:
        """The file of a profile, its content checked against its name. Raises ApiError 409 where it was damaged."""
        path = self.path(sha256)
        try:
            found = await asyncio.to_thread(_file_hash, path)
        except OSError as error:
            raise conflict(f"the profile {sha256[:12]} cannot be read: {error}; upload it again", "damaged") from error
        if found != sha256:
            raise conflict(f"the profile {sha256[:12]} is damaged on the disk; upload it again", "damaged")
        return path

    async def record_activation(self, model: str, sha256: str | None, reason: str) -> None:
        """From now on, also after a restart, the model's workers get this profile."""
        await self._state.run(lambda db: state_tables.activate(db, model, sha256, reason))

    async def previous(self, model: str) -> tuple[str | None, int]:
        """What was in force before the switch in force now, and that switch's id. Raises ApiError 409 for none."""
        existing = {row["sha256"] for row in await self.rows(model)}
        stack: list[tuple[str | None, int]] = [(None, 0)]
        for row in reversed(await self.history(model)):
            if row["reason"].startswith(ROLLBACK) and len(stack) > 1:
                stack.pop()
            else:
                stack.append((row["sha256"], row["id"]))
        below = [entry for entry in stack[:-1] if entry[0] is None or entry[0] in existing]
        if len(stack) == 1:
            raise conflict(f"no switch of {model!r} is in force, so there is none to undo", "no_history")
        return below[-1][0], stack[-1][1]

    async def delete(self, model: str, given: str) -> str:
        """Forget a profile and, where no other model has it, its file. Raises ApiError 404, or 409 for the active."""
        async with self._changing:
            sha256 = await self.find(model, given)
            if await self.active(model) == sha256 or self._kept[sha256]:
                raise conflict(f"{sha256[:12]} is in use by {model!r}; activate another one first", "in_use")
            if await self._state.run(lambda db: state_tables.delete_profile(db, model, sha256)):
                self.path(sha256).unlink(missing_ok=True)
                for links in self._folder.glob(f"{sha256}.*.links"):
                    links.unlink(missing_ok=True)
        return sha256


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def configured_profile(settings: ModelSettings) -> Path | None:
    """The file that the model uses while nothing was activated: as configured, else the one shipped for its name."""
    if settings.profile is not None:
        return Path(settings.profile)
    return resources.profile_path(settings.path)


def summary(facts: dict[str, Any]) -> dict[str, Any]:
    """A few facts for lists and answers."""
    ladder = [{key: row[key] for key in ("name", "bits_per_element", "kl_mean", "top1")} for row in facts["ladder"]]
    made_for = {"made_for": facts["model"], "fingerprint": facts["fingerprint"]}
    return {**made_for, "default": facts["default"], "ladder": ladder}


def differences(old: Any, new: Any, path: str = "") -> list[dict[str, Any]]:
    """Where two profiles' facts differ: [{"field", "old", "new"}]; ladder rows are compared by their names."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            if key != "spectrum" or path:
                found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    if isinstance(old, list) and isinstance(new, list):
        rows = [*old, *new]
        if rows and all(isinstance(row, dict) and "name" in row for row in rows):
            return differences({row["name"]: row for row in old}, {row["name"]: row for row in new}, path)
    return [] if old == new else [{"field": path, "old": old, "new": new}]
