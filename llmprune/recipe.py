"""The recipe: everything that a run may choose, as frozen dataclasses with strict keys, YAML in and out."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llmprune.errors import UserError, unknown
from llmprune.quality import keys_of

T = TypeVar("T")

Named = str | dict[str, Any]
"""The name of a thing, or a mapping of its `name` and options."""

NAMED = ("method", "allocation", "by")
"""Keys whose value is one `Named` thing."""

DEFAULT_SPARSITY = "50%"

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What the blocks may be run in; `auto` is the checkpoint's own."""

AIM = 0.5
"""How far linears aim at the dense model's outputs where their kept weights are reconstructed. Measured."""


@dataclass(frozen=True)
class Calibration:
    """The text that statistics are collected on.

    Args:
        source: `c4`, `wikitext2`, `builtin`, a Hub data set `owner/name`, or a local .txt, .jsonl, .json.gz, .parquet.
        samples: number of token sequences.
        length: tokens per sequence; by default 2048, or what the model can take.
        seed: draws the documents.
        config, split: of a Hub data set.
        column: where the text stands, in a Hub data set or a local file of records; by default `text`.
        true_sequential: the linears of a block are pruned in the order in which they run, each on inputs that have
            passed those before it. Else all are pruned on what the block as it was sees, as in the published code of
            most methods, and the block is run twice.
        asymmetric: what linears whose kept weights are chosen anew aim at: 0 for the dense linear's outputs on what the
            pruned model gives it, 1 for its outputs on what the dense model gives it, so that what was lost before is
            made up for; or a share in between. By default `AIM` where zeros are followed by a reconstruction of each
            linear and nothing else changes; else 0, as methods were published.
    """

    source: str = "c4"
    samples: int = 128
    length: int | None = None
    seed: int = 0
    config: str | None = None
    split: str | None = None
    column: str | None = None
    true_sequential: bool = True
    asymmetric: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "calibration", "samples", "length")
        if self.asymmetric is not None and not 0 <= self.asymmetric <= 1:
            raise UserError(f"calibration.asymmetric must lie in [0, 1], not {self.asymmetric}")


@dataclass(frozen=True)
class Rule:
    """Other choices for the linears whose name matches; the first rule that matches a linear is the only one used.

    Args:
        match: a glob over the full name (`*.down_proj`), or `re:` and a regular expression.
        sparsity, method, scope: as in the recipe; left out, the recipe's.
        skip: leave these linears dense.
    """

    match: str
    sparsity: str | float | None = None
    method: Named | None = None
    scope: str | None = None
    skip: bool = False


@dataclass(frozen=True)
class Depth:
    """Whole blocks that the model does without; none while `drop` is not given.

    Args:
        drop: how many go: a number of blocks (6), a share of them (`20%`), or a list of the numbers of those that do.
        by: how they are chosen: `greedy`, `influence` or `evolve`, or a mapping of its `name` and options.
    """

    drop: str | int | float | list[int] | None = None
    by: Named = "greedy"


@dataclass(frozen=True)
class Width:
    """Channels and heads that each block does without, as many in every block; none while neither is given.

    Args:
        channels: how many of an MLP's channels go: a number of them, or a share (`20%`).
        heads: how many heads go, likewise: those that have keys and values of their own; their queries go with them.
        params: instead of `channels`, the share of the dense model's weights that may stay (`80%`): as many channels go
            as it takes.
        flops: likewise, of the products that a token takes, attention scores aside.
        hidden: how many of the model's hidden channels go, likewise: those that carry the least.
        ranking: `local`, or with `params` or `flops` `global`: heads go as well as channels, as many of each as lose
            the least over all blocks by a `by` that compares them (`taylor`).
        by: how channels and heads are chosen: `osscar`, `taylor`, `flap`, `wanda` or `magnitude`, or a mapping
            of its `name` and options.
    """

    channels: str | int | float | None = None
    heads: str | int | float | None = None
    params: str | float | None = None
    flops: str | float | None = None
    hidden: str | int | float | None = None
    ranking: str = "local"
    by: Named = "osscar"

    def __post_init__(self) -> None:
        said = [name for name in ("channels", "params", "flops") if getattr(self, name) is not None]
        if len(said) > 1:
            raise UserError(f"width.{said[0]} and width.{said[1]} both say how many channels go: give one of them")
        if self.ranking not in ("local", "global"):
            raise UserError(f"width.ranking must be local or global, not {self.ranking!r}")
        if self.ranks and (self.heads is not None or said not in (["params"], ["flops"])):
            raise UserError(
                "width.ranking global finds out how many channels and heads go within a budget: give width.params or "
                "width.flops, and not how many go"
            )

    @property
    def budget(self) -> tuple[str, str | float] | None:
        """What a budget is of, `params` or `flops`, and the part of it that may stay; None without one."""
        said = (("params", self.params), ("flops", self.flops))
        return next(((name, share) for name, share in said if share is not None), None)

    @property
    def ranks(self) -> bool:
        """Whether it is still to be ranked how many of each kind go."""
        return self.ranking == "global"

    @property
    def asks(self) -> bool:
        """Whether any channels of MLPs or any heads go."""
        return any(value is not None for value in (self.channels, self.heads, self.params, self.flops))


