"""Every recipe with --toy: the same stages as at full size, on the embedded world, and what comes
out compared with what the world is expected to give.
"""
import time

import pytest

from campaign import note

RECIPES = [("nq.sh", {}), ("nq.sh", {"PASSAGES": "dpr", "SIZE": "large"}),
           ("tqa.sh", {}), ("tqa.sh", {"PASSAGES": "dpr"}), ("released-models.sh", {}),
           ("dpr-nq.sh", {}), ("fid-kd.sh", {}), ("lsr.sh", {}), ("3iter-nq.sh", {}),
           ("3iter-msmarco.sh", {}), ("llm-embedder.sh", {}), ("msmarco.sh", {}),
           ("federated.sh", {})]
NAMES = ["-".join([recipe, *settings.values()]) for recipe, settings in RECIPES]


@pytest.mark.parametrize("recipe, settings", RECIPES, ids=NAMES)
def test_recipe_on_the_embedded_world(run_recipe, recipe, settings):
    start = time.time()
    lines, _ = run_recipe(recipe, "--toy", **settings)
    compared = [line for line in lines if "difference" in line]
    assert compared and all("on the embedded world expected" in line or "central" in line
                            for line in compared)
    # the same command does nothing again, and tells the same
    lines, _ = run_recipe(recipe, "--toy", **settings)
    assert not [line for line in lines if line.startswith("== ") and "done before" not in line]
    assert [line for line in lines if "difference" in line] == compared
    for line in compared:
        print(line)
    note("recipes", "-".join([recipe, *settings.values()]), start, figures_compared=len(compared))
