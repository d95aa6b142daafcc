"""Early exits on any staged network: a classifier behind each of its stages, and networks that end at one of them.

A network is traced with torch.fx, no deeper than its stages lie: what stands inside a stage, or beside the way to one,
stays one call. So whatever a stage does inside, the network can end behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from flexfed.models.heads import HEADS
from flexfed.networks import EXITS, WAY_OUT, Factory, build_on_meta, travelling
from flexfed.stages import own_stages, refuse_unknown, stage_shapes


@dataclass(frozen=True)
class Exits:
    """Where a network's exits stand, and what they are.

    Attributes:
        stages: names of modules, in the order in which they run; the last one ends in the network's own classifier.
            Empty = the network's own (`flexfed.stages.own_stages`).
        design: of the other classifiers, a key of `flexfed.models.heads.HEADS`.
        ensemble: whether the prediction is the mean of the logits of all classifiers, not those of the last.
    """

    stages: tuple[str, ...]
    design: str
    ensemble: bool = False

    def of(self, factory: Factory, input_shape: tuple[int, ...], num_classes: int) -> Factory:
        """The factory of a network with these exits.

        Raises:
            ValueError: see `exit_factory`.
        """
        stages = self.stages or own_stages(factory, input_shape)
        return exit_factory(factory, stages, self.design, input_shape, num_classes, self.ensemble)


class ExitNetwork(nn.Module):
    """A network with classifiers behind its stages; the last one is its own.

    Its tensors have the names that they have in the plain network, those of the classifiers begin with "exits.". What
    it gives is the prediction: of the last classifier, or the mean of the logits of all. `logits` gives them all.

    Args:
        children: the modules that the graph calls, by their names.
        graph: of one input; gives the logits of every classifier, the shallowest first.
        ensemble: whether the prediction is the mean of the logits.
        plain: the network without exits, which shares its modules.
    """

    def __init__(self, children: Mapping[str, nn.Module], graph: fx.Graph, ensemble: bool, plain: nn.Module):
        super().__init__()
        for name, module in children.items():
            _put_module(self, name, module)
        self._graph = graph
        self.ensemble = ensemble
        self._plain = (plain,)  # no submodule: its tensors are these

    @property
    def plain(self) -> nn.Module:
        """The network without exits; shares its modules."""
        return self._plain[0]

    def logits(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Of every classifier, each (n, classes), the shallowest first."""
        found: tuple[Tensor, ...] = fx.Interpreter(self, graph=self._graph).run(inputs)
        return found

    def predict(self, logits: Sequence[Tensor]) -> Tensor:
        """The prediction that follows from the logits of every classifier."""
        return torch.stack(tuple(logits)).mean(0) if self.ensemble else logits[-1]

    def forward(self, inputs: Tensor, every: bool = False) -> Any:
        """The prediction, (n, classes); with `every`, the logits of every classifier."""
        found = self.logits(inputs)
        return found if every else self.predict(found)

    @property
    def num_exits(self) -> int:
        """How many classifiers there are."""
        return len(_output(self._graph).args[0])  # type: ignore[arg-type]

    def until(self, num_exits: int) -> ExitNetwork:
        """The network that ends at a classifier; shares its modules.

        Raises:
            ValueError: there is no such one.
        """
        if not 1 <= num_exits <= self.num_exits:
            raise ValueError(f"a network of 1 to {self.num_exits} exits can be asked for, got {num_exits}")
        graph = fx.Graph()
        copied: Any = graph.graph_copy(self._graph, {})
        graph.output(tuple(copied[:num_exits]))
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        return ExitNetwork(_called(self, graph), graph, self.ensemble, self.plain)

    def without(self, missing: Collection[str]) -> nn.Module:
        """The deepest network that has none of these tensors; itself where none is missing."""
        if not missing:
            return self
        depths = (self.until(num) for num in range(self.num_exits, 0, -1))
        return next((n for n in depths if not n.state_dict().keys() & set(missing)), self)


def with_exits(
    model: nn.Module, stages: Sequence[str], heads: Sequence[nn.Module], ensemble: bool = False
) -> ExitNetwork:
    """Attach classifiers to stages of a network, which keeps its own at the end.

    Args:
        model: whose tensors keep their names.
        stages: names of modules, in the order in which they run; each runs once.
        heads: for each of them a classifier of its output.
        ensemble: see `ExitNetwork`.

    Raises:
        ValueError: an unknown stage, one that does not run exactly once or not in that order, two whose classifiers
            would have one name, or a network that cannot be traced; names the module.
    """
    graph = _traced(model, stages)
    nodes = list(_stage_nodes(graph, stages))
    children = _called(model, graph)
    names = [f"{EXITS}.{stage.replace('.', '_')}" for stage in stages]
    if double := [name for name in names if name in children or names.count(name) > 1]:
        raise ValueError(f"{type(model).__name__} has two modules that would be {double[0]!r}; rename one of them")
    found = []
    for name, node, head in zip(names, nodes, heads, strict=True):
        children[name] = head
        kept = _kept(graph, children, node)
        with graph.inserting_after(kept):
            found.append(graph.call_module(name, (kept,)))
    output = _output(graph)
    output.args = ((*found, output.args[0]),)
    graph.lint()
    return ExitNetwork(children, graph, ensemble, model)