@dataclass(frozen=True)
class Experts:
    """Experts that each mixture does without, as many in every block; none while `drop` is not given.

    Args:
        drop: how many go, of those that a router chooses among: a number of them, or a share (`25%`).
        by: how they are chosen: `reap`, `frequency` or `norm`, or a mapping of its `name` and options.
    """

    drop: str | int | float | None = None
    by: Named = "reap"


@dataclass(frozen=True)
class Evaluation:
    """Perplexity before and after pruning; off while `text` is not given.

    Args:
        text: as `Calibration.source`; named texts take the part held out for evaluation, Hub data sets their `test`.
        length: context length in tokens; by default 2048 or what the model can take.
        stride: tokens from the start of one window to that of the next; each window but the first then tells of its
            last so many tokens alone. By default windows don't overlap, and each tells of all its tokens but the first.
        config, split, column: as in `Calibration`.
        max_perplexity: a dense model worse than this counts as broken and is not pruned; null for no bound.
    """

    text: str | None = None
    length: int | None = None
    stride: int | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None
    max_perplexity: float | None = 1000.0

    @classmethod
    def of(cls, text: str | Evaluation | None, length: int | None = None, stride: int | None = None) -> Evaluation:
        """That of a text by its name, cut so; or what is one already, as it is.

        Raises:
            UserError: its length or stride are said twice.
        """
        if not isinstance(text, Evaluation):
            return cls(text, length, stride)
        if length is not None or stride is not None:
            raise UserError("the evaluation says itself how its text is cut: leave the length and the stride out")
        return text

    def __post_init__(self) -> None:
        _positive(self, "evaluate", "length", "stride", "max_perplexity")
        if self.max_perplexity == float("inf"):
            raise UserError("evaluate.max_perplexity must be a number, or null for no bound")


