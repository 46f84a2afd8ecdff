"""Compiled regions with generated code, as on a GPU; the fast tests compile without it."""
import torch

from test_regions import GRAPHS, counters, make_reader, random_passages, regions, step


def test_generated_code_trains_and_answers_alike(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setitem(regions.IS_COMPILED, "cpu", False)
    reader = make_reader()
    results = []
    for is_on in (False, True):
        monkeypatch.setitem(regions.IS_COMPILED, "cpu", is_on)
        for seed, shape in enumerate([(2, 5, 30), (3, 7, 41)]):
            batch = random_passages(seed, *shape)
            loss, gradients = step(reader.train(), batch)
            answers = reader.eval().generate(batch[0], 7)
            results.append((loss, gradients, answers))
        if not is_on:
            assert not counters["stats"]
    assert counters["stats"]["unique_graphs"] >= GRAPHS and regions.IS_COMPILED["cpu"]
    for want, got in zip(results[:2], results[2:]):
        torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(got[2], want[2])
        for name, gradient in want[1].items():
            torch.testing.assert_close(got[1][name], gradient, atol=1e-4, rtol=1e-3)
