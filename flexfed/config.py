"""The run configuration as frozen dataclasses: read once, checked before round 1."""

from __future__ import annotations

import logging
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from flexfed.bandits import BanditConfig
from flexfed.codecs import CODECS, PLAIN
from flexfed.compute import check_device_name
from flexfed.data import DataConfig
from flexfed.jobs import Task
from flexfed.methods import METHODS
from flexfed.methods.fedstitch import NO_FINETUNING
from flexfed.models import check_model, model_factory
from flexfed.networks import Factory
from flexfed.overrides import Scalar
from flexfed.rivals import BANDITS
from flexfed.runs import absolute_path
from flexfed.training import Training
from flexfed.units import Layout, trace_layout, whole_layout

T = TypeVar("T")

log = logging.getLogger("flwr")

BATCH_NORM = ("static", "batch")
REPLY_ORDER = ("auto", "cohort", "arrival")
BANDIT_PREFIX = "bandit."
RATIO_POLICIES = ("own", "level", "budget", *BANDITS)
PERSONAL = ("own", "none", "stored-local", "global-masked")


@dataclass(frozen=True)
class Settings:
    """Knobs that every method shares.

    Attributes:
        weights: start from a safetensors file, 'torchvision' for the pretrained weights in the local cache, or 'zoo'
            for the blocks of a stitched network.
        stages: for methods with early exits, names of modules behind which the network may end, in the order in which
            they run; the last one ends in the network's own classifier. '' = the network's own stages
            (`flexfed.stages.own_stages`).
        fraction_train: share of the devices in a round's cohort.
        fraction_evaluate: share of the devices that test their level on their own samples (`test_per_label`).
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        ratio_policy: how much of the model a device gets: the level of the method that it holds ('level'), the most
            that its 'budget' allows, in steps of 1/64, or what a bandit makes of that (`flexfed.bandits`); 'own' =
            the method's default: p-ucbv for FedLPS, else level.
        personal: which models of their own all clients test in every evaluation: what each trained last
            ('stored-local'), its units of the global model ('global-masked'), or 'none'; 'own' = stored-local for
            FedLPS, else none.
        round_deadline: modelled seconds that a device may take to receive its part, train it and send it back;
            tests and queries come on top; 0 = any.
        codec: how parts travel, both ways: 'float32', or as integers of 8 or 4 bits (`flexfed.codecs`). Replies are
            rounded at random, so that their mean is unbiased.
        batch_norm: at evaluation: 'static' statistics of each level, or those of the test 'batch'.
        reply_order: fold replies in 'cohort' order (same bits every time) or on 'arrival'; 'auto' = in cohort order
            where devices are simulated, on arrival where they are real (in order, the first silent one holds up all
            that come after the first 64).
        replies_in_flight: messages sent and not yet folded, at most; 0 = 64, and on real devices no limit on arrival.
        round_timeout: seconds after which an exchange closes without the replies that are missing. Where devices are
            simulated, and take turns, seconds without any reply. A device that missed it is not asked again before it
            has replied, or is known to be lost.
        min_replies: a round with fewer valid replies leaves the model as it was; a phase of FedStitch is asked once
            more, and then ends the run with the network it has. Before a round the server waits, up to `round_timeout`,
            until so many devices are there; a cohort has at least so many, but for FlexFL's, which draws sizes first.
        max_update_norm: largest L2 norm of what a reply holds, over all its numbers together and before it is weighed:
            the difference of the trained and the received part, and where compressed's clients send gradients
            (`compressed.mode`) the gradient. A reply beyond it is scaled down to it before it is folded, never refused
            (`flexfed.clipping`); each round tells how many were ('clipped'). A narrow part has fewer numbers, and so a
            smaller norm. It bounds what one client can do in a round, whatever its method; exploration (AutoFLIP) and
            FedStitch, whose clients send no differences, are not bounded by it. 0 = off.
        stop_at_accuracy: the run ends after the first round whose `accuracy` is this or more; 0 = never.
        runs_dir: where run folders go; absolute or beginning with '~'.
        state_dir: where clients keep private state; '' = in the run folder. A node-config's own wins.
        resume: run folder to go on with, from its last checkpoint; '' = begin a new run. A finished run may get more
            rounds; its old last round stays evaluated, whatever `evaluate_every` says.
        torch_device: where networks are trained and tested, on the server and on every client: 'cpu', 'cuda', 'cuda:1',
            or 'auto', a GPU where there is one. A node-config's own wins (`flexfed.compute`).
        torch_threads: threads of torch on the server and on every client.
    """

    strategy: str = "flexfl"
    model: str = "cnn"
    weights: str = ""
    stages: tuple[str, ...] = ()
    fleet: str = "skewed"
    num_server_rounds: int = 30
    fraction_train: float = 0.5
    fraction_evaluate: float = 0.5
    evaluate_every: int = 1
    ratio_policy: str = "own"
    personal: str = "own"
    round_deadline: float = 0.0
    codec: str = PLAIN
    batch_norm: str = "static"
    reply_order: str = "auto"
    replies_in_flight: int = 0
    round_timeout: float = 3600.0
    min_replies: int = 1
    max_update_norm: float = 0.0
    stop_at_accuracy: float = 0.0
    seed: int = 1
    runs_dir: str = "~/.flexfed/runs"
    state_dir: str = ""
    resume: str = ""
    torch_device: str = "cpu"
    torch_threads: int = 1

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, METHODS)
        _one_of("batch-norm", self.batch_norm, BATCH_NORM)
        _one_of("codec", self.codec, CODECS)
        _one_of("reply-order", self.reply_order, REPLY_ORDER)
        _one_of("ratio-policy", self.ratio_policy, RATIO_POLICIES)
        _one_of("personal", self.personal, PERSONAL)
        check_device_name(self.torch_device)
        if not 0 < self.fraction_train <= 1:
            raise ValueError(f"fraction-train must be in (0, 1], got {self.fraction_train}")
        if not 0 <= self.fraction_evaluate <= 1:
            raise ValueError(f"fraction-evaluate must be in [0, 1], got {self.fraction_evaluate}")
        for key in ("num_server_rounds", "evaluate_every", "min_replies", "torch_threads"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key.replace('_', '-')} must be at least 1, got {getattr(self, key)}")
        if self.replies_in_flight < 0:
            raise ValueError(f"replies-in-flight must be >= 0, 0 = as it suits, got {self.replies_in_flight}")
        if not (math.isfinite(self.round_timeout) and self.round_timeout > 0):
            raise ValueError(f"round-timeout must be > 0 seconds, got {self.round_timeout}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..{2**32 - 1}, got {self.seed}")
        if not (math.isfinite(self.round_deadline) and self.round_deadline >= 0):
            raise ValueError(f"round-deadline must be >= 0 modelled seconds, 0 = none, got {self.round_deadline}")
        if not (math.isfinite(self.max_update_norm) and self.max_update_norm >= 0):
            raise ValueError(f"max-update-norm must be >= 0, 0 = off, got {self.max_update_norm}")
        if not 0 <= self.stop_at_accuracy <= 1:
            raise ValueError(f"stop-at-accuracy must be a fraction in [0, 1], got {self.stop_at_accuracy}")
        absolute_path("runs-dir", self.runs_dir)
        for key in ("state_dir", "resume"):
            if getattr(self, key):
                absolute_path(key.replace("_", "-"), getattr(self, key))
        if "/" in self.weights:  # else it is a name
            absolute_path("weights", self.weights)