@dataclass(frozen=True)
class Recipe:
    """What to do with a model.

    Args:
        sparsity: `2:4`, `4:8`, any N:M (at most N of every M kept), `0.5`, or `50%`. By default 50 %, or none where the
            model gets smaller otherwise.
        depth: blocks that it does without, see `Depth`; what is pruned is what is left.
        width: channels and heads that its blocks do without, see `Width`.
        experts: experts that they do without, see `Experts`.
        method: a method's name, or a mapping of its `name` and options.
        scope: what an unstructured sparsity is counted over, `row` or `matrix`; by default the method's own.
        permute: let channels change places before N:M groups are made of them, where a block returns the same then;
            `auto` does so where there are any, and true also sees that there are.
        refine: what makes the method's mask better, one after the other: names, or mappings of `name` and options.
        reconstruct: what then chooses the kept weights anew, likewise.
        allocation: how sparse each linear is to be for that sparsity of all of them: the name of an allocation, or a
            mapping of its `name` and options; or a plan file (`.yaml`).
        calibration: the text and how much of it.
        ignore: names of linears to leave dense, globs or `re:` expressions; as the model has them before blocks go.
        rules: exceptions, see `Rule`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: what the blocks are run in: `auto` (the checkpoint's), `float32`, `bfloat16`, `float16`. Solving is
            always float32, and the result is written in the checkpoint's own dtype.
        shard_size: the largest shard to write; a block that is larger takes several.
        max_memory: the most that the process may take of the host's memory (`8GiB`); the work is laid out so that it
            fits. By default what is free.
        evaluate: perplexity before and after.
        trust_remote_code: run code that comes with the model (`auto_map` in its config); off unless asked.
    """

    sparsity: str | float | None = None
    depth: Depth = field(default_factory=Depth)
    width: Width = field(default_factory=Width)
    experts: Experts = field(default_factory=Experts)
    method: Named = "sparsegpt"
    scope: str | None = None
    permute: bool | str = False
    refine: tuple[Named, ...] = ()
    reconstruct: tuple[Named, ...] = ()
    allocation: Named = "uniform"
    calibration: Calibration = field(default_factory=Calibration)
    ignore: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    shard_size: str = "5GB"
    max_memory: str | None = None
    evaluate: Evaluation = field(default_factory=Evaluation)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if isinstance(self.permute, str) and self.permute != "auto":
            raise UserError(f"permute must be true, false or auto, not {self.permute!r}")
        parse_size(self.shard_size)
        if self.max_memory is not None:
            parse_size(self.max_memory)

    @property
    def narrows(self) -> bool:
        """Whether blocks become narrower."""
        return self.width.asks or self.width.hidden is not None or self.experts.drop is not None

    def settled(self) -> Recipe:
        """With the sparsity that is meant where none is said: 50 %, or none where the model gets smaller otherwise."""
        meant = self.sparsity is None and self.depth.drop is None and not self.narrows
        return replace(self, sparsity=DEFAULT_SPARSITY) if meant else self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain data.

        Raises:
            UserError: an unknown key (the answer names the nearest one) or a value of the wrong kind.
        """
        return build(cls, values, "recipe")

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a YAML file.

        Raises:
            UserError: the file is missing, is no YAML mapping, or does not fit the recipe's keys.
        """
        loaded = read_yaml(path, "recipe")
        try:
            return cls.from_dict(loaded)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for YAML and JSON; `from_dict` takes it back.

        What is younger than the rest, and says nothing, is left out: earlier requests were the same without it.
        """
        told = typing.cast(dict[str, Any], _plain(asdict(self)))
        for name, silent in (("hidden", None), ("ranking", "local")):
            if told["width"][name] == silent:
                del told["width"][name]
        return told

    def to_yaml(self) -> str:
        """The recipe as a YAML text that `read` takes back."""
        return to_yaml(self.to_dict())

    def override(self, key: str, value: Any) -> Recipe:
        """A copy with one key changed.

        Args:
            key: `sparsity`, `calibration.samples`, `method.damping`, ...
            value: its value; `read_value` reads one that was written as text.
        """
        values = self.to_dict()
        *parents, last = key.split(".")
        place = values
        for depth, parent in enumerate(parents):
            if parent not in place:
                raise unknown("recipe key", ".".join(parents[: depth + 1]), place)
            if parent in NAMED and isinstance(place[parent], str):
                place[parent] = {"name": place[parent]}
            if not isinstance(place[parent], dict):
                raise UserError(f"recipe key {key!r}: {parent} has no keys below it")
            place = place[parent]
        place[last] = value
        return Recipe.from_dict(values)


def read_value(text: str) -> Any:
    """A value as YAML writes it: `4`, `0.5`, `2:4`, `[a, b]`, `null`, ...

    Raises:
        UserError: it is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _NOT_YAML:
        raise UserError(f"{text!r} is not a valid YAML value") from None


def read_yaml(path: str | Path, what: str) -> Mapping[Any, Any]:
    """The mapping that a YAML file holds.

    Args:
        what: what the file is, for messages.

    Raises:
        UserError: it is missing, or holds no YAML mapping.
    """
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    except _NOT_YAML as error:
        raise UserError(f"{what} {path} is not valid YAML: {error}") from None
    if not isinstance(loaded, Mapping):
        raise UserError(f"{what} {path} must be a mapping of keys to values")
    return loaded


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain data as a YAML text that `read_yaml` takes back."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_NOT_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError)
"""What the YAML library raises for text that is none: tags that don't fit their value end in plain Python errors."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without base-60 numbers, which would read the pattern 2:4 as the integer 124."""


