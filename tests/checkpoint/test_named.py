"""Names of parameters with and without what wrappers insert."""

from __future__ import annotations

import torch
from torch import nn

from trainer.checkpoint.named import fitted, plain_names


def network(compiled: bool) -> nn.Module:
    inner = nn.Linear(2, 2)
    return nn.Sequential(torch.compile(inner, backend="eager") if compiled else inner, nn.Linear(2, 1))


def test_a_state_fits_a_module_that_is_compiled_or_not() -> None:
    for saved, present in ((True, False), (False, True), (True, True), (False, False)):
        state, module = network(saved).state_dict(), network(present)
        module.load_state_dict(fitted(state, module.state_dict()))
        pairs = zip(module.state_dict().values(), state.values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_what_does_not_fit_keeps_its_name() -> None:
    state = {"0._orig_mod.weight": 1, "other._orig_mod.weight": 2}
    assert fitted(state, ["0.weight"]) == {"0.weight": 1, "other._orig_mod.weight": 2}


def test_a_layer_kept_compiled_and_not_keeps_both_names() -> None:
    named = {"net.weight": 1, "net._orig_mod.weight": 2}
    assert plain_names(named) == named
    assert fitted(named, list(named)) == named
    assert plain_names({"a._orig_mod._checkpoint_wrapped_module.b": 1}) == {"a.b": 1}
