"""`_target_` nodes are called like by `hydra.utils.instantiate`, including the types of containers."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import hydra.utils
import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from tests.config import recorder
from trainer.checks.config import problems_of_targets
from trainer.config.instantiate import instantiate
from trainer.core.errors import UserError

KEPT = "tests.config.recorder.Kept"
LEAF = {"_target_": KEPT, "x": 1}
BOTH = {"a": {"b": [1, {"c": 2}]}, "l": [1, [2]], "n": None, "t": "text", "f": 0.5}
IN_ALL = {"leaf": LEAF, "d": {"leaf": LEAF, "p": {"q": [3]}}, "m": [LEAF, [LEAF, 4]]}


def node(**arguments: Any) -> dict[str, Any]:
    return {"_target_": KEPT, **arguments}


NODES: dict[str, dict[str, Any]] = {
    "scalars": node(a=1, b="x", c=None, d=1.5, e=True),
    "containers": node(**BOTH),
    "nested": node(**IN_ALL),
    **{f"_convert_ {how}": node(_convert_=how, **BOTH, **IN_ALL) for how in ("none", "partial", "object", "all")},
    "_convert_ in capitals": node(_convert_="ALL", **BOTH),
    "_convert_ is inherited": node(_convert_="all", inner=node(d={"x": [1]}, deeper=node(l=[1]))),
    "_convert_ is overridden inside": node(_convert_="all", inner=node(_convert_="none", d={"x": [1]}), d={"x": [1]}),
    "_convert_ inside only": node(inner=node(_convert_="all", d={"x": [1]}), d={"x": [1]}),
    "_convert_ in a mapping": node(_convert_="all", d={"_convert_": "none", "x": [1], "leaf": node(l=[1])}),
    "_convert_ in a list of mappings": node(_convert_="partial", l=[{"_convert_": "none", "x": [1]}, {"y": [1]}]),
    "_recursive_ false": node(_recursive_=False, **IN_ALL),
    "_recursive_ false, all": node(_recursive_=False, _convert_="all", **IN_ALL),
    "_recursive_ false inside": node(inner=node(_recursive_=False, **IN_ALL), **IN_ALL),
    "_recursive_ false in a mapping": node(d={"_recursive_": False, "leaf": LEAF}),
    "_recursive_ true in false": node(_recursive_=False, inner={"_recursive_": True, **LEAF}),
    "_partial_": {"_target_": "tests.config.recorder.two", "_partial_": True, "a": [1]},
    "_partial_ inside": node(factory={"_target_": "tests.config.recorder.two", "_partial_": True, "b": {"x": 1}}),
    "_partial_ is not inherited": node(_partial_=True, inner=LEAF),
    "_args_": node(_args_=[1, LEAF, [2], {"d": 3}], k=[4]),
    "_args_ all": node(_convert_="all", _args_=[1, LEAF, [2], {"d": 3}], k=[4]),
    "_args_ not recursive": node(_recursive_=False, _args_=[LEAF, [LEAF]]),
    "a method": {"_target_": "tests.config.recorder.Holder.make", "a": [1]},
    "a class method": {"_target_": "tests.config.recorder.Holder.of", "a": [1]},
    "a class in a class": {"_target_": "tests.config.recorder.Holder.Inner", "a": [1]},
    "get_class": node(cls={"_target_": "hydra.utils.get_class", "path": "torch.nn.ReLU"}),
    "get_method": node(f={"_target_": "hydra.utils.get_method", "path": "torch.nn.functional.relu"}),
    "get_object": node(dtype={"_target_": "hydra.utils.get_object", "path": "torch.float16"}),
    "it instantiates": {"_target_": "tests.config.recorder.Delegates", "_recursive_": False, "part": node(l=[1])},
    "keys of all kinds": node(d={2: "a", "b.c": 2, True: 3, 0.5: [4]}),
}


def comparable(value: Any) -> Any:
    """Return the types and values of a target's arguments in a form that can be compared."""
    if isinstance(value, recorder.Kept | recorder.Delegates):
        return (type(value).__name__, comparable(list(value.args)), comparable(dict(value.kwargs)))
    if isinstance(value, functools.partial):
        return ("partial", value.func, comparable(list(value.args)), comparable(dict(value.keywords)))
    if isinstance(value, DictConfig | dict):
        return (type(value).__name__, {key: comparable(value[key]) for key in value})
    if isinstance(value, ListConfig | list | tuple):
        return (type(value).__name__, [comparable(value[i]) for i in range(len(value))])
    return value


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """Return the node as in the config.yaml of a run."""
    return OmegaConf.to_container(OmegaConf.create(node), resolve=True)  # type: ignore[return-value]


@pytest.mark.parametrize("name", NODES)
def test_a_target_gets_the_arguments_that_hydra_passes(name: str) -> None:
    before = copy.deepcopy(NODES[name])
    expected = hydra.utils.instantiate(OmegaConf.create(NODES[name]))
    actual = instantiate(resolved(NODES[name]))
    assert comparable(actual) == comparable(expected)
    assert NODES[name] == before