_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, expression)
        for tag, expression in resolvers
        if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBERS = (
    ("tag:yaml.org,2002:int", re.compile(f"^(?:{_INT.pattern})$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+0123456789.")),
)
_Loader.add_implicit_resolver(*_NUMBERS[0])
_Loader.add_implicit_resolver(*_NUMBERS[1])


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this or another YAML reader would take for a number."""


_Dumper.add_implicit_resolver(*_NUMBERS[0])
_Dumper.add_implicit_resolver(*_NUMBERS[1])


def build(cls: type[T], values: Any, where: str) -> T:
    """Make a dataclass from plain data, checking its keys and the kinds of its values.

    Args:
        where: what it is, for messages.

    Raises:
        UserError: an unknown or a missing key, a value of the wrong kind, or a number that is not finite.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a mapping of keys to values, not {values!r}")
    hints = typing.get_type_hints(cls)
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    made = {}
    for key, value in values.items():
        if key not in known:
            raise unknown(f"{where} key", str(key), known)
        made[key] = _convert(hints[key], value, _key(where, key))
    try:
        found = cls(**made)
    except TypeError:
        missing = [name for name in known if name not in made]
        raise UserError(f"{where} lacks a key: {', '.join(missing[:1])}") from None
    for key, value in made.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{_key(where, key)} must be a finite number, not {value}")
    return found


def _key(where: str, key: str) -> str:
    """The whole name of a key, for messages."""
    return key if where == "recipe" else f"{where}.{key}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    if origin is tuple:
        if arguments[0] == Named and isinstance(value, str | Mapping):
            value = [value]  # one of them needs no list
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, not {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    allowed = arguments if origin in (types.UnionType, typing.Union) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if float in kinds and int not in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        wanted = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"{where} must be {wanted}, not {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _positive(part: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if value is not None and not value > 0:
            raise UserError(f"{where}.{name} must be above 0, not {value}")


def share_of(value: Any) -> float | None:
    """A share that is written as `20%` or 0.2; None where it is none, or not between 0 and 1."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    share = float(found[1]) / 100 if found else value if isinstance(value, float) else None
    return share if share is not None and 0 < share < 1 else None


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `512MiB` or `1000000`.

    Raises:
        UserError: no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text)
    if found is None or float(found[1]) <= 0:
        raise UserError(f"size {text!r} is not understood: write 5GB, 512MiB or a number of bytes")
    step = 1024 if found[3] else 1000
    return max(1, int(float(found[1]) * step ** " kmgt".index(found[2].lower() or " ")))


def format_size(count: int) -> str:
    """A size in the form that `parse_size` takes, rounded up in its third figure."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        whole = 1024**power
        if count >= whole:
            digits = max(0, 3 - len(str(count // whole)))
            return f"{math.ceil(count / whole * 10**digits) / 10**digits:.{digits}f}{unit}"
    return f"{count}B"


SHORT = {
    "calibration": "calibration.source",
    "samples": "calibration.samples",
    "length": "calibration.length",
    "seed": "calibration.seed",
    "evaluate": "evaluate.text",
}
"""Short names of recipe keys, for the command line and for keyword arguments."""


def check_said(made: Recipe, options: Mapping[str, Any]) -> None:
    """See that nothing was said for a run that has no effect on it.

    Args:
        made: the recipe, settled.
        options: what was given by itself, on top of a recipe, as for `assemble`.

    Raises:
        UserError: there is one; the message says what it takes.
    """
    sparse = made.sparsity is not None or any(rule.sparsity is not None for rule in made.rules)
    divided = made.allocation if isinstance(made.allocation, str) else str(made.allocation.get("name"))
    sparse = sparse or divided.endswith((".yaml", ".yml"))  # a plan file says it
    keys = ("method",) if made.narrows else ("method", "scope")  # whose plan says that nothing else is pruned meanwhile
    if not sparse and (vain := next((key for key in keys if options.get(key)), None)):
        raise UserError(f"{vain} is about zeros, and no sparsity is asked for: give one, or leave {vain} out")


def assemble(recipe: Recipe | Mapping[str, Any] | str | Path | None, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of a run: a `Recipe`, plain data, a YAML file or nothing, with single keys changed.

    Args:
        changes: dotted keys or short names to values, as for `Recipe.override`; a None changes nothing. `quality` is
            the name of a preset: it stands for all its keys that are not among the changes.
    """
    if isinstance(recipe, str | Path):
        recipe = Recipe.read(recipe)
    elif isinstance(recipe, Mapping):
        recipe = Recipe.from_dict(recipe)
    made = recipe if recipe is not None else Recipe()
    said = set()
    for key, value in changes.items():
        if value is not None and key != "quality":
            whole = key in ("calibration", "evaluate") and isinstance(value, Mapping)
            made = made.override(key if whole else SHORT.get(key, key), value)
            said |= {key, *(f"{key}.{part}" for part in value)} if isinstance(value, Mapping) else {key}
    if changes.get("quality") is not None:
        for key, value in keys_of(changes["quality"]).items():
            if key not in said:
                made = made.override(key, value)
    return made
