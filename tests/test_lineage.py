"""Where a model comes from, read from a folder that this tool did not make."""

from __future__ import annotations

import json

import pytest

from trimlingual.run.lineage import Lineage, LineageError, ModelFolder, read_lineage


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"model_type": "qwen2_audio", "text_config": {"model_type": "qwen2"}, "audio_config": {}}, (32, 32)),
        ({"model_type": "voxtral", "text_config": {}, "audio_config": {"num_hidden_layers": 4}}, (30, 4)),
        ({"model_type": "qwen2_audio", "text_config": {"num_hidden_layers": 6}, "audio_config": {"encoder_layers": 2}}, (6, 2)),
    ],
)  # fmt: skip
def test_layers_that_a_config_does_not_count_are_its_familys_default(config, layers, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    lineage = read_lineage(tmp_path, "x")
    assert lineage.num_base_layers == dict(zip(("decoder", "encoder"), layers))
    assert lineage.layers["decoder"] == list(range(layers[0]))


@pytest.mark.parametrize("text", ["{", '{"model_type": "bert"}', '{"model_type": "qwen2_audio", "text_config": 3}'])
def test_a_config_that_tells_nothing_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LineageError, match="is missing or damaged"):
        read_lineage(tmp_path)


@pytest.mark.parametrize(
    ("folder", "base", "made_here", "name"),
    [
        ("site-packages/mini/model", "builtin:mini", False, "builtin:mini"),
        ("hub/models--Owner--Some-Model/snapshots/" + "a1" * 20, "Owner/Some-Model", False, "Owner/Some-Model"),
        ("hub/models--me--my-student/snapshots/" + "b2" * 20, "Owner/Some-Model", True, "me/my-student"),
        ("my-models/large", "{tmp_path}/my-models/large", False, "large"),
        ("runs/first/pruned", "Owner/Some-Model", True, "pruned"),
    ],
)
def test_a_folders_name_for_others_has_no_path_of_this_machine(folder, base, made_here, name, tmp_path):
    path = tmp_path / folder
    path.mkdir(parents=True)
    lineage = Lineage(base.format(tmp_path=tmp_path), {"decoder": [0]}, {"decoder": 1})
    if made_here:
        lineage.save(path)
    assert ModelFolder(path, lineage).public_name == name
