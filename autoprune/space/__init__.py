"""The space file: what a user may ask for.

`settings` holds the whole; `inputs`, `method` and `recipe` its sections, whose descriptions are the reference;
`section` what sections share, `file` how YAML is read with its lines, `faults` how findings are said in plain words.
Decides which settings exist and which values are valid; must not know how anything is carried out. The sole owner of
pydantic and PyYAML.
"""

from autoprune.space.inputs import DataSettings, ModelSettings, PreprocessingSettings, ValidationSettings
from autoprune.space.method import (
    CRITERIA,
    BudgetSettings,
    CriteriaSettings,
    GroupSettings,
    LatencySettings,
    RungSettings,
    SearchSettings,
)
from autoprune.space.recipe import (
    BaselineSettings,
    DistillationSettings,
    IterativeSettings,
    RecipeSettings,
    RegularisationSettings,
)
from autoprune.space.settings import DEFAULT_SPACE, Space, default_space_path, json_schema, load_space, parse_space

__all__ = [
    "CRITERIA",
    "DEFAULT_SPACE",
    "BaselineSettings",
    "BudgetSettings",
    "CriteriaSettings",
    "DataSettings",
    "DistillationSettings",
    "GroupSettings",
    "IterativeSettings",
    "LatencySettings",
    "ModelSettings",
    "PreprocessingSettings",
    "RecipeSettings",
    "RegularisationSettings",
    "RungSettings",
    "SearchSettings",
    "Space",
    "ValidationSettings",
    "default_space_path",
    "json_schema",
    "load_space",
    "parse_space",
]
