"""What a run is told: every key, how files and flags fold into one configuration, the rows of the paper's tables."""

from config.explain import UserError
from config.files import read_yaml
from config.fold import dump_config, load_config, recipe_differences, recipe_identity
from config.schema import Config, iter_keys, sections_in

__all__ = [
    "Config",
    "UserError",
    "dump_config",
    "iter_keys",
    "load_config",
    "read_yaml",
    "recipe_differences",
    "recipe_identity",
    "sections_in",
]
