"""What a step reads, and what stands for its content: artefacts, base models, sources of clips, text files.

A content is read (or looked up, fingerprint.py) only once its fingerprint is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from trimlingual.data.audio import DataError
from trimlingual.data.hub import is_commit, resolve_commit
from trimlingual.data.sources import source_files, source_fingerprint
from trimlingual.recipe import HubSource, Recipe, Source
from trimlingual.run.artifacts import Artifact, ArtifactError, find_artifact
from trimlingual.run.fingerprint import (
    UNREAD,
    HashCache,
    fingerprint,
    hash_file,
    hash_files,
    hash_model,
    hub_commit,
    is_whole,
)


@dataclass(frozen=True)
class Ref:
    """Something a step reads: where it stands, and the fingerprint that stands for its content, which is found when it is needed.

    Files that are only read have no `path`.
    """

    path: Path | None
    identity: str | Callable[[], str]

    @cached_property
    def fingerprint(self) -> str:
        """Stands for the content; UNREAD if it would have to be read."""
        return self.identity if isinstance(self.identity, str) else self.identity()

    @property
    def folder(self) -> Path:
        """The folder."""
        assert self.path is not None
        return self.path

    @property
    def local(self) -> Path | None:
        """The folder, if it is on this machine."""
        return self.path

    @property
    def origin(self) -> str | None:
        """`id@commit` of what came from the Hub."""
        return None


@dataclass(frozen=True)
class HubRef(Ref):
    """A base model on the Hub. Asking for its `folder` downloads it, which --dry-run never does.

    What is on this machine is taken as it is, also when the Hub has moved on: a run that goes on works with the same files.
    """

    name: str
    revision: str | None
    remembered: HashCache

    with_weights: ClassVar[bool] = True

    @cached_property
    def fingerprint(self) -> str:
        """Of the content, so that a local copy of the same files is the same model."""
        here = self._here()
        if here is None and (content := self.remembered.named(self._key)):
            return content
        if here is None and not self.remembered.reading:
            self.remembered.absent.append(self.name if self.with_weights else f"the processor of {self.name}")
            return UNREAD
        content = self._content(here or self._download())
        if content != UNREAD:
            self.remembered.remember_named(self._key, content)
        return content

    @property
    def folder(self) -> Path:
        """The folder, downloaded first if need be. ArtifactError if it is not any more what the run was planned with."""
        here = self._here()
        if here is None:
            here, planned = self._download(), self.fingerprint
            content = self._content(here)
            if content != planned:
                self.remembered.remember_named(self._key, content)
                raise ArtifactError(
                    f"{self.name} has changed on the Hub since this run was made (now {hub_commit(here)}). Set model.revision to "
                    "the commit in the run's artifact.json (`origins`), or start again to see what the new one makes stale."
                )
        return here

    @property
    def local(self) -> Path | None:
        """The folder, if it is on this machine."""
        return self._here()

    @property
    def origin(self) -> str | None:
        """`id@commit`, once it is downloaded."""
        here = self._here()
        return f"{self.name}@{hub_commit(here)}" if here else None

    @property
    def _key(self) -> str:
        return f"hub:{self.name}@{self.revision}"

    def _content(self, folder: Path) -> str:
        return hash_model(folder, self.remembered)

    def _usable(self, folder: Path) -> bool:
        return is_whole(folder)

    def _here(self) -> Path | None:
        from trimlingual.models.errors import ModelError
        from trimlingual.models.loading import resolve_base

        try:
            folder = resolve_base(self.name, self.revision, download=False, weights=self.with_weights)
        except ModelError:
            return None
        return folder if self._usable(folder) else None

    def _download(self) -> Path:
        from trimlingual.models.loading import resolve_base

        return resolve_base(self.name, self.revision, weights=self.with_weights)


@dataclass(frozen=True)
class HubProcessorRef(HubRef):
    """The processor of a base model on the Hub, for which no weights are fetched: the files that say what the model hears."""

    with_weights: ClassVar[bool] = False

    @property
    def folder(self) -> Path:
        """The folder, with the processor's files in it and perhaps no others."""
        return self._here() or self._download()

    @property
    def _key(self) -> str:
        return f"hub-processor:{self.name}@{self.revision}"

    def _content(self, folder: Path) -> str:
        return hash_files(_window_files(folder), self.remembered)

    def _usable(self, folder: Path) -> bool:
        return bool(_window_files(folder))


def _window_files(folder: Path) -> list[Path]:
    """What says how long a clip the model hears whole."""
    return [path for name in ("preprocessor_config.json", "processor_config.json") if (path := folder / name).is_file()]


def processor_ref(base: Ref, remembered: HashCache) -> Ref:
    """The base model's processor as an input of its own: other weights leave the data as they are."""
    if isinstance(base, HubRef):
        return HubProcessorRef(None, "", base.name, base.revision, base.remembered)
    return Ref(base.path, lambda: hash_files(_window_files(base.folder), remembered))


