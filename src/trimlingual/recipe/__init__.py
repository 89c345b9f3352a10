"""What can be asked for: the recipe, its sections, the languages. No torch, so that the command line answers at once."""

from trimlingual.recipe.data import (
    BuiltinSource,
    Covost2Source,
    DataSettings,
    FolderSource,
    Held,
    HubSource,
    ManifestSource,
    Source,
)
from trimlingual.recipe.loading import (
    Recipe,
    RecipeError,
    SharedSettings,
    list_recipes,
    load_recipe,
    parse_recipe,
    recipes_dir,
)
from trimlingual.recipe.section import TOWERS, Dtype, Metric, References, Tower
from trimlingual.recipe.sections import (
    DecodeSettings,
    DistillSettings,
    EvaluateSettings,
    ModelSettings,
    QuantizeSettings,
    RankSettings,
    TaskSettings,
    VocabSettings,
)
from trimlingual.recipe.training import FLASH_ADAMW, LoraSettings, MixSettings, TokenDistillation, TrainSettings

__all__ = [
    "FLASH_ADAMW",
    "TOWERS",
    "BuiltinSource",
    "Covost2Source",
    "DataSettings",
    "DecodeSettings",
    "DistillSettings",
    "Dtype",
    "EvaluateSettings",
    "FolderSource",
    "Held",
    "HubSource",
    "LoraSettings",
    "ManifestSource",
    "Metric",
    "MixSettings",
    "ModelSettings",
    "QuantizeSettings",
    "RankSettings",
    "Recipe",
    "RecipeError",
    "References",
    "SharedSettings",
    "Source",
    "TaskSettings",
    "TokenDistillation",
    "Tower",
    "TrainSettings",
    "VocabSettings",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "recipes_dir",
]