@dataclass(frozen=True)
class Experiment:
    """One run's whole configuration; what `settings` left to the method ('own') is filled in."""

    settings: Settings
    data: DataConfig
    training: Training
    method: Any
    bandit: BanditConfig = field(default_factory=BanditConfig)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Experiment:
        """Read a flat run configuration; keys that are absent have their defaults.

        Raises:
            ValueError: an unknown name or an impossible value; says which and lists what is possible.
        """
        settings = _filled(read(Settings, values))
        method = METHODS[settings.strategy]
        knobs: Any = read(method.config, values, method.prefix)
        if settings.ratio_policy != "level" and getattr(knobs, "assign", "capacity") != "capacity":
            raise ValueError(
                f"{method.prefix}assign={knobs.assign!r} says who gets which level, ratio-policy="
                f"{settings.ratio_policy!r} how much each device gets: leave one of them at its default"
            )
        if (following := getattr(knobs, "finetune", NO_FINETUNING)) != NO_FINETUNING:
            _check_following(f"{method.prefix}finetune", following, {**values, "strategy": following})
        bandit = read(BanditConfig, values, BANDIT_PREFIX)
        return cls(settings, read(DataConfig, values), read(Training, values), knobs, bandit)

    def task(self, num_classes: int, input_shape: tuple[int, ...]) -> Task:
        """The network, traced, and how it is trained.

        A network that cannot be traced goes with methods that never cut it.

        Raises:
            ValueError: no such network, one too large for the input, or one that cannot be traced but has to be.
        """
        factory = model_factory(self.settings.model, num_classes, input_shape)
        check_model(self.settings.model, num_classes, input_shape)
        attach = METHODS[self.settings.strategy].exits
        exits = attach(self.method, self.settings.stages) if attach else None
        if exits is not None:
            factory = exits.of(factory, input_shape, num_classes)
        layout = self._layout(factory, input_shape)
        torch_device = self.settings.torch_device
        return Task(factory, layout, input_shape, num_classes, self.training, self.method, exits, torch_device)

    def _layout(self, factory: Factory, input_shape: tuple[int, ...]) -> Layout:
        try:
            return trace_layout(factory, input_shape)
        except ValueError as error:
            if METHODS[self.settings.strategy].cuts:
                whole = ", ".join(name for name, method in METHODS.items() if not method.cuts)
                raise ValueError(
                    f"model {self.settings.model!r} cannot be cut, and {self.settings.strategy} has to: {error}; "
                    f"methods that send it whole: {whole}"
                ) from error
            log.info("model %r cannot be cut (%s); %s need not", self.settings.model, error, self.settings.strategy)
            return whole_layout(factory)


