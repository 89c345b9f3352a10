"""How llama.cpp knows a model family: what the parts are called in GGUF files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufForm:
    """One family in GGUF.

    `chat_template` gives the words around the audio that the model is trained with. llama.cpp hands it one string per message, in which
    `<__media__>` (a server: `<__media_RANDOM__>`) stands for a clip with the tokens before and after its states.
    """

    decoder: str  # architecture of the text model
    projector: (
        str | None
    )  # what computes the audio, `clip.projector_type`; None: nothing does it as the model was trained
    pre_tokenizer: str  # `tokenizer.ggml.pre`
    split: str  # the regular expression that this pre-tokenizer splits texts by
    chat_template: str
    rotates_neighbours: bool = (
        False  # a head's numbers 2i and 2i + 1 are rotated together; transformers has i and i + E / 2
    )
    starts_with: str | None = None  # token before the prompt, which llama.cpp adds itself
    no_audio: str = ""  # why there is no projector