def test_the_comparison_distinguishes_containers() -> None:
    assert comparable(instantiate(node(a=[1]))) != comparable(instantiate(node(a=[1], _convert_="all")))


def test_a_container_can_be_changed_by_the_target() -> None:
    built = instantiate(node(cfg={"optim": {"lr": 0.1}, "net": LEAF}))
    cfg = built.kwargs["cfg"]
    assert cfg.optim.lr == 0.1
    assert isinstance(cfg.net, recorder.Kept)
    assert cfg._get_parent() is None
    cfg.optim.lr = 0.2
    cfg.more = nn.Linear(1, 1)
    assert OmegaConf.to_container(cfg)["optim"] == {"lr": 0.2}


def test_a_string_with_a_dollar_is_not_interpolated() -> None:
    text = {"x": "${not} one", "y": "\\${z}", "z": ["$", "${"]}
    assert OmegaConf.to_container(instantiate(node(d=text)).kwargs["d"], resolve=True) == text


def test_libraries_get_plain_lists_and_nested_targets_do_not() -> None:
    optimizer = instantiate({"_target_": "torch.optim.AdamW", "betas": [0.5, 0.9]}, [nn.Parameter(torch.ones(1))])
    assert not isinstance(optimizer.defaults["betas"], ListConfig)
    layer = instantiate({"_target_": "torch.nn.Unflatten", "dim": 1, "unflattened_size": [2, 3]})
    assert layer(torch.ones(1, 6)).shape == (1, 2, 3)  # takes no ListConfig
    own = {"_target_": "tests.config.test_instantiate.Own", "cfg": {"width": 3}}
    network = instantiate({"_target_": "torch.nn.Sequential", "_args_": [own]})
    assert isinstance(network[0].cfg, DictConfig)
    assert torch.nn.ReLU in {type(layer) for layer in instantiate(SEQUENTIAL)}


SEQUENTIAL = {
    "_target_": "torch.nn.Sequential",
    "_args_": [{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}, {"_target_": "torch.nn.ReLU"}],
}


class Own(nn.Module):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg


def test_exceptions_of_a_target_are_not_wrapped() -> None:
    with pytest.raises(KeyError, match="what it raises"):
        instantiate({"_target_": "tests.config.recorder.fails"})


@pytest.mark.parametrize(
    "bad",
    [
        {"_target_": "hydra.utils.get_method", "path": "os.system"},
        {"_target_": "hydra.utils.get_object", "path": "torch.hub.load"},
        {"_target_": "hydra.utils.get_object", "path": "trainer.config.sources.sys.modules"},
        {"_target_": "hydra.utils.call", "_recursive_": False, "config": {"_target_": "os.system", "command": "true"}},
        {"_target_": "functools.partial", "_args_": [{"_target_": "hydra.utils.get_method", "path": "os.system"}]},
        node(_recursive_=False, part={"x": [{"_target_": "os.system"}]}),
        {"_target_": "hydra.initialize"},
        {"_target_": "omegaconf.OmegaConf.load", "file_": "x"},
    ],
)
def test_nested_nodes_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="refused"):
        instantiate(node(inner=bad))
    config = {"model": node(inner=bad), "callbacks": {}}
    sections: dict[str, Any] = {name: {"_target_": KEPT} for name in ("data", "task", "optimizer", "scheduler")}
    assert "refused" in str(next(iter(problems_of_targets({**config, **sections}, _root()))))


def test_nodes_left_to_the_target_need_no_arguments_but_must_exist() -> None:
    sections: dict[str, Any] = {name: {"_target_": KEPT} for name in ("data", "task", "optimizer", "scheduler")}
    sections["callbacks"] = {}
    part = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}}
    assert not problems_of_targets({"model": node(_recursive_=False, **part), **sections}, _root())
    (problem,) = problems_of_targets({"model": node(**part), **sections}, _root())
    assert "params" in problem.message
    misspelt = node(_recursive_=False, optimizer={"_target_": "torch.optim.SDG"})
    (problem,) = problems_of_targets({"model": misspelt, **sections}, _root())
    assert "did you mean torch.optim.SGD?" in problem.fix


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("_convert_", "al", "did you mean all?"),
        ("_recursive_", "no", "_recursive_=true or model._recursive_=false"),
        ("_partial_", 1, "_partial_=true or model._partial_=false"),
    ],
)
def test_an_invalid_directive_is_refused(key: str, value: Any, fix: str) -> None:
    sections: dict[str, Any] = {name: {"_target_": KEPT} for name in ("data", "task", "optimizer", "scheduler")}
    (problem,) = problems_of_targets({"model": node(**{key: value}), "callbacks": {}, **sections}, _root())
    assert f"model.{key}={value}" in problem.message
    assert fix in problem.fix


def _root() -> Any:
    from pathlib import Path

    return Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _deprecations() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*functools.partial.*")
        yield