def _filled(settings: Settings) -> Settings:
    """Replace what is left to the method.

    Raises:
        ValueError: a bandit for a method that has no widths to choose from.
    """
    method = METHODS[settings.strategy]
    if settings.ratio_policy in BANDITS and not method.any_width:
        able = ", ".join(name for name, m in METHODS.items() if m.any_width)
        raise ValueError(
            f"ratio-policy={settings.ratio_policy!r} needs a method that gives each device a width of its own: {able}; "
            f"{settings.strategy} does not"
        )
    policy = method.ratio_policy if settings.ratio_policy == "own" else settings.ratio_policy
    personal = method.personal if settings.personal == "own" else settings.personal
    return replace(settings, ratio_policy=policy, personal=personal)


def _check_following(key: str, strategy: str, values: Mapping[str, Any]) -> None:
    """Read the configuration of the run that is to follow, so that it is refused before this one begins.

    Raises:
        ValueError: no strategy, one that trains no network, or a value that does not go with it.
    """
    able = [name for name, method in METHODS.items() if not method.phases]
    if strategy not in able:
        raise ValueError(f"{key}={strategy!r} trains no network; expected {NO_FINETUNING} or one of {', '.join(able)}")
    try:
        Experiment.read(values)
    except ValueError as error:
        raise ValueError(f"the run that {key}={strategy!r} asks for cannot be: {error}") from error


def read(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Fill a dataclass from the keys that carry its fields' names, written with hyphens behind `prefix`.

    A tuple field is written as one string, "0.1, 0.2", because Flower's configuration holds no lists.
    """
    hints = get_type_hints(cls)
    given = {}
    for knob in fields(cls):  # type: ignore[arg-type]
        key = prefix + knob.name.replace("_", "-")
        if key in values:
            given[knob.name] = _convert(key, values[key], hints[knob.name])
    return cls(**given)


def keys_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Configuration key -> default, as it is written in pyproject.toml."""
    return {prefix + f.name.replace("_", "-"): _written(f.default) for f in fields(cls)}


def defaults_of(strategy: str) -> dict[str, Any]:
    """Every key that a run of a strategy reads, with its default."""
    method = METHODS[strategy]
    shared = {**keys_of(Settings), **keys_of(DataConfig), **keys_of(Training), **keys_of(BanditConfig, BANDIT_PREFIX)}
    return {**shared, **keys_of(method.config, method.prefix)}


def with_defaults(config: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """A recorded configuration in the words of now: keys that are newer than the run have their defaults."""
    strategy = str(config.get("strategy"))
    return {**(defaults_of(strategy) if strategy in METHODS else {}), **config}


def _written(value: Any) -> Any:
    return ", ".join(str(v) for v in value) if isinstance(value, tuple) else value


def _convert(key: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return _numbers(key, value, get_args(hint)[0])
    if get_origin(hint) in (types.UnionType,):
        hint = get_args(hint)[0]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind = hint if isinstance(hint, type) else str
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{key} must be {_KINDS.get(kind, kind.__name__)}, got {value!r}")
    return value


_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _numbers(key: str, value: Any, kind: Any) -> tuple[Any, ...]:
    text = str(value)
    try:
        return tuple(kind(piece) for piece in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f'{key} must be numbers in one string, like "0.5, 0.25"; got {value!r}') from None


def _one_of(key: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"unknown {key} {value!r}; known: {', '.join(sorted(known))}")