def base_ref(recipe: Recipe, remembered: HashCache | None = None) -> Ref:
    """The base model, known by its content."""
    from trimlingual.models.loading import is_on_hub, resolve_base

    base, revision = recipe.model.base, recipe.model.revision
    remembered = remembered or HashCache()
    if is_on_hub(base):
        return HubRef(None, "", base, revision, remembered)
    return model_ref(resolve_base(base), remembered)


def model_ref(folder: Path, remembered: HashCache | None = None) -> Ref:
    """A model folder as an input: the artefact's fingerprint, or the whole content for one made elsewhere."""
    artifact = find_artifact(folder)
    if artifact:
        return Ref(folder, artifact.fingerprint)
    return Ref(folder, lambda: hash_model(folder, remembered or HashCache()))


def plan_ref(ranked: Ref) -> Ref:
    """The plan of a search as an input: the search stands for it, unless it was edited since."""

    def identity() -> str:
        made = find_artifact(ranked.folder)
        if made is None or made.fingerprint != ranked.fingerprint:  # it will be made anew
            return ranked.fingerprint
        edits = _edited_plan(made)
        return fingerprint("edited plan", edits, {"rank": made.fingerprint}) if edits else made.fingerprint

    return Ref(ranked.path, identity)


def _edited_plan(made: Artifact) -> dict[str, Any]:
    """What the plan in the folder of a search asks for, if it is not what the search found. Of a damaged one its bytes."""
    from trimlingual.search.plan import PLAN_FILE, PlanError, read_plan

    path = made.path / PLAN_FILE
    try:
        plan = read_plan(path)
    except PlanError:  # the stage that reads it says what is wrong
        return {"damaged": hash_file(path)} if path.is_file() else {}
    asked = {
        "removed": sorted(f"{removal.tower}.{removal.layer}" for removal in plan.removals),
        "bits": {fewer.part: fewer.bits for fewer in plan.bits},
    }
    found = {"removed": sorted(made.info.get("removed", ())), "bits": made.info.get("bits", {})}
    return asked if asked != found else {}


@dataclass(frozen=True)
class SourceRef(Ref):
    """A source of the recipe's data: what lists its clips, and every clip. One that is not there yet is an error once it is read.

    A set on the Hub is known by its commit. A run keeps the one that its data in `out` were made from, whatever the Hub or this machine
    has got since; `moved` says so. Data that were made by name alone stay so.
    """

    source: Source
    role: str
    remembered: HashCache
    out: Path | None

    @cached_property
    def fingerprint(self) -> str:
        """Of the listing, the clips, and the commit where that is known."""
        by_name = self._fingerprint(None)
        if self.commit is None or (self._made and self._made.inputs.get(f"{self.role} source") == by_name):
            return by_name
        return self._fingerprint(self.commit)

    @cached_property
    def commit(self) -> str | None:
        """Of a set on the Hub, where its revision does not say it: the run's own, or what it stands for now."""
        if not isinstance(self.source, HubSource) or is_commit(self.source.revision):
            return None
        return self._made_from or resolve_commit(self.source, ask=self.remembered.reading)

    @property
    def read(self) -> Source:
        """The source at its commit."""
        return self.source.model_copy(update={"revision": self.commit}) if self.commit else self.source

    @property
    def origin(self) -> str | None:
        """`name@commit`."""
        return f"{self.source.path}@{self.commit}" if isinstance(self.source, HubSource) and self.commit else None

    @property
    def moved(self) -> str | None:
        """`name@commit -> commit` where this machine has another one than the run was made from."""
        if not isinstance(self.source, HubSource) or self._made_from is None:
            return None
        now = resolve_commit(self.source, ask=False)
        return f"{self.origin} -> {now}" if now not in (None, self._made_from) else None

    @cached_property
    def _made(self) -> Artifact | None:
        return find_artifact(self.out) if self.out else None

    @property
    def _made_from(self) -> str | None:
        """The commit that the run's data came from, if from this set."""
        assert isinstance(self.source, HubSource)
        before = (self._made.settings["data"].get(self.role) if self._made else None) or {}
        if not all(before.get(key) == getattr(self.source, key) for key in ("kind", "path", "name", "revision")):
            return None
        return self._made.info.get("commits", {}).get(self.role) if self._made else None

    def _fingerprint(self, commit: str | None) -> str:
        try:
            described, files = source_fingerprint(self.source), source_files(self.source)
        except DataError:
            return "missing"
        described |= {"commit": commit} if commit else {}
        return fingerprint("source", described, {"files": hash_files(files, self.remembered)})


def source_ref(source: Source, role: str, remembered: HashCache, out: Path | None = None) -> SourceRef:
    """A source of the recipe's section `data`, which are made in `out`."""
    return SourceRef(None, "", source, role, remembered, out)


def files_ref(paths: Sequence[str], remembered: HashCache | None = None) -> Ref | None:
    """Files of the user's by their content; None for none."""
    if not paths:
        return None
    return Ref(None, lambda: hash_files(map(Path, paths), remembered or HashCache()))
