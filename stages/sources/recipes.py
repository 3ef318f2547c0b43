"""Datasets with a name of their own: what --dataset NAME stands for."""

from dataclasses import replace

from .base import TextConfig

# The Pile's Common-Crawl part, what the paper harvests. This copy of the Pile lacks the parts that
# were taken down for copyright; its Common-Crawl part is whole. The repository's branch is resolved
# to a commit when it is opened, and the commit goes into the recipe.
RECIPES: dict[str, TextConfig] = {
    "pile-cc": TextConfig(
        dataset="monology/pile-uncopyrighted",
        text_column="text",
        split="train",
        filter="meta.pile_set_name=Pile-CC",
        revision="main",
    ),
}


def apply_recipe(config: TextConfig) -> TextConfig:
    """Fill in from the recipe what the configuration leaves None; an empty filter means none."""
    recipe = RECIPES.get(config.dataset)
    if recipe is None:
        return config
    return replace(
        recipe,
        text_column=recipe.text_column if config.text_column is None else config.text_column,
        split=recipe.split if config.split is None else config.split,
        filter=recipe.filter if config.filter is None else config.filter,
        revision=recipe.revision if config.revision is None else config.revision,
    )
