"""The section `data`: where clips come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trimlingual.recipe.section import References, Section


class ManifestSource(Section):
    """A JSONL manifest: audio, reference (or references by language), optional source and id."""

    kind: Literal["manifest"] = Field(default="manifest", description="which kind of source this is")
    path: str = Field(description="of the JSONL file; audio in it is relative to its folder")


class FolderSource(Section):
    """A folder with audio files and a metadata.csv (file_name plus the named columns), as Hugging Face's audiofolder."""

    kind: Literal["folder"] = Field(description="which kind of source this is")
    path: str = Field(description="of the folder")
    references: dict[str, str] = Field(description="language -> column")
    source: str | None = Field(default=None, description="column of the English text")
    id: str | None = Field(default=None, description="column of the clip's id; null: the name of its file")


class HubSource(Section):
    """A Hub (or local) data set loaded by `datasets`."""

    kind: Literal["hub"] = Field(description="which kind of source this is")
    path: str = Field(description="name on the Hub, or a folder")
    name: str | None = Field(default=None, description="configuration of the set")
    revision: str | None = Field(
        default=None,
        description="commit, branch or tag; null: main. A run keeps the commit that its data were made from",
    )
    splits: Annotated[list[str], Field(min_length=1)] = Field(description="read one after the other")
    audio: str = Field(default="audio", description="column of the sound")
    references: dict[str, str] = Field(description="language -> column")
    source: str | None = Field(default=None, description="column of the English text")
    id: str | None = Field(default=None, description="column of the clip's id; null: split and row")


class Covost2Source(Section):
    """CoVoST 2: its TSV beside an unpacked Common Voice folder (whose `clips/` holds the audio)."""

    kind: Literal["covost2"] = Field(description="which kind of source this is")
    tsv: str = Field(description="path of the set's TSV")
    common_voice: str = Field(description="folder of the unpacked Common Voice release")
    target_language: str = Field(description="of the TSV's translations")
    split: Literal["train", "dev", "test"] | None = Field(default=None, description="rows of one split only; null: all")
    max_clips: Annotated[int, Field(ge=1)] | None = Field(default=None, description="the first so many only; null: all")


class BuiltinSource(Section):
    """A split of the speech that ships with the package."""

    kind: Literal["builtin"] = Field(description="which kind of source this is")
    split: Literal["train", "select", "test", "everyday"] = Field(description="of the built-in speech")


Source = Annotated[
    ManifestSource | FolderSource | HubSource | Covost2Source | BuiltinSource, Field(discriminator="kind")
]


Held = Source | Annotated[int, Field(ge=1)]


class DataSettings(Section):
    """Where the clips come from. `select` or `test` as a number: that many clips are held out of `train`."""

    train: Source = Field(description="what is trained on")
    select: Held = Field(description="what chooses layers and weights")
    test: Held = Field(description="what is scored, and nothing else")
    out_of_domain: Source | None = Field(default=None, description="general speech, for training; null: none")
    references: References = Field(
        default="all",
        description="all: each clip has a reference in every target language; any: it is used in the languages it has",
    )
    split_seed: int = Field(default=0, description="of the draw where select or test is a number")
    hold_out: Literal["by_id", "train_test_split"] = Field(
        default="by_id",
        description="how numbers are drawn. by_id: a shuffle of the ids, whatever the order of the rows; train_test_split: "
        "numpy's permutation of the rows, which is that function of `datasets`, and how the paper drew its 100 test clips",
    )
    too_long: Literal["error", "drop"] = Field(
        default="error", description="clips beyond the model's window; drop: left out, counted"
    )
    unusable: Literal["error", "drop"] = Field(
        default="error", description="clips that are silent, shorter than 0.1 s, or stereo whose channels cancel"
    )
    equal_sources: Literal["warn", "drop"] = Field(
        default="warn",
        description="training clips whose source text is one of select or test, case and punctuation aside; drop: not trained on",
    )
