"""What the conversion to MLX knows of mlx-lm's models, beside the mlx-lm that is installed."""

import importlib
import pkgutil

import pytest

from loratools.operations.convert import class_names, mlx_models

models = pytest.importorskip("mlx_lm.models")
utils = pytest.importorskip("mlx_lm.utils")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_types_are_those_that_the_installed_mlx_lm_loads():
    import mlx_lm

    assert mlx_lm.__version__.startswith(f"{mlx_models.RELEASE}."), "compare the table again"
    found = set()
    for module in pkgutil.iter_modules(models.__path__):
        try:
            loaded = importlib.import_module(f"mlx_lm.models.{module.name}")
        except SystemExit:  # OLMo's wants a package of its own
            found.add(module.name)
            continue
        if hasattr(loaded, "Model") and hasattr(loaded, "ModelArgs"):
            found.add(module.name)
    found |= {name for name, other in utils.MODEL_REMAPPING.items() if other in found}
    assert found == mlx_models.TYPES


def test_types_whose_stacks_have_names_are_those_of_models():
    """Parts of models of several have types of their own, which mlx-lm does not ask for."""
    types = set(class_names._SWITCH)
    alone = {name.removesuffix("_text") for name in types - mlx_models.TYPES}
    assert alone <= mlx_models.TYPES