def exit_factory(
    factory: Factory,
    stages: Sequence[str],
    design: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    ensemble: bool = False,
) -> Factory:
    """A factory of a network with classifiers behind its stages; picklable where the network's own is.

    Args:
        factory: of the network.
        stages: names of modules, in the order in which they run. The last one ends in the network's own classifier.
        design: of the others, a key of `flexfed.models.heads.HEADS`.
        input_shape: of one sample.
        num_classes: outputs of every classifier.
        ensemble: see `ExitNetwork`.

    Raises:
        ValueError: see `with_exits`; or fewer than two stages, or an unknown design.
    """
    if len(stages) < 2:
        raise ValueError(f"exits need at least two stages, got {', '.join(stages) or 'none'}")
    if design not in HEADS:
        raise ValueError(f"unknown design of exits {design!r}; known: {', '.join(HEADS)}")
    model = build_on_meta(factory)
    for _ in _stage_nodes(_traced(model, stages), stages):  # refuses what cannot be, before it runs
        pass
    shapes = tuple(stage_shapes(model, stages, input_shape))
    return partial(_with_designed_exits, factory, tuple(stages), design, shapes, num_classes, ensemble)


def _with_designed_exits(
    factory: Factory,
    stages: tuple[str, ...],
    design: str,
    shapes: tuple[tuple[int, ...], ...],
    num_classes: int,
    ensemble: bool,
) -> ExitNetwork:
    model = factory()  # before the classifiers: from equal seeds it has the weights that it has without them
    heads = [HEADS[design](shapes, stage, num_classes) for stage in range(len(stages) - 1)]
    return with_exits(model, stages[:-1], heads, ensemble)


@lru_cache(maxsize=16)
def depth_keys(factory: Factory) -> tuple[frozenset[str], ...]:
    """The tensors of a network that ends at its first, second, ... classifier, as `Submodel.keys` names them."""
    model = build_on_meta(factory)
    assert isinstance(model, ExitNetwork)
    return tuple(frozenset(travelling(model.until(num))) for num in range(1, model.num_exits + 1))


class _ToStages(fx.Tracer):
    """Looks only into modules that have a stage inside."""

    def __init__(self, stages: Sequence[str]):
        super().__init__()
        self._stages = stages

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(stage.startswith(f"{module_qualified_name}.") for stage in self._stages)


def _traced(model: nn.Module, stages: Sequence[str]) -> fx.Graph:
    refuse_unknown(model, stages)
    mode = model.training
    try:
        tested, trained = (_ToStages(stages).trace(model.train(training)) for training in (False, True))
    except Exception as error:  # fx fails in many ways; all of them end here
        raise ValueError(
            f"{type(model).__name__} cannot be traced to its stages ({type(error).__name__}: {error}){WAY_OUT}"
        ) from error
    finally:
        model.train(mode)
    if str(tested) != str(trained):
        raise ValueError(
            f"{type(model).__name__} reads in its own code whether it trains, which a trace holds fast; wrap what "
            "depends on that (functional dropout, say) in a module such as nn.Dropout"
        )
    return trained


def _kept(graph: fx.Graph, children: Mapping[str, nn.Module], node: fx.Node) -> fx.Node:
    """What a stage gives, for its classifier: a copy where the network writes into it; the backward pass needs it."""
    if not any(_writes(children, user) for user in node.users):
        return node
    with graph.inserting_after(node):
        return graph.call_method("clone", (node,))


def _writes(children: Mapping[str, nn.Module], node: fx.Node) -> bool:
    """Whether a call changes its input in place."""
    if node.op != "call_module":
        name = str(node.target) if node.op == "call_method" else ""
        return bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))
    module = children[str(node.target)]
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return bool(getattr(module, "inplace", False))


def _stage_nodes(graph: fx.Graph, stages: Sequence[str]) -> Iterator[fx.Node]:
    order = [node for node in graph.nodes if node.op == "call_module" and node.target in stages]
    targets = [str(node.target) for node in order]
    if targets != list(stages):
        raise ValueError(
            f"stages should run once each, in the order given: {', '.join(stages)}; got {', '.join(targets)}"
        )
    return iter(order)


def _called(model: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """The modules that a graph calls, by name."""
    bare = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    if bare:
        raise ValueError(f"{bare[0]!r} of {type(model).__name__} belongs to no module that is called; wrap it in one")
    return {str(n.target): model.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}


def _output(graph: fx.Graph) -> fx.Node:
    node: Any = next(node for node in reversed(graph.nodes) if node.op == "output")
    return node  # type: ignore[no-any-return]


def _put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Set a module at a dotted name, with plain containers above it."""
    *path, leaf = name.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    root.add_module(leaf, module)
