"""The section `data`: where clips come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trimlingual.recipe.section import References, Section


class ManifestSource(Section):
    """A JSONL manifest: audio, reference (or references by language), optional source and id."""

    kind: Literal["manifest"] = "manifest"
    path: str


class FolderSource(Section):
    """A folder with audio files and a metadata.csv (file_name plus the named columns), as Hugging Face's audiofolder."""

    kind: Literal["folder"]
    path: str
    references: dict[str, str] = Field(description="language -> column")
    source: str | None = None
    id: str | None = None


class HubSource(Section):
    """A Hub (or local) data set loaded by `datasets`."""

    kind: Literal["hub"]
    path: str
    name: str | None = None
    revision: str | None = None
    splits: Annotated[list[str], Field(min_length=1)]
    audio: str = "audio"
    references: dict[str, str] = Field(description="language -> column")
    source: str | None = None
    id: str | None = None


class Covost2Source(Section):
    """CoVoST 2: its TSV beside an unpacked Common Voice folder (whose `clips/` holds the audio)."""

    kind: Literal["covost2"]
    tsv: str
    common_voice: str
    target_language: str
    split: Literal["train", "dev", "test"] | None = None
    max_clips: Annotated[int, Field(ge=1)] | None = None


class BuiltinSource(Section):
    """A split of the speech that ships with the package."""

    kind: Literal["builtin"]
    split: Literal["train", "select", "test", "everyday"]


Source = Annotated[
    ManifestSource | FolderSource | HubSource | Covost2Source | BuiltinSource, Field(discriminator="kind")
]


Held = Source | Annotated[int, Field(ge=1)]


class DataSettings(Section):
    """Where the clips come from. `select` or `test` as a number: that many clips are held out of `train`."""

    train: Source
    select: Held
    test: Held
    out_of_domain: Source | None = None
    references: References = Field(
        default="all",
        description="all: each clip has a reference in every target language; any: it is used in the languages it has",
    )
    split_seed: int = 0
    hold_out: Literal["by_id", "train_test_split"] = Field(
        default="by_id",
        description="how numbers are drawn. by_id: a shuffle of the ids, whatever the order of the rows; train_test_split: "
        "numpy's permutation of the rows, which is that function of `datasets`, and how the paper drew its 100 test clips",
    )
    too_long: Literal["error", "drop"] = "error"
    unusable: Literal["error", "drop"] = Field(
        default="error", description="clips that are silent, shorter than 0.1 s, or stereo whose channels cancel"
    )
    equal_sources: Literal["warn", "drop"] = Field(
        default="warn",
        description="training clips whose source text is one of select or test, case and punctuation aside; drop: not trained on",
    )
